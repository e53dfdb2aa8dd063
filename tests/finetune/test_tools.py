"""Rows with tools: OpenAI's, TRL's and ShareGPT's forms are the same conversation, and loss covers what the assistant says."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from slm.core.chat import CHAT_TEMPLATE, chat_ids, declares_tools
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tools import STYLES, Call, parsed_calls
from slm.finetune.examples import Renderer
from slm.finetune.preparation import _declares_tools
from slm.finetune.rows import ChatRow, read_rows
from tests.core.tool_chat_templates import ANSWER_ENDS, NATIVE, tool_tokenizer
from tests.finetune.test_fields import write

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "A city"},
        "days": {"type": "integer", "description": "Days"},
    },
    "required": ["city"],
}
FUNCTIONS = [
    {"name": "weather", "description": "The weather.", "parameters": PARAMETERS},
    {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
]
TOOLS = [{"type": "function", "function": each} for each in FUNCTIONS]
ASKED = {"role": "user", "content": "Weather in Rome, and the time?"}
SAID = {"role": "assistant", "content": "Sunny, at nine."}


def calls(arguments: Any, *, ids: bool) -> list[dict[str, Any]]:
    made = [("weather", arguments), ("now", "{}" if isinstance(arguments, str) else {})]
    return [
        ({"id": f"call_{number}"} if ids else {}) | {"type": "function", "function": {"name": name, "arguments": each}}
        for number, (name, each) in enumerate(made)
    ]


OPENAI = {
    "messages": [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls('{"days": 2, "city": "Rome"}', ids=True)},
        {"role": "tool", "tool_call_id": "call_1", "content": "9:00"},
        {"role": "tool", "tool_call_id": "call_0", "content": '{"sky": "blue"}'},
        SAID,
    ],
    "tools": TOOLS,
    "parallel_tool_calls": False,
}
TRL = {
    "prompt": [ASKED],
    "completion": [
        {"role": "assistant", "tool_calls": calls({"city": "Rome", "days": 2}, ids=False)},
        {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'},
        {"role": "tool", "name": "now", "content": "9:00"},
        SAID,
    ],
    "tools": json.dumps(TOOLS),
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": ASKED["content"]},
        {
            "from": "function_call",
            "value": json.dumps(
                [{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "now", "arguments": {}}]
            ),
        },
        {"from": "observation", "value": '{"sky": "blue"}'},
        {"from": "observation", "value": "9:00"},
        {"from": "gpt", "value": SAID["content"]},
    ],
    "tools": json.dumps(FUNCTIONS),
}


def read(row: Mapping[str, Any], form: str = "jsonl") -> ChatRow:
    (found,) = read_rows(write([row], form))
    assert isinstance(found, ChatRow)
    return found


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("row", [OPENAI, TRL, SHAREGPT], ids=["openai", "trl", "sharegpt"])
def test_the_forms_are_the_same_conversation(row: Mapping[str, Any], form: str) -> None:
    found = read(row, form)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.messages[1]["calls"] == (Call("weather", {"city": "Rome", "days": 2}), Call("now", {}))
    assert [message["content"] for message in found.messages[2:4]] == ['{"sky": "blue"}', "9:00"]
    assert [message["name"] for message in found.messages[2:4]] == ["weather", "now"]
    assert [tool.name for tool in found.tools] == ["weather", "now"]
    assert found.tools[0].parameters == PARAMETERS
    assert found.only_read == frozenset()


def test_no_field_of_tools_is_reported_as_ignored() -> None:
    left_out: set[str] = set()
    for row in (OPENAI, TRL, SHAREGPT):
        read_rows(write([row], "jsonl"), left_out=left_out)
    assert left_out == set()


def test_a_legacy_function_call_and_a_result_that_is_an_object() -> None:
    legacy = {
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {"role": "function", "name": "weather", "content": {"sky": "blue"}},
            SAID,
        ],
        "functions": FUNCTIONS,
    }
    found = read(legacy)
    assert found.messages[1]["calls"] == (Call("weather", {"city": "Rome"}),)
    assert found.messages[2]["content"] == '{"sky": "blue"}'


def test_a_call_may_be_all_that_is_learned_and_tools_need_not_be_declared() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls({"city": "Rome"}, ids=False)}]}
    assert read(row).tools == ()
    weighted = {"messages": [ASKED, OPENAI["messages"][1] | {"weight": 0}, *OPENAI["messages"][2:]], "tools": TOOLS}  # type: ignore[index]
    assert read(weighted).only_read == {1}


@pytest.mark.parametrize("name", [*NATIVE, "slm's own"])
def test_loss_covers_calls_and_answers_and_nothing_else(name: str, config: ModelConfig) -> None:
    tokenizer = tool_tokenizer({**NATIVE, "slm's own": CHAT_TEMPLATE}[name])
    stops = tuple(i for end in ANSWER_ENDS if "respon" not in end and (i := tokenizer.token_id(end)) is not None)
    row = read(OPENAI)
    example = Renderer(tokenizer, config.model_copy(update={"eos_token_id": stops})).example(row)
    learned = [tokenizer.backend.decode(example.ids[a:b], skip_special_tokens=False) for a, b in example.spans]
    assert len(learned) == 2
    style = {"functiongemma": 1, "gemma 4": 2}.get(name, 0)
    text, found = parsed_calls(learned[0], STYLES[style])
    assert tuple(found) == row.messages[1]["calls"]  # type: ignore[comparison-overlap]
    assert text in {"<end_of_turn>", "<|im_end|>", "<start_function_response>", "<|tool_response>"}
    assert learned[1].startswith("Sunny, at nine.")
    assert not any("9:00" in each or "blue" in each or "The weather" in each for each in learned)
    for start, number in zip((start for start, _ in example.spans), (1, 4), strict=True):
        assert list(example.ids[:start]) == chat_ids(tokenizer, row.messages[:number], (), row.tools)


def test_a_row_with_an_impossible_declaration_can_be_skipped() -> None:
    bad: list[SlmError] = []
    rows = read_rows(write([{**OPENAI, "tools": [{"name": 3}]}, OPENAI], "jsonl"), bad)
    assert len(rows) == 1 and "line 1: tool 1 has no name" in bad[0].message


@pytest.mark.parametrize(
    ("rows", "declares"),
    [
        ([OPENAI, {"text": "x"}], True),
        ([{**OPENAI, "tools": None}, {"text": "x"}], False),
        ([{**OPENAI, "tools": None}, TRL], True),
        ([{"messages": [ASKED, SAID], "tools": TOOLS}], None),
        ([{"text": "x"}], None),
    ],
)
def test_whether_the_rows_declare_tools_is_recorded(rows: list[Any], declares: bool | None) -> None:
    assert _declares_tools(read_rows(write(rows, "jsonl"))) is declares
    assert declares_tools({"finetuned": {"declares_tools": declares}}) is (declares is not False)
