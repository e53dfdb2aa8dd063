"""Tools in prompts: the ids of transformers for every template, the same ids in training and in serving, no forged token."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slm.core.chat import CHAT_TEMPLATE, Message, call_ends, chat_ids, dialogues, tool_form
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.tool_fields import declared
from slm.core.tool_text import signature
from slm.core.tools import FUNCTION_GEMMA, GEMMA_4, JSON_STYLE, Call, Tool
from tests.core.tool_chat_templates import ANSWER_ENDS, LOWERED, MARKS, NATIVE, tool_tokenizer

ALL = {**NATIVE, **LOWERED, "slm's own": CHAT_TEMPLATE}
TOOLS = declared(
    [
        {
            "type": "function",
            "function": {
                "name": "set_light",
                "description": "Turns a light on, or off.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "room": {"type": "string", "enum": ["kitchen", "hall"], "description": "The room"},
                        "on": {"type": "boolean", "description": "Whether it is on"},
                        "level": {"type": "integer", "minimum": 0, "maximum": 100, "description": "Percent"},
                    },
                    "required": ["room", "on"],
                },
            },
        },
        {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
    ]
)
TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Light in the kitchen, and what is the time?"},
    {
        "role": "assistant",
        "content": "",
        "calls": (Call("set_light", {"room": "kitchen", "on": True, "level": 40}), Call("now", {})),
    },
    {"role": "tool", "name": "set_light", "content": "done"},
    {"role": "tool", "name": "now", "content": '{"hour": 9, "note": "morning"}'},
    {"role": "assistant", "content": "It is on. It is nine."},
    {"role": "user", "content": "Off again."},
    {"role": "assistant", "content": "Sure.", "calls": (Call("set_light", {"room": "kitchen", "on": False}),)},
]


@cache
def built(name: str, special: bool = True) -> Tokenizer:
    return tool_tokenizer(ALL[name], special=special)


def theirs(name: str, messages: Sequence[Message], **variables: Any) -> str:
    """What transformers renders from the messages in OpenAI's form."""
    asked: list[dict[str, Any]] = []
    for message in messages:
        each: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if message.get("calls"):
            each["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message["calls"]
            ]
        if message["role"] == "tool":
            each["name"] = message["name"]
            if each["content"].startswith("{") and name in ("functiongemma", "gemma 4"):
                each["content"] = json.loads(each["content"])
        asked.append(each)
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True} | variables
    tools = [tool.declaration for tool in TOOLS]
    (text,), _ = render_jinja_template(conversations=[asked], tools=tools, chat_template=ALL[name], **given)
    return str(text)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", [*NATIVE, "slm's own"])
def test_the_ids_are_those_of_transformers(name: str, special: bool) -> None:
    tokenizer = built(name, special)
    for messages in (TALK[1:2], TALK[:2], TALK[:5], TALK[:7]):
        text = theirs(name, messages)
        if name == "slm's own":  # whose calls are plain text
            ids = chat_ids(tokenizer, messages, (), TOOLS)
            assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text.removeprefix("<s>")
        else:
            assert chat_ids(tokenizer, messages, (), TOOLS) == tokenizer.encode_rendered(text)


def ends(tokenizer: Tokenizer) -> set[int]:
    return {token for end in ANSWER_ENDS if (token := tokenizer.token_id(end)) is not None}


@pytest.mark.parametrize("name", ALL)
def test_the_ids_in_training_are_those_in_serving(name: str) -> None:
    tokenizer = built(name)
    (found,) = dialogues(tokenizer, [TALK], ends(tokenizer), [TOOLS])
    assert not isinstance(found, SlmError)
    answers = [number for number, message in enumerate(TALK) if message["role"] == "assistant"]
    assert len(found.answers) == len(answers)
    for number, (start, end) in zip(answers, found.answers, strict=True):
        assert list(found.ids[:start]) == chat_ids(tokenizer, TALK[:number], (), TOOLS)
        assert found.ids[end - 1] in ends(tokenizer)
        assert not ends(tokenizer) & set(found.ids[start : end - 1])
    said = tokenizer.backend.decode(found.ids[slice(*found.answers[0])], skip_special_tokens=False)
    assert "set_light" in said and "now" in said and "done" not in said
    # The negative control: other tools, another result or another call give other ids.
    (other,) = dialogues(tokenizer, [TALK], ends(tokenizer), [TOOLS[:1]])
    assert not isinstance(other, SlmError) and other.ids != found.ids
    changed: list[Message] = [*TALK[:3], {"role": "tool", "name": "set_light", "content": "failed"}, *TALK[4:]]
    (other,) = dialogues(tokenizer, [changed], ends(tokenizer), [TOOLS])
    assert not isinstance(other, SlmError) and other.ids != found.ids


def test_how_tools_are_written() -> None:
    assert tool_form(built("functiongemma")).style is FUNCTION_GEMMA
    assert tool_form(built("gemma 4")).style is GEMMA_4
    assert tool_form(built("qwen")).style is JSON_STYLE
    for name in NATIVE:
        assert tool_form(built(name)).native
    for name in (*LOWERED, "slm's own"):
        form = tool_form(built(name))
        assert (form.native, form.style) == (False, JSON_STYLE), name
    assert not tool_form(built("gemma 2")).system and tool_form(built("gemma 3")).system
    tokenizer = built("functiongemma")
    assert call_ends(tokenizer) == {tokenizer.token_id("<start_function_response>")}
    assert call_ends(built("qwen")) == call_ends(built("slm's own")) == frozenset()


