"""Tools and calls: what other programs write, what replies spell, and text that only resembles a call."""

import json
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.tool_fields import MAX_TOOLS, called, declared
from slm.core.tools import (
    FUNCTION_GEMMA,
    GEMMA_4,
    JSON_STYLE,
    STYLES,
    Call,
    Style,
    arguments_text,
    canonical,
    parsed_calls,
    with_calls,
    written,
)

LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Turns a light on or off.",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "enum": ["kitchen", "hall"]},
                "on": {"type": "boolean"},
                "level": {"type": "integer", "minimum": 0, "maximum": 100},
            },
            "required": ["room", "on"],
        },
    },
}
CALLS = [
    Call("set_light", {"room": "kitchen", "on": True}),
    Call("f", {}),
    Call("g", {"a": [1, -2.5, None, False], "o": {"x": {"y": "z, {}:[] é\n"}}, "text": 'say "hi" \\ there'}),
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.opening)
def test_calls_are_read_as_they_are_written(style: Style) -> None:
    text = f"Let me see.\n{written(CALLS, style)}\n"
    assert parsed_calls(text, style) == ("Let me see.", CALLS)
    assert parsed_calls(written(CALLS[:1], style), style) == ("", CALLS[:1])
    assert parsed_calls("No call here.\n", style) == ("No call here.\n", [])


def test_the_formats_are_those_of_the_models() -> None:
    call = Call("get_weather", {"unit": "celsius", "city": "Tokyo, Japan", "days": 3})
    assert written([call]) == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"unit": "celsius", "city": "Tokyo, Japan", "days": 3}}'
        "\n</tool_call>"
    )
    assert written([call], FUNCTION_GEMMA) == (
        "<start_function_call>call:get_weather{city:<escape>Tokyo, Japan<escape>,days:3,unit:<escape>celsius<escape>}"
        "<end_function_call>"
    )
    assert written([call], GEMMA_4) == (
        '<|tool_call>call:get_weather{city:<|"|>Tokyo, Japan<|"|>,days:3,unit:<|"|>celsius<|"|>}<tool_call|>'
    )
    assert with_calls(" On it. ", [call, call]) == f"On it.\n{written([call])}\n{written([call])}"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {}}',  # not closed
        '<tool_call>{"name": "f", "arguments": {}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>',
        '<tool_calls>{"name": "f", "arguments": {}}</tool_calls>',
        '{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 3000 + "]" * 3000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 90 + "]" * 90 + "}}</tool_call>",
    ],
)
def test_text_that_resembles_a_json_call_stays_text(text: str) -> None:
    assert parsed_calls(text) == (text, [])


@pytest.mark.parametrize(
    "inner",
    [
        "call:f{a:1",
        "call:f{a:1}}",
        "call:f{a:}",
        "call:f{a:1,a:2}",
        "call:f{a:1 b:2}",
        "call:f{a:word}",
        "call:f{a:01}",
        "call:f{a:<escape>x}",
        "call:{}",
        "f{a:1}",
        "call:f{,a:1}",
        "call:f{a:1e999}",
        "call:f{a:" + "[" * 3000 + "}",
    ],
)
def test_text_that_resembles_a_call_of_gemma_stays_text(inner: str) -> None:
    text = f"<start_function_call>{inner}<end_function_call>"
    assert parsed_calls(text, FUNCTION_GEMMA) == (text, [])


def test_a_call_after_text_that_resembles_one_is_found() -> None:
    text = f"<tool_call>oops {written(CALLS[:2])} done"
    assert parsed_calls(text) == ("<tool_call>oops\ndone", CALLS[:2])
    assert parsed_calls(text, FUNCTION_GEMMA) == (text, [])


def test_a_marker_within_an_argument_is_text() -> None:
    calls = [Call("f", {"text": "<tool_call>{</tool_call>"})]
    assert parsed_calls(written(calls)) == ("", calls)


