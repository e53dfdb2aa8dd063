"""Whether forced calls of untuned models are valid, and what constraints cost in free text.

Starts `slm serve` for each model and asks for calls at temperature 1: of a named tool, and of any tool. Checks every call that
ends with `jsonschema`. The control leaves it to the model whether it calls a tool. The last line is one JSON object.

usage: python benchmarks/tool_calls.py [--calls 200] [--tokens 64] MODEL...
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from jsonschema import Draft202012Validator, ValidationError

PARAMETERS: dict[str, Any] = {
    "enums": {
        "type": "object",
        "properties": {
            "room": {"enum": ["hall", "kitchen", "bath"]},
            "state": {"type": "string", "enum": ["on", "off"]},
        },
        "required": ["room", "state"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "alarm": {
                "type": "object",
                "properties": {
                    "at": {
                        "type": "object",
                        "properties": {
                            "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                            "minute": {"type": "integer", "minimum": 0, "maximum": 59},
                        },
                        "required": ["hour", "minute"],
                    },
                    "label": {"type": "string", "maxLength": 12},
                },
                "required": ["at"],
            }
        },
        "required": ["alarm"],
    },
    "arrays": {
        "type": "object",
        "properties": {
            "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
            "scene": {
                "type": "array",
                "items": {"type": "object", "properties": {"lamp": {"type": "integer", "minimum": 1, "maximum": 9}}},
                "maxItems": 3,
            },
        },
        "required": ["colours", "scene"],
    },
    "bounds": {
        "type": "object",
        "properties": {
            "level": {"type": "integer", "minimum": 0, "maximum": 100},
            "degrees": {"type": "number", "minimum": -10, "maximum": 35.5},
            "step": {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 9},
        },
        "required": ["level", "degrees", "step"],
    },
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"Sets {name}.", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
ASKED: list[Any] = [{"role": "user", "content": "Set it as you like."}]


def main() -> None:
    """Prints the counts and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    found = {model: measured(model, args.calls, args.tokens) for model in args.models}
    print(json.dumps(found))


def measured(model: str, calls: int, tokens: int) -> dict[str, Any]:
    """Starts a server for a model and returns its figures."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "slm", "serve", model, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        _wait(port)
        name = client.models.list().data[0].id
        with ThreadPoolExecutor(4) as pool:
            forced = list(pool.map(lambda seed: _call(client, name, seed), range(calls)))
            control = list(pool.map(lambda seed: _control(client, name, seed), range(10)))
        free_s = {with_tools: _seconds(client, name, tokens, with_tools) for with_tools in (False, True)}
    finally:
        process.terminate()
        process.wait(30)
    figures = {
        "forced_calls": calls,
        "ended": sum(ended for ended, _ in forced),
        "valid": sum(valid for _, valid in forced),
        "called_unless_forced_of_10": sum(control),
        "free_text_s": round(free_s[False], 3),
        "free_text_with_tools_s": round(free_s[True], 3),
    }
    print(f"{model}: {figures}", file=sys.stderr)
    return figures


def _wait(port: int) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _call(client: openai.OpenAI, model: str, seed: int) -> tuple[bool, bool]:
    """Asks for one call: of a named tool for even seeds, of any tool for odd ones. Returns whether it ended and is valid."""
    named = list(PARAMETERS)[seed // 2 % len(PARAMETERS)]
    choice: Any = "required" if seed % 2 else {"type": "function", "function": {"name": named}}
    answer = client.chat.completions.create(
        model=model, messages=ASKED, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=seed, temperature=1,
        max_tokens=512,
    ).choices[0]  # fmt: skip
    if answer.finish_reason != "tool_calls":
        return False, False
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function"
    right = bool(seed % 2) or call.function.name == named
    return True, right and _is_valid(call.function.name, json.loads(call.function.arguments))


def _control(client: openai.OpenAI, model: str, seed: int) -> bool:
    """Leaves it to the model whether to call a tool. Returns whether the reply has a call."""
    answer = client.chat.completions.create(
        model=model, messages=ASKED, tools=TOOLS, seed=seed, temperature=1, max_tokens=256
    ).choices[0]
    return bool(answer.message.tool_calls)


def _is_valid(name: str, arguments: Any) -> bool:
    try:
        Draft202012Validator(PARAMETERS[name]).validate(arguments)
    except ValidationError:
        return False
    return True


def _seconds(client: openai.OpenAI, model: str, tokens: int, with_tools: bool) -> float:
    """Returns the median seconds of a reply of so many tokens of free text, after the first one."""
    times = []
    for _ in range(5):
        stream = client.chat.completions.create(
            model=model, messages=ASKED, temperature=0, max_tokens=tokens, stream=True,
            tools=TOOLS if with_tools else openai.omit,
        )  # fmt: skip
        began = None
        for event in stream:
            if began is None and event.choices and event.choices[0].delta.content:
                began = time.perf_counter()
        times.append(time.perf_counter() - (began or time.perf_counter()))
    return statistics.median(times)


if __name__ == "__main__":
    main()
