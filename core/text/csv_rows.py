"""CSV and TSV files, row by row."""

import csv
from collections.abc import Iterator
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.text.streams import RAISE_LIMIT, TextFile, size
from slm.core.text.value import Value

# Maximum number of columns: a header of a few MiB could name millions.
MOST_COLUMNS = 10_000


class _Lines:
    """The lines of a table, with the size of the current row."""

    def __init__(self, source: TextFile) -> None:
        self._source = source
        self._lines = source.lines(newline="")
        self.begun = 1
        self.bytes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.bytes += len(line) if line.isascii() else len(line.encode())
        if self.bytes > self._source.limit:
            raise SlmError(
                f"{self._source.file}, line {self.begun}: is a row longer than {size(self._source.limit)}",
                f"check its quotation marks; {RAISE_LIMIT}",
            )
        return line


def read_csv(file: Path, delimiter: str, limit: int) -> Iterator[Value]:
    """Yields the rows below the header as texts by column name; an `SlmError` for a row with another number of cells.

    Raises:
        SlmError: When the file cannot be read or is not CSV, or a row is longer than the limit.
    """
    lines = _Lines(TextFile(file, limit))
    csv.field_size_limit(max(limit, 1 << 20))  # a limit of the whole process; rows have their own
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        lines.begun, lines.bytes = reader.line_num + 1, 0
        place = f"line {lines.begun}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # After an unclosed quotation no further row can be recognized.
            raise SlmError(f"{file}, {place}: not CSV: {error}") from None
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) > MOST_COLUMNS:
            raise SlmError(f"{file}, {place}: more than {MOST_COLUMNS:,} columns", "keep the columns that are needed")
        if names is None:
            names = [cell.strip() for cell in cells]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise SlmError(f"{file}, {place}: two columns are called {twice!r}", "rename one of them")
            continue
        if len(cells) != len(names):
            count = f"{len(cells)} cell{'s' * (len(cells) != 1)} under {len(names)} names"
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            yield Value(place, SlmError(f"{count}: {shown}"))
            continue
        yield Value(place, dict(zip(names, cells, strict=True)))
