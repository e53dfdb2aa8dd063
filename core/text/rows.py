"""The reader of rows for all commands and all kinds of files."""

from collections.abc import Collection, Iterator
from pathlib import Path

from slm.core.text.csv_rows import read_csv
from slm.core.text.files import PARQUET, kind
from slm.core.text.json_rows import read_json
from slm.core.text.parquet_rows import read_parquet
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.text.value import Value


def read_rows(
    file: Path,
    limit: int = DOCUMENT_BYTES,
    *,
    columns: Collection[str] | None = None,
    unread: set[str] | None = None,
) -> Iterator[Value]:
    """Yields the rows of a JSON, CSV, TSV or Parquet file, compressed or not.

    Args:
        file: The file; its suffix determines the kind.
        limit: Maximum UTF-8 bytes of a row.
        columns: The needed columns; other columns of a Parquet file are not decoded. None needs all.
        unread: Receives the names of columns that were not decoded.

    Raises:
        SlmError: When the file cannot be read, or a row is longer than the limit.
    """
    match kind(file):
        case "" | ".jsonl" | ".ndjson" | ".json":
            return read_json(file, limit)
        case ".csv":
            return read_csv(file, ",", limit)
        case ".tsv":
            return read_csv(file, "\t", limit)
    assert kind(file) == PARQUET
    return read_parquet(file, limit, columns, unread)
