"""Files of rows as values: JSON lines, one JSON array, CSV or Parquet, each value with where it stands."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.files import check_readable, read_text

_WHAT = "fine-tuning data"
# A field of a CSV file may be as long as a file of text; the module's own limit is 128 KiB.
_LONGEST_FIELD = 1 << 30


@dataclass(frozen=True)
class Value:
    """What stands in a row.

    Attributes:
        place: Where: "line 7" of a file of lines, "row 7" of an array or a table.
        content: What, as JSON has it; an `SlmError` where it could not be read.
    """

    place: str
    content: Any


def read_values(path: Path, expected: str) -> Iterator[Value]:
    """Yields the values of a file; its name's ending says what it is, JSON where it says nothing.

    Args:
        path: The file.
        expected: What rows look like, for hints.

    Raises:
        SlmError: When the file cannot be read at all.
    """
    match path.suffix.lower():
        case ".parquet":
            return _parquet(path, expected)
        case ".csv" | ".tsv":
            return _csv(path, expected)
    return _json(path, expected)


def _json(path: Path, expected: str) -> Iterator[Value]:
    text = read_text(path, _WHAT).removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        rows = _parsed(text, expected)
        if isinstance(rows, SlmError):
            raise SlmError(f"{path}{rows.message}", rows.hint)
        for number, content in enumerate(rows, 1):
            yield Value(f"row {number}", content)
        return
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Value(f"line {number}", _parsed(line, expected))


def _parsed(text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        return SlmError(f"{line}: not JSON: {error.msg} (column {error.colno})", expected)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested thousands deep
        return SlmError(f": not JSON that can be read: {error}", expected)


def _csv(path: Path, expected: str) -> Iterator[Value]:
    """Yields the rows under a line of names; conversations stand in their cells as JSON."""
    text = read_text(path, _WHAT).removeprefix("\ufeff")
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # Where a quotation is not closed, nothing after it can be told apart.
            raise SlmError(f"{path}, {place}: not CSV: {error}", expected) from None
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            continue
        if len(cells) != len(names):
            count = f"{len(cells)} cell{'s' * (len(cells) != 1)} under {len(names)} names"
            yield Value(place, SlmError(f": {count}: {', '.join(names)}", expected))
            continue
        yield Value(place, {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)})


def _cell(name: str, cell: str) -> Any:
    if name in ("messages", "conversations"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet(path: Path, expected: str) -> Iterator[Value]:
    import pyarrow
    import pyarrow.parquet

    check_readable(path, _WHAT)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    # A table has every column in every row: what is null is not there.
                    yield Value(f"row {number}", {name: value for name, value in row.items() if value is not None})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SlmError(f"{path}: not Parquet that can be read: {reason[:200]}", expected) from None