def test_declarations_of_openai_and_of_bare_functions() -> None:
    (tool,) = declared([LIGHT])
    assert (tool.name, tool.description) == ("set_light", "Turns a light on or off.")
    assert tool.declaration == LIGHT
    assert declared([LIGHT["function"]]) == declared(json.dumps([LIGHT])) == (tool,)
    (plain,) = declared([{"type": "function", "function": {"name": "now"}}])
    assert plain.parameters == {"type": "object", "properties": {}}


def test_null_in_a_declaration_is_absent() -> None:
    """A table gives every object the fields of all objects, filled with null."""
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "enum": None}, "b": None, "c": {"enum": [1, None], "default": None}},
        "required": None,
    }
    (tool,) = declared([{"type": "function", "function": {"name": "f", "description": None, "parameters": parameters}}])
    assert tool.parameters == {
        "type": "object",
        "properties": {"a": {"type": "string"}, "c": {"enum": [1, None]}},
    }


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"properties": [1]}, "properties is not an object of schemas"),
        ({"properties": {"x": {}}, "required": 3}, "required is not a list of names"),
        ({"type": 3}, "type is not the name of a type"),
        ({"type": [["string"]]}, "type is not the name of a type"),
        ({"enum": 3}, "enum is not a list of values"),
        ({"anyOf": 3}, "anyOf is not a list of schemas"),
        ({"oneOf": {}}, "oneOf is not a list of schemas"),
        ({"$ref": {}}, r"\$ref is not text"),
        ({"description": 3}, "description is not text"),
    ],
)
def test_keywords_of_the_wrong_type_at_any_depth(inner: dict[str, Any], message: str) -> None:
    for within in (
        inner,
        {"type": "array", "items": inner},
        {"type": "object", "properties": {"y": inner}},
        {"anyOf": [{"type": "null"}, inner]},
        {"$ref": "#/elsewhere"},
    ):
        parameters = {"properties": {"a": within}, "elsewhere": inner}
        with pytest.raises(SlmError, match=f"tool 1: {message}"):
            declared([{"name": "f", "parameters": parameters}])


def test_data_in_a_schema_is_not_a_schema() -> None:
    data = {"enum": 3, "type": 3, "properties": 3, "description": 3}
    inner = {"type": "object", "default": data, "const": data, "enum": [data], "examples": [data]}
    itself = {"$ref": "#/properties/c"}
    properties = {"a": inner, "type": {"type": "string", "required": True}, "enum": True, "c": itself}
    (tool,) = declared([{"name": "f", "parameters": {"properties": properties}}])
    assert tool.parameters["properties"] == properties


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "tools is not a list"),
        ("[{]", "tools is text that is not valid JSON"),
        ([3], "tool 1 is not an object"),
        ([LIGHT, {"type": "web_search"}], "tool 2 has the type 'web_search'"),
        ([{"type": "custom", "function": {"name": "f"}}], "tool 1 has the type 'custom'"),
        ([{"function": {}}], "tool 1 has no name"),
        ([{"function": {"name": "a b"}}], "tool 1 has the name 'a b'"),
        ([{"function": {"name": "a" * 65}}], "tool 1 has the name"),
        ([LIGHT, LIGHT], "two tools have the name 'set_light'"),
        ([{"function": {"name": "f", "description": 3}}], "tool 1: the description is not text"),
        ([{"function": {"name": "f", "parameters": [1]}}], "tool 1: parameters is not an object"),
        ([{"function": {"name": "f", "parameters": {"type": "array"}}}], "tool 1: parameters has the type 'array'"),
        ([{"function": {"name": "f", "parameters": {"properties": [1]}}}], "tool 1: properties is not an object"),
        ([{"function": {"name": "f", "parameters": {"properties": {"a": 1}}}}], "tool 1: properties is not an object"),
        ([{"function": {"name": "f", "parameters": {"required": "a"}}}], "tool 1: required is not a list"),
        (
            [{"function": {"name": "f", "parameters": {"required": ["a"]}}}],
            "required parameter 'a' is not in properties",
        ),
        ([{"function": {"name": "f", "parameters": {"x": "y" * 70_000}}}], "tool 1: parameters has 70,0"),
        ([{"function": {"name": "f", "parameters": {"x": "\ud800"}}}], "tool 1: parameters is not valid JSON"),
        ([{"function": {"name": f"f{n}"}} for n in range(MAX_TOOLS + 1)], "129 tools are declared; the limit is 128"),
    ],
)
def test_what_is_no_declaration(value: Any, message: str) -> None:
    with pytest.raises(SlmError, match=message):
        declared(value)


