"""Reading rows: three kinds, two layouts, and every mistake with its line."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from slm.core.errors import SlmError
from slm.finetune.rows import ChatRow, CompletionRow, TextRow, instruction_row, read_rows

GOOD = '{"text": "fine"}\n'


def chat(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]})


def write(text: str | bytes, name: str = "rows.jsonl") -> Path:
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_kinds_may_stand_in_one_file() -> None:
    rows = read_rows(
        write(
            '{"instruction": "Add.", "input": "1 1", "output": "2"}\n'
            '{"instruction": "Name a colour.", "output": "Blue.", "input": null, "id": 7}\n'
            "\n"
            '{"prompt": "", "completion": " blue."}\n'
            '{"text": "Once."}'
        )
    )
    assert rows == [
        instruction_row("Add.", "1 1", "2"),
        instruction_row("Name a colour.", "", "Blue."),
        CompletionRow("", " blue."),
        TextRow("Once."),
    ]


def test_an_array_holds_the_same_rows() -> None:
    rows = [{"text": "a"}, {"prompt": "b", "completion": "c"}]
    lines = "\ufeff" + "\r\n".join(map(json.dumps, rows))
    assert read_rows(write(json.dumps(rows, indent=2), "rows.json")) == read_rows(write(lines))


def test_a_line_separator_inside_a_string_ends_no_line() -> None:
    assert read_rows(write('{"text": "one\u2028two"}')) == [TextRow("one\u2028two")]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"text": "no end}', "line 2: not JSON"),
        ("[1]", "line 2: an array instead of an object"),
        ('"text"', "line 2: text instead of an object"),
        ("{}", "line 2: unknown kind of row (fields: none)"),
        ('{"instruction": "only"}', "line 2: unknown kind of row (fields: instruction)"),
        ('{"text": 3}', "line 2: 'text' is a number instead of text"),
        ('{"text": true}', "line 2: 'text' is true or false instead of text"),
        ('{"text": null}', "line 2: unknown kind of row (fields: none)"),
        ('{"instruction": "a", "input": ["b"], "output": "c"}', "line 2: 'input' is an array instead of text"),
        ('{"text": " "}', "line 2: 'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"instruction": "a", "output": "\\n"}', "line 2: 'output' is empty"),
        (
            '{"instruction": "a", "output": "b", "prompt": "b", "completion": "c"}',
            "line 2: has 'instruction' + 'output' and 'prompt' + 'completion', which are 2 kinds of row",
        ),
        ('{"messages": "Hi"}', "line 2: 'messages' is text instead of an array of messages"),
        ('{"messages": []}', "line 2: no message of the assistant's"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message of the assistant's"),
        ('{"messages": [1]}', "line 2, message 1: a number instead of an object"),
        ('{"messages": [{"role": "user"}]}', "line 2, message 1: has 'role' instead of 'role' and 'content'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "line 2, message 1: unknown role 'bot'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "line 2, message 1: 'content' is empty"),
        (
            '{"messages": [{"role": "assistant", "content": null}]}',
            "line 2, message 1: has 'role' instead of 'role' and 'content'",
        ),
        (chat("user", "assistant", "assistant"), "line 2, message 3: two assistant messages in a row"),
        (chat("user", "assistant", "system"), "line 2: a system message comes after the first message"),
        ('{"conversations": [{"from": "gpt", "text": "a"}]}', "line 2, message 1: has 'from', 'text' instead of"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        ('{"text": ' + "9" * 5000 + "}", "line 2: not JSON that can be read"),
        ("[" * 100_000, "line 2: not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named_with_what_is_expected(bad: str, said: str) -> None:
    with pytest.raises(SlmError) as error:
        read_rows(write(GOOD + bad + "\n" + GOOD))
    assert f"rows.jsonl, {said}" in error.value.message
    skipped: list[SlmError] = []
    assert read_rows(write(GOOD + bad + "\n" + GOOD), skipped) == [TextRow("fine"), TextRow("fine")]
    assert [each.message for each in skipped] == [error.value.message]
    assert error.value.hint and "\n" not in error.value.message


def test_a_bad_row_of_an_array_is_named_by_number() -> None:
    with pytest.raises(SlmError, match=r"rows\.json, row 2: 'text' is a number"):
        read_rows(write('[{"text": "a"},\n\n{"text": 1}]', "rows.json"))
    with pytest.raises(SlmError, match=r"rows\.json, line 3: not JSON"):
        read_rows(write('[{"text": "a"},\n\n{"text" 1}]', "rows.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "there is no row in"),
        ("\n \n", "there is no row in"),
        ("[]", "there is no row in"),
        (b"\xff\xfe\0", "is UTF-16 text"),
        (b"\xff\xff", "not UTF-8"),
    ],
)
def test_a_file_without_rows_is_refused(content: str | bytes, said: str) -> None:
    with pytest.raises(SlmError, match=said):
        read_rows(write(content))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="not found"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(SlmError, match=r"no \.txt, \.jsonl or \.parquet file"):
        read_rows(tmp_path)


MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"messages": [m | {"role": "model"} if m["role"] == "assistant" else m for m in MESSAGES]},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
            ]
        },
    ],
)
def test_a_conversation_may_be_written_in_several_ways(row: dict[str, object]) -> None:
    assert read_rows(write(json.dumps(row))) == [ChatRow(MESSAGES)]  # type: ignore[arg-type]


TABLES = {
    "text": [{"text": 'one, "two"\nthree'}, {"text": "four"}],
    "completion": [{"prompt": "", "completion": " a"}, {"prompt": "b", "completion": " c"}],
    "instruction": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    ],
    "messages": [{"messages": list(MESSAGES)}, {"messages": list(MESSAGES[1:])}],
    "conversations": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_tables_hold_the_same_rows(kind: str, form: str) -> None:
    rows = TABLES[kind]
    path = Path(f"rows.{form}")
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file, delimiter="," if form == "csv" else "\t")
            table.writerow(rows[0])
            table.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)
    assert read_rows(path) == read_rows(write("".join(json.dumps(row) + "\n" for row in rows)))


def test_a_table_may_have_other_columns_and_holes() -> None:
    rows = [{"id": 1, "instruction": "a", "input": None, "output": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    assert read_rows(Path("rows.parquet")) == [instruction_row("a", "", "b")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('text\nfine\n"two\nlines"\n" "\n', "rows.csv, line 5: 'text' is empty"),
        ("text\nfine\na,b\n", "rows.csv, line 3: 2 cells under 1 names: text"),
        ("prompt,completion\na\n", "rows.csv, line 2: 1 cell under 2 names: prompt, completion"),
        ("a,b\nc,d\n", "rows.csv, line 2: unknown kind of row (fields: a, b)"),
        ('messages\n"no json"\n', "rows.csv, line 2: 'messages' is text instead of an array"),
        ('text\n"not closed\n', "rows.csv, line 2: not CSV"),
        ("text\n", "there is no row in rows.csv"),
        ("", "there is no row in rows.csv"),
    ],
)
def test_a_bad_line_of_a_table_is_named(text: str, said: str) -> None:
    with pytest.raises(SlmError) as error:
        read_rows(write(text, "rows.csv"))
    assert said in error.value.message


def test_a_bad_row_of_parquet_is_named_and_a_bad_file_too() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), "rows.parquet")
    with pytest.raises(SlmError, match=r"rows\.parquet, row 2: unknown kind of row"):
        read_rows(Path("rows.parquet"))
    write("text\n", "rows.parquet")
    with pytest.raises(SlmError, match=r"cannot read rows\.parquet"):
        read_rows(Path("rows.parquet"))
    with pytest.raises(SlmError, match="data not found"):
        read_rows(Path("none.parquet"))
