"""A model that was tuned to call functions makes the same calls in onnxruntime-genai and in llama.cpp."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slm import load
from slm.core.chat import END_OF_TURN, turn_ids, turn_prompt
from slm.core.tokenizer import Tokenizer
from slm.core.tools import Call, parsed_calls

pytestmark = [pytest.mark.peer, pytest.mark.timeout(900)]

ROWS = Path(__file__).parents[2] / "examples" / "smart_home" / "rows.py"
REQUESTS, TOKENS = 12, 96


@dataclass(frozen=True)
class Tuned:
    """A tuned model.

    Attributes:
        float32: Its float32 bundle.
        int8: Its INT8 bundle.
        gguf: Its GGUF file, in float32.
        requests: Requests of the training rows with one call, and the calls.
    """

    float32: Path
    int8: Path
    gguf: Path
    requests: dict[str, Call]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The bundled model, tuned on a few rows of the smart home by the commands of its script."""
    home = tmp_path_factory.mktemp("tuned")

    def run(*arguments: object) -> None:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=home, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]

    run(ROWS, "--out", ".", "--train", 48, "--test", 2)
    run(
        "-m", "slm", "finetune", "--lora", "train.jsonl", "--epochs", 25, "--rank", 16, "--samples", 0, "--name", "home"
    )
    (adapter,) = home.glob("runs/*/adapters/home")
    run("-m", "slm", "export", "--onnx", "--adapter", adapter, "--out", "onnx")
    run("-m", "slm", "export", "--gguf", "--adapter", adapter, "--gguf-type", "f32", "--out", "home.gguf")
    run("-m", "slm", "quantize", "--int8", "onnx", "--out", "onnx-int8")
    requests: dict[str, Call] = {}
    for line in (home / "train.jsonl").read_text(encoding="utf-8").splitlines():
        request, answer, *_ = json.loads(line)["messages"]
        calls = [each["function"] for each in answer.get("tool_calls", ())]
        if len(calls) == 1:
            requests[request["content"]] = Call(calls[0]["name"], json.loads(calls[0]["arguments"]))
    return Tuned(home / "onnx", home / "onnx-int8", home / "home.gguf", dict(list(requests.items())[:REQUESTS]))


def calls(tokenizer: Tokenizer, rows: Sequence[list[int]]) -> list[list[Call]]:
    """Returns the calls in each row of greedy tokens, up to the end of the turn."""
    end = tokenizer.token_id(END_OF_TURN)
    answers = [row[: row.index(end)] if end in row else row for row in rows]
    return [parsed_calls(tokenizer.decode(row))[1] for row in answers]


def ours(path: Path, prompts: Sequence[list[int]]) -> list[list[Call]]:
    model = load(path)
    made = [model.complete(prompt, max_new_tokens=TOKENS, temperature=0).tokens for prompt in prompts]
    return calls(model.tokenizer, made)


def test_the_same_calls_in_genai(tuned: Tuned, genai: Callable[..., Any]) -> None:
    tokenizer = Tokenizer.load(tuned.int8)
    prompts = [turn_ids(tokenizer, request) for request in tuned.requests]
    wanted = ours(tuned.int8, prompts)
    assert sum(found == [call] for found, call in zip(wanted, tuned.requests.values(), strict=True)) >= REQUESTS // 2

    requests = json.dumps([{"prompts": [prompt], "count": TOKENS} for prompt in prompts])
    rows = genai(tuned.int8, requests, "[]")["answers"]
    assert calls(tokenizer, [row[len(prompt) :] for (row,), prompt in zip(rows, prompts, strict=True)]) == wanted


def test_the_same_calls_in_llama_cpp(tuned: Tuned, llama_cpp: Callable[..., Any]) -> None:
    tokenizer = Tokenizer.load(tuned.float32)
    prompts = [turn_ids(tokenizer, request) for request in tuned.requests]
    wanted = ours(tuned.float32, prompts)
    assert sum(found == [call] for found, call in zip(wanted, tuned.requests.values(), strict=True)) >= REQUESTS // 2
    # llama.cpp adds the first token, and reads the tokens of turns in the text.
    assert (
        calls(tokenizer, llama_cpp(tuned.gguf, [turn_prompt(request) for request in tuned.requests], TOKENS)) == wanted
    )