def test_nesting_is_limited() -> None:
    deep: Any = {}
    for _ in range(2000):
        deep = {"items": deep}
    with pytest.raises(SlmError, match="nested more than 64 levels"):
        declared([{"function": {"name": "f", "parameters": deep}}])
    with pytest.raises(SlmError, match="nested more than 64 levels"):
        called([{"function": {"name": "f", "arguments": deep}}])


def test_calls_in_openais_and_trls_form() -> None:
    tools = declared([LIGHT])
    openai = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "set_light", "arguments": '{"on": true, "room": "hall"}'},
        }
    ]
    trl = [{"type": "function", "function": {"name": "set_light", "arguments": {"on": True, "room": "hall"}}}]
    assert called(openai, tools) == called(trl, tools) == called(json.dumps(trl), tools)
    (call,) = called(trl, tools)
    assert arguments_text(call) == '{"room": "hall", "on": true}'  # in the order of the declaration
    (loose,) = called(trl)
    assert arguments_text(loose) == '{"on": true, "room": "hall"}'
    assert called([{"function": {"name": "now", "arguments": ""}}]) == (Call("now", {}),)


def test_null_arguments_of_a_table_are_absent() -> None:
    nullable = {"type": ["string", "null"]}
    parameters = {"type": "object", "properties": {"a": {"type": "string"}, "b": nullable, "c": {"type": "integer"}}}
    tools = declared([{"function": {"name": "f", "parameters": parameters | {"required": ["c"]}}}])
    arguments = {"c": None, "b": None, "a": None}
    (call,) = called([{"function": {"name": "f", "arguments": arguments}}], tools)
    assert call.arguments == {"b": None, "c": None}  # null is a value of b; c is required
    (untouched,) = called([{"function": {"name": "f", "arguments": arguments}}])
    assert untouched.arguments == arguments


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "tool_calls is not a list"),
        ([3], "call 1 is not an object"),
        ([{"type": "custom", "function": {"name": "f"}}], "call 1 has the type 'custom'"),
        ([{"function": {"arguments": {}}}], "call 1 has no name"),
        ([{"function": {"name": "f", "arguments": "{"}}], "call 1: arguments is text that is not valid JSON"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "call 1: arguments is not an object"),
        ([{"function": {"name": "f", "arguments": {"a": float("nan")}}}], "call 1: arguments is not valid JSON"),
        ([{"function": {"name": "other", "arguments": {}}}], "call 1 names 'other', which is not declared"),
    ],
)
def test_what_is_no_call(value: Any, message: str) -> None:
    with pytest.raises(SlmError, match=message):
        called(value, declared([LIGHT]))


def test_equal_calls_have_the_same_canonical_text() -> None:
    call = Call("f", {"a": 1, "b": {"x": [2.0], "y": "z"}})
    assert canonical(call) == canonical(Call("f", {"b": {"y": "z", "x": [2]}, "a": 1.0}))
    for other in (
        Call("g", call.arguments),
        Call("f", {"a": True, "b": {"x": [2], "y": "z"}}),
        Call("f", {"a": "1", "b": {"x": [2], "y": "z"}}),
        Call("f", {"a": 1}),
    ):
        assert canonical(call) != canonical(other)


def test_styles_do_not_read_each_others_calls() -> None:
    for style in STYLES:
        for other in STYLES:
            found = parsed_calls(written(CALLS, style), other)[1]
            assert found == (CALLS if style is other else [])
    assert JSON_STYLE.marks == ("<tool_call>", "</tool_call>")
