"""Replies in pieces: however a reply is cut, its texts and calls are those of the whole reply."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.core.call_stream import CallPart, CallStream
from slm.core.tool_fields import declared
from slm.core.tools import FUNCTION_GEMMA, STYLES, Call, Style, parsed_calls, written

CALLS = [
    Call("set_light", {"room": 'ki}]{"\\tchen', "on": True, "list": [1, [2, {"a": "]"}]]}),
    Call("now", {}),
]


def streamed(text: str, style: Style, cuts: list[int]) -> tuple[str, list[tuple[str, str]], int]:
    """Returns the text, the calls with the JSON text of their arguments, and the number of complete calls."""
    stream = CallStream(style)
    said: list[str] = []
    calls: list[tuple[str, str]] = []
    found: list[str | CallPart] = []
    at = 0
    for end in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        found += stream.push(text[at:end])
        at = end
    for part in [*found, *stream.finish()]:
        if isinstance(part, str):
            said.append(part)
        elif part.name:
            assert part.index == len(calls)
            calls.append((part.name, part.arguments))
        else:
            assert part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return "".join(said), calls, stream.complete


REPLIES = {
    "call": lambda style: written(CALLS[:1], style),
    "calls": lambda style: written(CALLS, style),
    "text, calls": lambda style: f"Wait.\n\n{written(CALLS, style)}\n",
    "calls, text": lambda style: f"{written(CALLS, style)}\nDone. ",
    "between": lambda style: f" One. {written(CALLS[:1], style)} Two.\n{written(CALLS[1:], style)} Three.",
    "text": lambda style: " A < b, {} and <tool> or <start_of> <| end.\n",
    "not a call": lambda style: f"{style.opening} is how a call begins. {style.closing}",
    "opening": lambda style: f"text {style.opening}",
    "an opening, then a call": lambda style: f"{style.opening}x{style.closing} {written(CALLS, style)}",
    "half an opening": lambda style: f"text {style.opening[:5]}",
}


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.opening)
@pytest.mark.parametrize("name", REPLIES)
@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=30))
def test_the_pieces_are_the_whole(style: Style, name: str, cuts: list[int]) -> None:
    text = REPLIES[name](style)
    said, calls, complete = streamed(text, style, cuts)
    whole, expected = parsed_calls(text, style)
    assert [Call(name, json.loads(arguments)) for name, arguments in calls] == expected
    assert complete == len(expected)
    assert said.split() == whole.split()
    if not expected:
        assert said == text


def test_arguments_arrive_before_the_call_ends() -> None:
    stream = CallStream()
    assert stream.push('Sure.\n<tool_call>\n{"name": "f", "argu') == ["Sure."]
    assert stream.push('ments": {"a": ') == [CallPart(0, "f"), CallPart(0, arguments='{"a": ')]
    assert stream.push("1}") == [CallPart(0, arguments="1}")]
    assert (stream.begun, stream.complete) == (1, 0)
    assert stream.push("}\n</tool_call>") == []
    assert (stream.begun, stream.complete) == (1, 1)


def test_a_reply_that_ends_within_a_call_has_an_incomplete_call() -> None:
    text = written(CALLS[:1])
    assert streamed(text[:60], STYLES[0], [])[1:] == ([("set_light", text[text.index('{"room') : 60])], 0)
    said, calls, complete = streamed(written(CALLS[:1], FUNCTION_GEMMA)[:50], FUNCTION_GEMMA, [])
    assert (said, calls, complete) == ("", [("set_light", "")], 0)


def test_gemmas_arguments_are_in_the_order_of_the_declaration() -> None:
    parameters = {"type": "object", "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}}}
    tools = {tool.name: tool for tool in declared([{"name": "f", "parameters": parameters}])}
    stream = CallStream(FUNCTION_GEMMA, tools)
    parts = stream.push(written([Call("f", {"on": True, "room": "x"})], FUNCTION_GEMMA))
    assert parts == [CallPart(0, "f"), CallPart(0, arguments='{"room": "x", "on": true}')]


def test_a_name_that_never_ends_is_text() -> None:
    text = '<tool_call>{"name": "' + "x" * 5000
    assert streamed(text, STYLES[0], list(range(0, 5000, 7)))[:2] == (text, [])
