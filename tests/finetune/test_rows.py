"""Reading rows: three kinds, two layouts, and every mistake with its line."""

import json
from pathlib import Path

import pytest

from slm.core.errors import SlmError
from slm.finetune.rows import CompletionRow, InstructionRow, TextRow, read_rows

GOOD = '{"text": "fine"}\n'


def write(text: str | bytes, name: str = "rows.jsonl") -> Path:
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_three_kinds_may_stand_in_one_file() -> None:
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
        InstructionRow("Add.", "1 1", "2"),
        InstructionRow("Name a colour.", "", "Blue."),
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
        ("{}", "line 2: has no field"),
        ('{"instruction": "only"}', "line 2: has 'instruction', which is no kind of row"),
        ('{"text": 3}', "line 2: 'text' is a number instead of text"),
        ('{"text": true}', "line 2: 'text' is true or false instead of text"),
        ('{"text": null}', "line 2: 'text' is null instead of text"),
        ('{"instruction": "a", "input": ["b"], "output": "c"}', "line 2: 'input' is an array instead of text"),
        ('{"text": " "}', "line 2: 'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"instruction": "a", "output": "\\n"}', "line 2: 'output' is empty"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "line 2: has 'prompt' + 'completion' and 'text'"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        ('{"text": ' + "9" * 5000 + "}", "line 2: not JSON that can be read"),
        ("[" * 100_000, "line 2: not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named_with_what_is_expected(bad: str, said: str) -> None:
    with pytest.raises(SlmError) as error:
        read_rows(write(GOOD + bad + "\n" + GOOD))
    assert f"rows.jsonl, {said}" in error.value.message
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
        (b"\xff\xfe\0", "not UTF-8"),
    ],
)
def test_a_file_without_rows_is_refused(content: str | bytes, said: str) -> None:
    with pytest.raises(SlmError, match=said):
        read_rows(write(content))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="not found"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(SlmError, match="is a directory"):
        read_rows(tmp_path)
