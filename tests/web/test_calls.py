"""Calls in the page: replies are divided as in Python, and declarations are read as `slm chat --tools` reads them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from slm.core.call_stream import CallPart, CallStream
from slm.core.errors import SlmError
from slm.core.tool_fields import declared, openai_messages
from slm.core.tools import STYLES, Call, Style, Tool, ordered, parsed_calls, written
from tests.core.test_call_stream import REPLIES

Node = Callable[..., Any]

TOOLS = declared(
    [
        {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {
                    "on": {"type": "boolean"},
                    "room": {"type": "string"},
                    "level": {"type": ["number", "null"]},
                },
            },
        },
        {"name": "now"},
    ]
)
CALLS = [
    Call("set_light", {"room": 'a "b" \\ }{ é🦊\n', "level": 21.0, "on": True}),
    Call("now", {"2": [1e16, 1e-5, 1.5e-7, 12345678901234567890, -0.0], "1": {"a": [], "b": {}, "c": None}}),
    Call("now", {}),
]
# Calls that are broken, in each format: {} stands for the arguments in JSON, <> for those in Gemma's notation.
JSON_BODIES = [
    '{"name": "now", "arguments": {}}',
    '\n {"name":"now" ,"parameters":{"a":1}}\n',
    '{"arguments": {"a": 1}, "name": "now"}',
    '{"name": "now", "arguments": {"a": 1}, "extra": 2}',
    '{"name": "now", "arguments": {"a": NaN}}',
    '{"name": "now", "arguments": {"a": 1e999}}',
    '{"name": "now", "arguments": {"a": "\\ud800"}}',
    '{"name": "now", "arguments": {"a": "\\ud83e\\udd8a\\u00e9\\/"}}',
    '{"name": "now", "arguments": {"a": "tab\there"}}',
    '{"name": "now", "arguments": {"a": 01}}',
    '{"name": "now", "arguments": {"a": 1, "a": 2}}',
    '{"name": "now", "arguments": "text"}',
    '{"name": "", "arguments": {}}',
    '{"name": 3, "arguments": {}}',
    '{"name": "n\\u006fw", "arguments": {"a": [1,2,]}}',
    '{"name": "now", "arguments": {"a": 1}',
    '{"name": "now", "arguments": {"a": 1}} x',
    '{"name": "now"',
    "{",
    '{"name": "now", "arguments": ' + '{"a": ' * 70 + "1" + "}" * 71,
    '{"name": "now", "arguments": {"a": ' + "9" * 500 + "}}",
    "\u00a0{\u2003} ",
    '\ufeff{"name": "now", "arguments": {}}',
]
GEMMA_BODIES = [
    "call:now{}",
    " call:now{}",
    "call:now{a:1,b:true,c:null,d:None,e:-2.5e3}",
    "call:now{a:Qx } , QQ,b:[1,[],{}],c:{d:QzQ}}",
    "call:now{a:1,a:2}",
    "call:now{a:01}",
    "call:now{a:Qno end}",
    "call:now{a b:1,Qc,dQ:2}",
    "call:now{a:1,}",
    "call:now{,}",
    "call:no w{}",
    "call:\u00a0{}",
    "call:now{a:" + "[" * 70 + "]" * 70 + "}",
    "call:now",
    "call:",
    "call:now{a:" + "9" * 402 + "}",
    "call:now{a:Qthe closing C is text hereQ}",
]


def texts(style: Style) -> list[str]:
    bodies = JSON_BODIES if style.quote is None else [each.replace("Q", style.quote) for each in GEMMA_BODIES]
    found = [reply(style) for reply in REPLIES.values()]
    for body in bodies:
        call = f"{style.opening}{body.replace('C', style.closing)}{style.closing}"
        found += [
            call,
            f"Wait. {call}\n{written(CALLS, style)} \x85",
            f"{call[:-3]} and more",
            f"{style.opening}{call}\u2028",
        ]
    found += [
        written(CALLS, style),
        f" A.\x1c{written(CALLS[:1], style)}B{written([Call('other', {})], style)}\n",
        "\ufeff x ",
    ]
    found.append(f"{style.opening}{'x' * 1100}{written(CALLS[1:], style)}")
    return found


def ours(text: str, cuts: Sequence[int], style: Style) -> list[Any]:
    """Returns the text and calls of a stream, as the page's program gives them."""
    stream = CallStream(style, {tool.name: tool for tool in TOOLS})
    parts: list[str | CallPart] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += stream.push(text[begin:end])
    parts += stream.finish()
    said = "".join(part for part in parts if isinstance(part, str))
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name:
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    return [said, calls]


def message(text: str, style: Style) -> dict[str, Any]:
    """Returns the message of a whole reply, as a conversation records it."""
    answer = text.strip()
    said, calls = parsed_calls(answer, style)
    known = {tool.name: tool for tool in TOOLS}
    if not calls or any(call.name not in known for call in calls):
        return {"role": "assistant", "content": answer}
    made = tuple(ordered(call, known[call.name]) for call in calls)
    return openai_messages([{"role": "assistant", "content": said, "calls": made}])[0]


PROGRAM = """
import { CallStream, replyMessage } from "page/calls.js";
import { declared } from "page/tools.js";
const tools = declared(given.tools);
const slice = (all, begin, end) => all.slice(begin, end).join("");
console.log(JSON.stringify(given.texts.map(([text, cuts]) => {
  const stream = new CallStream(given.style, tools);
  const all = Array.from(text);
  const parts = [0, ...cuts].flatMap((begin, i) => stream.push(slice(all, begin, cuts[i])));
  parts.push(...stream.finish());
  const calls = [];
  for (const part of parts.filter((each) => typeof each !== "string")) {
    if (part.name !== undefined) calls.push([part.name, ""]);
    calls[part.index][1] += part.arguments ?? "";
  }
  const said = parts.filter((each) => typeof each === "string").join("");
  return [[said, calls], replyMessage(text, given.style, tools)];
})));
"""


