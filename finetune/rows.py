"""Reading rows to fine-tune on: JSON lines, or one JSON array, of three kinds of object."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.files import read_text

EXPECTED = (
    'each row is {"instruction": ..., "output": ...} with an optional "input", '
    '{"prompt": ..., "completion": ...} or {"text": ...}'
)


@dataclass(frozen=True)
class InstructionRow:
    """A request, what it is about, and the answer to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class CompletionRow:
    """A beginning, and the continuation to learn; neither is wrapped in anything."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TextRow:
    """A text to learn from its first word."""

    text: str


Row = InstructionRow | CompletionRow | TextRow

# Required fields, optional fields, fields that may not be empty.
_FORMATS: dict[type[Row], tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    InstructionRow: (("instruction", "output"), ("input",), ("instruction", "output")),
    CompletionRow: (("prompt", "completion"), (), ("completion",)),
    TextRow: (("text",), (), ("text",)),
}


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; each row is of its own kind.

    Raises:
        SlmError: When the file cannot be read, holds no row, or a row is not what is expected; it names the line of a
            JSONL file or the number of the row in an array.
    """
    rows = [_row(value, f"{path}, {place}") for place, value in _values(path)]
    if not rows:
        raise SlmError(f"there is no row in {path}", EXPECTED)
    return rows


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where each row stands and its JSON value."""
    text = read_text(path, "fine-tuning data").removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parse(text, f"{path}"), 1):
            yield f"row {number}", value
        return
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line, f"{path}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise SlmError(f"{where}{line}: not JSON: {error.msg} (column {error.colno})", EXPECTED) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        raise SlmError(f"{where}: not JSON that can be read: {error}", EXPECTED) from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: {_kind(value)} instead of an object", EXPECTED)
    fitting = [kind for kind, (required, _, _) in _FORMATS.items() if all(name in value for name in required)]
    if not fitting:
        names = ", ".join(map(repr, value)) or "no field"
        raise SlmError(f"{where}: has {names}, which is no kind of row", EXPECTED)
    if len(fitting) > 1:
        names = " and ".join(" + ".join(map(repr, _FORMATS[kind][0])) for kind in fitting)
        raise SlmError(f"{where}: has {names}, which are two kinds of row", "keep the fields of one kind")
    required, optional, filled = _FORMATS[fitting[0]]
    # An optional field may be null, as tables exported to JSON have it.
    fields = {name: _text(value[name], name, where) for name in required}
    fields |= {name: _text(value[name], name, where) if value.get(name) is not None else "" for name in optional}
    for name in filled:
        if not fields[name].strip():
            raise SlmError(f"{where}: {name!r} is empty", "remove the row or fill the field")
    return fitting[0](**fields)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise SlmError(f"{where}: {name!r} is {_kind(value)} instead of text", EXPECTED)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SlmError(f"{where}: {name!r} holds half of a surrogate pair", "write the character itself") from None
    return value


def _kind(value: Any) -> str:
    """Returns what JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
