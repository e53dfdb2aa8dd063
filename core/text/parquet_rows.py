"""Parquet files, row by row, in bounded memory even if the encodings expand a few bytes to many."""

import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError
from slm.core.process_limits import memory_limited
from slm.core.text.csv_rows import MOST_COLUMNS
from slm.core.text.files import check_regular
from slm.core.text.streams import RAISE_LIMIT, after, size
from slm.core.text.value import Value

# Rows decoded together; fewer if they are long.
_ROWS = 1024
# Memory that decoding may take on top of the process's, because the fields of the file cannot be trusted.
_DECODING_BYTES = 1 << 30
_DECODING_LIMITS = 4  # at least this many times the limit of a row
_DAMAGED = "copy or download it again"


def read_parquet(
    file: Path, limit: int, columns: Collection[str] | None = None, unread: set[str] | None = None
) -> Iterator[Value]:
    """Yields the rows as dictionaries, without null values.

    Args:
        file: The file.
        limit: Maximum bytes of a row.
        columns: The columns to decode; None decodes all.
        unread: Receives the names of the other columns.

    Raises:
        SlmError: When the file cannot be read, has too many columns, or a row is longer than the limit.
    """
    import pyarrow

    check_regular(file)
    row = 0
    memory = max(_DECODING_BYTES, _DECODING_LIMITS * limit)
    try:
        with file.open("rb") as stream, _opened(stream, file, columns, memory) as (table, wanted, names):
            if unread is not None:
                unread.update(set(names) - set(wanted))
            for group in range(table.num_row_groups):
                together = _rows_together(table, group, wanted, limit)
                if not together:
                    raise SlmError(f"{file}{after('row', row)}: rows are longer than {size(limit)}", RAISE_LIMIT)
                for batch in _batches(table, group, wanted, together, memory):
                    for content in _rows(batch, limit):
                        row += 1
                        if content is None:
                            raise SlmError(f"{file}, row {row}: is longer than {size(limit)}", RAISE_LIMIT)
                        yield Value(f"row {row}", {key: value for key, value in content.items() if value is not None})
    except UnicodeDecodeError:
        raise SlmError(f"{file}{after('row', row)}: is not UTF-8 text", "write the file again") from None
    except MemoryError:
        raise SlmError(
            f"{file}{after('row', row)}: takes more than {size(memory)} of memory to read",
            "write it again with smaller row groups and rows",
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise SlmError(f"cannot read {file} ({reason[:200]})", _DAMAGED) from None


def column_names(file: Path) -> list[str]:
    """Returns the names of the columns.

    Raises:
        SlmError: When the file is not Parquet, or has too many columns.
    """
    import pyarrow

    check_regular(file)
    try:
        with file.open("rb") as stream, _opened(stream, file, (), _DECODING_BYTES) as (_, _, names):
            return names
    except (pyarrow.ArrowException, MemoryError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise SlmError(f"cannot read {file} ({reason[:200]})", _DAMAGED) from None


@contextmanager
def _opened(
    stream: io.BufferedReader, file: Path, columns: Collection[str] | None, memory: int
) -> Iterator[tuple[Any, list[str], list[str]]]:
    from pyarrow import parquet

    with _bounded(memory):
        opened = parquet.ParquetFile(stream, pre_buffer=False)
        metadata = opened.metadata
        if metadata.num_columns > MOST_COLUMNS:
            raise SlmError(f"{file} has more than {MOST_COLUMNS:,} columns", "keep the columns that are needed")
        names = list(opened.schema_arrow.names)
        wanted = [name for name in names if columns is None or name in columns]
        # A text that the file stores once for many rows is kept once here too.
        shared = _with_dictionaries(opened, wanted)
        if shared:
            stream.seek(0)
            opened = parquet.ParquetFile(stream, metadata=metadata, pre_buffer=False, read_dictionary=shared)
    yield opened, wanted, names


def _with_dictionaries(table: Any, wanted: Collection[str]) -> list[str]:
    found = set()
    for group in range(table.num_row_groups):
        chunks = table.metadata.row_group(group)
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            if (
                chunk.physical_type == "BYTE_ARRAY"
                and chunk.path_in_schema.split(".")[0] in wanted
                and any("DICTIONARY" in encoding for encoding in chunk.encodings)
            ):
                found.add(chunk.path_in_schema)
    return sorted(found)


def _rows_together(table: Any, group: int, wanted: list[str], limit: int) -> int:
    """Returns the number of rows of a group to decode at once; 0 if they are longer than the limit on average."""
    chunks = table.metadata.row_group(group)
    stored = sum(
        chunk.total_uncompressed_size
        for chunk in map(chunks.column, range(chunks.num_columns))
        if chunk.path_in_schema.split(".")[0] in wanted
    )
    average = max(1, stored // max(1, chunks.num_rows))
    # In a short column the headers are larger than the values.
    return max(min(_ROWS, limit // average), int(average < _DECODING_BYTES // _ROWS))


def _batches(table: Any, group: int, wanted: list[str], together: int, memory: int) -> Iterator[Any]:
    batches = table.iter_batches(together, row_groups=[group], columns=wanted, use_threads=False)
    while True:
        with _bounded(memory):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _rows(batch: Any, limit: int) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a batch; None for a row that is longer than the limit."""
    if sum(map(_cost, batch.columns)) <= limit:
        yield from batch.to_pylist()
    elif batch.num_rows == 1:
        yield None
    else:
        half = batch.num_rows // 2
        yield from _rows(batch.slice(0, half), limit)
        yield from _rows(batch.slice(half), limit)


def _cost(array: Any) -> int:
    """Returns an estimate of the bytes of values: the length of each text, and one byte for any other value."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        if len(array) == array.null_count:
            return len(array)
        lengths = compute.cast(compute.binary_length(array.dictionary), pyarrow.int64())
        return len(array) + (compute.sum(lengths.take(array.indices)).as_py() or 0)
    if isinstance(array, pyarrow.ExtensionArray):
        return _cost(array.storage)
    if pyarrow.types.is_struct(kind):
        return len(array) + sum(map(_cost, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return len(array) + _cost(array.flatten())
    if any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string,
                                   pyarrow.types.is_binary, pyarrow.types.is_large_binary)):  # fmt: skip
        return len(array) + (compute.sum(compute.cast(compute.binary_length(array), pyarrow.int64())).as_py() or 0)
    return len(array) + int(array.nbytes)


@contextmanager
def _bounded(memory: int) -> Iterator[None]:
    """Limits the memory of the process while a library decodes, if the system supports it."""
    import pyarrow

    # Arrow's allocator reserves a gigabyte of address space at first use, which would count.
    pyarrow.allocate_buffer(1)
    with memory_limited(memory):
        yield