def asdict(style: Style) -> dict[str, Any]:
    return {"opening": style.opening, "closing": style.closing, "quote": style.quote, "between": style.between}


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.opening)
def test_replies_are_divided_as_in_python(in_node: Node, style: Style) -> None:
    random = np.random.default_rng(0)
    asked = []
    for text in texts(style):
        for count in (0, 1, 5, len(text)):
            cuts = range(1, len(text)) if count == len(text) else random.integers(0, len(text) + 1, count)
            asked.append((text, sorted(map(int, cuts))))
    tools = json.dumps([tool.declaration for tool in TOOLS])
    found = in_node(PROGRAM, {"texts": asked, "style": asdict(style), "tools": tools})
    for (text, cuts), (parts, whole) in zip(asked, found, strict=True):
        assert parts == ours(text, cuts, style), text
        assert whole == message(text, style), text
    calling = [whole for _, whole in found if "tool_calls" in whole]
    assert len(asked) / 10 < len(calling) < len(asked)  # both kinds of reply are compared


DECLARATIONS = [
    '[{"type": "function", "function": {"name": "a", "description": " x ", "parameters": {"properties": {"b": {}}}}}]',
    '{"name": "a", "parameters": {"type": "object", "properties": {"2": true, "1": {"minimum": 1.0}}, "required": ["1"]}}',
    '{"tools": [{"name": "a", "description": null, "parameters": null}, {"name": "b", "parameters": {}}]}',
    '[{"name": "a", "parameters": {"properties": {"b": {"enum": [1, 2.50, null, "c"]}}, "additionalProperties": false}}]',
    '[{"name": "a", "parameters": {"properties": {"b": {"description": null, "type": ["number", "null"]}}}}]',
    '[{"name": "a", "parameters": "{\\"type\\": \\"object\\"}"}]',
    '[{"name": "a", "parameters": {"properties": {"b": {"type": "string", "required": true}}}}]',
    "[]",
]
REJECTED = [
    "",
    "tools",
    "[{]",
    "3",
    '"tools"',
    "[3]",
    "[{}]",
    '[{"name": ""}]',
    '[{"name": "a b"}]',
    f'[{{"name": "{"a" * 65}"}}]',
    '[{"type": "code_interpreter", "name": "a"}]',
    '[{"type": "function", "function": "a"}]',
    '[{"name": "a"}, {"name": "a"}]',
    '[{"name": "a", "description": 3}]',
    '[{"name": "a", "parameters": []}]',
    '[{"name": "a", "parameters": "{"}]',
    '[{"name": "a", "parameters": {"type": "array"}}]',
    '[{"name": "a", "parameters": {"required": ["b"]}}]',
    '[{"name": "a", "parameters": {"properties": []}}]',
    '[{"name": "a", "parameters": {"properties": {"b": 3}}}]',
    '[{"name": "a", "parameters": {"properties": {"b": {"enum": "c"}}}}]',
    '[{"name": "a", "parameters": {"properties": {"b": {"type": 3}}}}]',
    '[{"name": "a", "parameters": {"$defs": {"c": {"anyOf": 3}}, "properties": {"b": {"$ref": "#/$defs/c"}}}}]',
    '[{"name": "a", "parameters": {"x": "\\ud800"}}]',
    '[{"name": "a", "parameters": {"x": 1e999}}]',
    '[{"name": "a", "parameters": {"x": ' + "[" * 70 + "]" * 70 + "}}]",
    json.dumps([{"name": "a", "parameters": {"x": "y" * 70_000}}]),
    json.dumps([{"name": f"a{number}"} for number in range(129)]),
]


def read(text: str) -> tuple[Tool, ...] | SlmError:
    """Reads a file of declarations as `slm chat --tools FILE.json` does."""
    try:
        found = json.loads(text)
        found = found.get("tools") if isinstance(found, dict) and "tools" in found else found
        return declared([found] if isinstance(found, dict) else found)
    except (SlmError, ValueError) as error:
        return error if isinstance(error, SlmError) else SlmError("not JSON")


def test_declarations_are_read_as_by_slm_chat(in_node: Node) -> None:
    program = """
    import { declaration, declared, signature } from "page/tools.js";
    import { dumps } from "page/json.js";
    console.log(JSON.stringify(given.map((text) => {
      try {
        return declared(text).map((tool) => dumps(declaration(tool)));
      } catch (problem) {
        return { problem: problem.message, hint: problem.hint ?? null, kind: problem.constructor.name };
      }
    })));
    """
    found = in_node(program, [*DECLARATIONS, *REJECTED])
    for text, each in zip(DECLARATIONS, found, strict=False):
        tools = read(text)
        assert not isinstance(tools, SlmError)
        assert each == [json.dumps(tool.declaration, ensure_ascii=False) for tool in tools], text
    for text, each in zip(REJECTED, found[len(DECLARATIONS) :], strict=True):
        assert isinstance(read(text), SlmError) or text == '"tools"', text[:80]
        assert each["kind"] == "Problem" and "\n" not in each["problem"] and len(each["problem"]) < 150, text[:80]
        assert each["problem"].startswith(("the tools", "tool 1", "there are 129 tools", "two tools")), each
