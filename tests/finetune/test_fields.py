"""Fields of other people's rows: understood, left out and named, or refused because they would change what is learned."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.finetune import rows as module
from slm.finetune.examples import Renderer
from slm.finetune.rows import ChatRow, CompletionRow, Limits, TextRow, instruction_row, read_rows

USER = {"role": "user", "content": "Hi."}
ANSWER = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "user", "content": "And?"}
SECOND = {"role": "assistant", "content": "Bye."}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(rows: Sequence[Mapping[str, Any]], form: str) -> Path:
    """Writes rows as a file of a kind; what is not text stands in CSV cells as JSON."""
    path = Path(f"rows.{form}")
    match form:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            path.write_text(json.dumps(rows))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
        case "csv":
            with path.open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow(rows[0])
                for row in rows:
                    table.writerow(
                        "" if cell is None else cell if isinstance(cell, str) else json.dumps(cell)
                        for cell in row.values()
                    )
    return path


def chat(*messages: Mapping[str, Any], only_read: Sequence[int] = ()) -> ChatRow:
    return ChatRow(tuple(messages), only_read=frozenset(only_read))  # type: ignore[arg-type]


TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
FORMS = ("jsonl", "json", "csv", "parquet")
UNDERSTOOD: dict[str, tuple[Mapping[str, Any], object]] = {
    "openai": (
        {"messages": [USER, ANSWER | {"weight": 0}, AGAIN, SECOND | {"weight": 1}]},
        chat(USER, ANSWER, AGAIN, SECOND, only_read=[1]),
    ),
    "last answer not learned": ({"messages": [USER, ANSWER, AGAIN, SECOND | {"weight": 0}]}, chat(USER, ANSWER)),
    "axolotl": (
        {
            "conversations": [
                {"from": "human", "value": "Hi.", "train": None},
                {"from": "gpt", "value": "Hello.", "train": False},
                {"from": "human", "value": "And?", "train": False},
                {"from": "gpt", "value": "Bye.", "train": True},
            ]
        },
        chat(USER, ANSWER, AGAIN, SECOND, only_read=[1]),
    ),
    "llama-factory sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
         "system": "Be brief.", "tools": "[]"},
        chat(SYSTEM, USER, ANSWER),
    ),
    "llama-factory alpaca": (
        {"instruction": "And?", "input": "", "output": "Bye.", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
        chat(SYSTEM, USER, ANSWER, AGAIN, SECOND),
    ),
    "system twice": ({"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."}, chat(SYSTEM, USER, ANSWER)),
    "empty system": (
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER], "system": " ", "tools": None},
        chat(USER, ANSWER),
    ),
    "developer": ({"messages": [SYSTEM | {"role": "developer"}, USER, ANSWER]}, chat(SYSTEM, USER, ANSWER)),
    "nulls": (
        {"messages": [USER | {"weight": None, "name": None}, ANSWER | {"tool_calls": None, "weight": None}],
         "system": None, "tools": None, "history": None, "text": None},
        chat(USER, ANSWER),
    ),
    "alpaca with text": (
        {"instruction": "Hi.", "input": "", "output": "Hello.", "text": "Below is an instruction. Hi. Hello."},
        instruction_row("Hi.", "", "Hello."),
    ),
    "dolly": (
        {"instruction": "Hi.", "context": "It is noon.", "response": "Hello.", "category": "chat"},
        instruction_row("Hi.", "It is noon.", "Hello."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_rows_of_other_tools_are_understood(name: str, form: str) -> None:
    row, want = UNDERSTOOD[name]
    if form == "csv":
        row = {key: value for key, value in row.items() if value is not None}
    if form == "parquet":  # a column of nulls only has no type to write, and none of text there
        row = {key: value for key, value in row.items() if value is not None or key in ("tools", "text")}
    assert read_rows(write([row, row], form)) == [want, want]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_conversations_of_prompt_and_completion_learn_the_completion(form: str) -> None:
    row = {"prompt": [USER, ANSWER, AGAIN], "completion": [SECOND]}
    assert read_rows(write([row], form)) == [chat(USER, ANSWER, AGAIN, SECOND, only_read=[1])]
    assert read_rows(write([{"prompt": "a", "completion": "b"}], form)) == [CompletionRow("a", "b")]


def test_content_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert read_rows(write([{"messages": [USER, ANSWER | {"content": parts}]}], "jsonl")) == [chat(USER, ANSWER)]


def test_nan_is_what_pandas_writes_for_null() -> None:
    Path("rows.jsonl").write_text(
        '{"instruction": "Hi.", "input": NaN, "output": "Hello.", "weight": NaN, "tools": NaN}\n'
    )
    assert read_rows(Path("rows.jsonl")) == [instruction_row("Hi.", "", "Hello.")]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_columns_of_other_kinds_may_be_empty(form: str) -> None:
    """A table has all columns in every row."""
    empty = {"messages": "", "prompt": "", "completion": "", "text": ""}
    rows = [
        empty | {"prompt": "a", "completion": "b"},
        empty | {"text": "c"},
        empty | {"messages": json.dumps([USER, ANSWER])},
    ]
    assert read_rows(write(rows, form)) == [CompletionRow("a", "b"), TextRow("c"), chat(USER, ANSWER)]


@pytest.mark.parametrize(
    "extra", [{"kto_tag": True}, {"label": True}, {"label": "poem"}, {"prompt": "Hi."}, {"text": "x"}]
)
def test_what_agrees_with_a_conversation_is_no_reason_to_refuse_it(extra: dict[str, Any]) -> None:
    assert read_rows(write([{"messages": [USER, ANSWER]} | extra], "jsonl")) == [chat(USER, ANSWER)]


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "tools": ({"messages": [USER, ANSWER], "tools": [{"function": {"name": "a b"}}]}, "tool 1 has the name 'a b'"),
    "tools as text": ({"messages": [USER, ANSWER], "tools": "[{]"}, "tools is text that is not valid JSON"),
    "tools twice": (
        {"messages": [USER, ANSWER], "tools": TOOLS, "functions": TOOLS},
        "'tools' and 'functions', which mean",
    ),
    "tools of a prompt": (
        {"prompt": "a", "completion": "b", "tools": TOOLS},
        "'tools' is not supported beside prompt and",
    ),
    "tools of a message": (
        {"messages": [USER | {"tools": TOOLS}, ANSWER]},
        "message 1: 'tools' is not supported: tools are",
    ),
    "images": ({"messages": [USER, ANSWER], "images": ["a.png"]}, "column 'images' is not supported: slm reads text"),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": ""},
        "a preference has chosen and rejected, and rejected",
    ),
    "kto": ({"prompt": "a", "completion": "b", "label": False}, "column 'label' is false"),
    "kto of a conversation": ({"messages": [USER, ANSWER], "label": False}, "column 'label' is false"),
    "kto tag": ({"messages": [USER, ANSWER], "kto_tag": False}, "column 'kto_tag' is false, which marks an answer not"),
    "system by another name": (
        {"system_message": "Be brief.", "messages": [USER, ANSWER]},
        "column 'system_message' is not supported: slm reads the system text from the column system",
    ),
    "documents": ({"messages": [USER, ANSWER], "documents": ["a"]}, "column 'documents' is not supported"),
    "context of a conversation": ({"messages": [USER, ANSWER], "context": "a"}, "'context' is not supported beside"),
    "input of prompt": ({"prompt": "a", "completion": "b", "input": "c"}, "'input' is not supported beside prompt"),
    "instruction of prompt": (
        {"instruction": "c", "prompt": "a", "completion": "b"},
        "column 'instruction' is not supported beside prompt and completion",
    ),
    "masked history": ({"messages": [USER, ANSWER], "mask_history": True}, "column 'mask_history' is not supported"),
    "masked": ({"messages": [USER, ANSWER | {"loss_mask": 0}, AGAIN, SECOND]}, "message 2: 'loss_mask' is not"),
    "thought": ({"messages": [USER, ANSWER | {"thoughts": "Hm."}]}, "message 2: 'thoughts' is not supported"),
    "two contents": ({"messages": [USER | {"value": "Ho."}, ANSWER]}, "message 1: 'content' and 'value' contradict"),
    "two roles": ({"messages": [USER, ANSWER | {"from": "human"}]}, "message 2: 'role' and 'from' contradict each"),
    "row weight": ({"instruction": "a", "output": "b", "weight": 0.5}, "column 'weight' is 0.5: rows cannot be"),
    "half": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "message 2: 'weight' is 0.5: only 0 and 1"),
    "none": ({"messages": [USER, ANSWER | {"weight": 0}]}, "nothing to learn: every answer has weight 0"),
    "user": ({"messages": [USER | {"train": True}, ANSWER]}, "message 1: 'train' is True in a user message"),
    "contradiction": ({"messages": [USER, ANSWER | {"train": True, "weight": 0}]}, "'weight' and 'train' contradict"),
    "result without a call": (
        {"messages": [USER, {"role": "tool", "content": "1"}, ANSWER]},
        "message 2: a result without a call before it",
    ),
    "call without a name": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "message 2: call 1 has no name",
    ),
    "call of a user": (
        {"messages": [USER | {"tool_calls": [CALL]}, ANSWER]},
        "message 1: 'tool_calls' in a message of the role",
    ),
    "call that is not declared": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [{"name": "g"}]},
        "message 2: call 1 names 'f', which is not declared",
    ),
    "call without a result": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, AGAIN, SECOND]},
        "message 2 has 1 call, and 0 results follow",
    ),
    "result of another call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [CALL | {"id": "1"}]},
                {"role": "tool", "tool_call_id": "2", "content": "x"},
                ANSWER,
            ]
        },
        "message 2: a result is of '2', which was not called",
    ),
    "reasoning": ({"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}, "'reasoning_content' is not supported"),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, ANSWER]},
        "message 1: a part of the content is 'image_url'",
    ),
    "two systems": ({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, "are different system texts"),
    "system of text": ({"text": "a", "system": "b"}, "column 'system' is not supported beside text"),
    "history of prompt": (
        {"prompt": "a", "completion": "b", "history": [["c", "d"]]},
        "column 'history' is not supported beside prompt",
    ),
    "history": (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "pair 1 of 'history' is not a question and an answer",
    ),
    "question": ({"question": "a", "answer": "b"}, "unknown kind of row (fields: question, answer)"),
    "two outputs": ({"instruction": "a", "output": "b", "response": "c"}, "has 'output' and 'response', which mean"),
}


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_result_is_refused_by_name(name: str, form: str) -> None:
    row, said = REFUSED[name]
    if form == "parquet" and name == "image part":
        pytest.skip("a column has one type, text or parts")
    path = write([row], form)
    with pytest.raises(SlmError) as error:
        read_rows(path)
    assert said in error.value.message and error.value.hint
    assert f"rows.{form}, {'line' if form == 'jsonl' else 'row'} 1" in error.value.message
    bad: list[SlmError] = []
    good = {"prompt": "a", "completion": "b"} if "prompt" in row and form == "parquet" else {"text": "fine"}
    assert len(read_rows(write([row, good], "jsonl"), bad)) == 1
    assert len(bad) == 1


def test_unknown_columns_are_told_how_to_be_renamed() -> None:
    with pytest.raises(SlmError) as error:
        read_rows(write([{"question": "a", "answer": "b"}], "csv"))
    assert error.value.hint and error.value.hint.startswith("rename question and answer to instruction and output")


@pytest.mark.parametrize("form", FORMS)
def test_harmless_columns_are_left_out_and_named(form: str) -> None:
    row = {"id": "7", "instruction": "Hi.", "output": "Hello.", "text": "Hi. Hello.", "source": "x", "tools": "[]"}
    left_out: set[str] = set()
    assert read_rows(write([row], form), left_out=left_out) == [instruction_row("Hi.", "", "Hello.")]
    assert left_out == {"id", "source", "text"}
    left_out.clear()
    read_rows(write([{"messages": [USER | {"name": "Ann"}, ANSWER]}], "jsonl"), left_out=left_out)
    assert left_out == {"name of messages"}


def test_answers_of_weight_0_are_read_and_not_learned(tokenizer: Tokenizer, config: ModelConfig) -> None:
    renderer = Renderer(tokenizer, config)
    rows = [{"messages": [USER, ANSWER | {"weight": weight}, AGAIN, SECOND]} for weight in (0, 1)]
    without, both = (renderer.example(row) for row in read_rows(write(rows, "jsonl")))
    assert without.ids == both.ids
    assert without.spans == both.spans[1:] and len(both.spans) == 2
    assert without.trained < both.trained
    read, learned = renderer.preview(without)
    assert not read[0] and "Hello." in read[1].replace("|", "")
    assert learned[0] and learned[1].replace("|", "") == "Bye.<end_of_turn><endoftext>"


def test_text_files_and_directories_are_rows_too() -> None:
    Path("d").mkdir()
    Path("d/b.txt").write_text("One.\n<|endoftext|>\nTwo.\n")
    Path("d/a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert read_rows(Path("d")) == [CompletionRow("a", "b"), TextRow("One."), TextRow("Two.")]
    Path("rows.txt").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SlmError, match="this one holds JSON") as error:
        read_rows(Path("rows.txt"))
    assert error.value.hint == "name it .jsonl"


def test_what_is_held_in_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([{"text": "x" * 100}] * 50, "jsonl")
    assert len(read_rows(path)) == 50
    with pytest.raises(SlmError, match=r"line 35: the rows take more than 10 KiB") as error:
        read_rows(path, limits=Limits(data=10 << 10))
    assert "--max-data-bytes" in (error.value.hint or "")
    with pytest.raises(SlmError, match="line 1: is longer than 50 bytes"):
        read_rows(path, limits=Limits(row=50))
    monkeypatch.setattr(module, "_MOST_BAD", 3)
    with pytest.raises(SlmError, match=r"more than 3 rows are wrong; the first: .*line 1"):
        read_rows(write([{}] * 5, "jsonl"), [])