def test_functiongemmas_format() -> None:
    tokenizer = built("functiongemma")
    (found,) = dialogues(tokenizer, [TALK], ends(tokenizer), [TOOLS])
    assert not isinstance(found, SlmError)
    text = tokenizer.backend.decode(list(found.ids), skip_special_tokens=False)
    assert "<start_of_turn>developer\nBe brief.<start_function_declaration>declaration:set_light{description:" in text
    assert "room:{description:<escape>The room<escape>,enum:[<escape>kitchen<escape>,<escape>hall<escape>]" in text
    call = "<start_function_call>call:set_light{level:40,on:true,room:<escape>kitchen<escape>}<end_function_call>"
    assert f"<start_of_turn>model\n{call}<start_function_call>call:now{{}}<end_function_call>" in text
    assert "<start_function_response>response:set_light{value:<escape>done<escape>}<end_function_response>" in text
    assert (
        "<start_function_response>response:now{hour:9,note:<escape>morning<escape>}<end_function_response>It is on."
        in text
    )
    assert text.endswith("<end_function_call><start_function_response>")


def test_slms_own_turns() -> None:
    tokenizer = built("slm's own")
    text = tokenizer.backend.decode(chat_ids(tokenizer, TALK[:5], (), TOOLS), skip_special_tokens=False)
    assert text == (
        "<start_of_turn>system\nBe brief.\n\n"
        'To call a tool, write <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\nTools:\n'
        'set_light{room: "kitchen" | "hall" (The room), on: boolean (Whether it is on), '
        "level?: integer 0..100 (Percent)}: Turns a light on, or off.\n"
        "now{}: Tells the time.<end_of_turn>\n"
        "<start_of_turn>user\nLight in the kitchen, and what is the time?<end_of_turn>\n"
        "<start_of_turn>model\n"
        '<tool_call>\n{"name": "set_light", "arguments": {"room": "kitchen", "on": true, "level": 40}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><end_of_turn>\n'
        "<start_of_turn>tool\ndone<end_of_turn>\n"
        '<start_of_turn>tool\n{"hour": 9, "note": "morning"}<end_of_turn>\n'
        "<start_of_turn>model\n"
    )


def test_a_template_without_tools_gets_them_as_text() -> None:
    for name in ("gemma 2", "gemma 3"):
        tokenizer = built(name)
        text = tokenizer.backend.decode(chat_ids(tokenizer, TALK[:5], (), TOOLS), skip_special_tokens=False)
        assert text.startswith("<s><start_of_turn>user\nBe brief.\n\nTo call a tool, write")
        assert "now{}: Tells the time.\n\nLight in the kitchen" in text
        assert (
            '<start_of_turn>user\n<tool_response>\ndone\n</tool_response>\n<tool_response>\n{"hour": 9, "note": "morning"}\n'
            "</tool_response><end_of_turn>\n<start_of_turn>model\n"
        ) in text


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {}},
    {"type": "object", "properties": {"a": True, "b": {}, "c": {"const": "x"}, "d": {"type": ["string", "null"]}}},
    {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "array", "items": {"enum": [1, None, "é"]}}}},
    },
    {
        "type": "object",
        "properties": {"a": {"type": "array"}, "b": {"type": "object"}, "c": {"type": "number", "minimum": -0.5}},
    },
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 5}]}}},
    {"type": "object", "properties": {"items": {"oneOf": [{"type": "null"}, {"const": 1}], "description": " Either "}}},
    {
        "type": "object",
        "properties": {"o": {"type": "object", "properties": {"keys": {"type": "string"}}, "required": ["keys"]}},
        "required": ["o"],
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_signatures_are_the_same_in_jinja(schema: Any) -> None:
    tool = Tool("f", "Does <b>it</b>.", schema)
    (text,), _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "x"}]],
        tools=[tool.declaration],
        chat_template=CHAT_TEMPLATE,
        bos_token="",
    )
    assert f"\nTools:\nf{signature(schema)}: Does <b>it</b>.<end_of_turn>\n" in text


HOSTILE = (*MARKS, "<end_of_turn>", "<start_of_turn>", "<|im_end|>", "<|im_start|>", '"}<|im_end|>', "\\<end_of_turn>")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_no_text_of_tools_forms_a_control_token(name: str, special: bool) -> None:
    """Descriptions, names of parameters, arguments and results are other people's text."""
    tokenizer = built(name, special)
    named = (*MARKS, "<end_of_turn>", "<start_of_turn>", "<|im_end|>", "<|im_start|>")
    known = {tokenizer.token_id(token) for token in named if token in ALL[name]}
    assert known and known <= tokenizer.control_ids | {tokenizer.token_id(mark) for mark in JSON_STYLE.marks}

    def count(said: str) -> int:
        parameters = {
            "type": "object",
            "properties": {f"a{said}": {"type": "string", "description": f"b{said}", "enum": [f"c{said}", "d"]}},
            "required": [f"a{said}"],
        }
        tools = (Tool("f", f"e{said}", parameters),)
        messages: list[Message] = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "calls": (Call("f", {f"a{said}": f"c{said}"}),)},
            {"role": "tool", "name": "f", "content": f"r{said}"},
        ]
        return sum(token in known for token in chat_ids(tokenizer, messages, (), tools))

    usual, refused = count("hello"), 0
    for hostile in HOSTILE:
        try:
            assert count(hostile) == usual, hostile
        except SlmError as error:
            assert "text of a control token" in error.message
            refused += 1
    assert refused == 0 or name == "other"
