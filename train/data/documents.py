"""Reading documents out of text, JSONL and Parquet files, one after the other, never a whole file at once.

In a `.txt` file a line `<|endoftext|>` ends a document, as in the dumps of TinyStories; without one the file is one
document. In a `.jsonl` file every row is a document: {"text": ...}. Either may be compressed (.gz, .xz, .zst). In a
`.parquet` file, which compresses itself, every row is a document too.
"""

import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TextIO

from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT
from slm.train.data.dataset import is_dataset

TEXT_COLUMN = "text"
OTHER_COLUMN = "slm data prepare --column NAME reads another one"

_COMPRESSIBLE = (".txt", ".jsonl")
_PARQUET = ".parquet"


def _open_zst(file: Path, mode: Literal["rt"], encoding: str) -> TextIO:
    # Here, for an edge device that reads text has no need of it.
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.open(file, mode, encoding=encoding)


_OPEN: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}
_WHAT_FITS = "slm trains on .txt and .jsonl files (.gz, .xz and .zst too), .parquet files, and directories of them"
# Rows of a Parquet file that are held at once.
_ROWS = 1024


def find_files(path: Path) -> list[Path]:
    """Returns the text files that a path means: itself, or everything readable below a directory, sorted.

    Raises:
        SlmError: When it does not exist, is not text by its name, or a directory holds nothing of the kind.
    """
    if is_dataset(path):
        raise SlmError(
            f"a prepared dataset is no text: {path}",
            "it stands alone in slm train --data; elsewhere name the text that it was made from",
        )
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _fits(file))
        if not found:
            raise SlmError(f"no .txt, .jsonl or .parquet file in {path}", _WHAT_FITS)
        return found
    if not path.exists():
        raise SlmError(f"data not found: {path}", f"check the path; {_WHAT_FITS}")
    if not _fits(path):
        raise SlmError(f"not a kind of file to train on: {path}", _WHAT_FITS)
    return [path]


def read_documents(file: Path, column: str = TEXT_COLUMN) -> Iterator[str]:
    """Yields the documents of a file, line breaks around them removed; empty ones are left out.

    Args:
        file: The file, of one of the kinds that `find_files` finds.
        column: What the text is called in rows.

    Raises:
        SlmError: When the file cannot be read, is not UTF-8 text, or a row has no such text; file and line are named.
    """
    if _kind(file) == _PARQUET:
        documents = _parquet_documents(file, column)
    elif _kind(file) == ".jsonl":
        documents = _json_documents(_Lines(file), column)
    else:
        documents = _text_documents(_Lines(file))
    return (document for document in documents if document.strip())


def _fits(file: Path) -> bool:
    return _kind(file) in _COMPRESSIBLE or file.suffix == _PARQUET


def _kind(file: Path) -> str:
    """Returns the suffix that says what is inside, below a compression's."""
    return (Path(file.stem) if file.suffix in _OPEN else file).suffix


class _Lines:
    """The lines of a file and the number of the current one; every failure to read them is an SlmError."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        try:
            with _OPEN.get(self.file.suffix, open)(self.file, "rt", encoding="utf-8") as stream:
                for self.number, line in enumerate(stream, 1):
                    if "\0" in line:
                        raise self.error("is not text: it holds a zero byte")
                    yield line
        except UnicodeDecodeError:
            raise self.error("is not UTF-8 text", "convert it, for example with iconv", after=True) from None
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from None
        except OSError as error:
            raise SlmError(f"cannot read {self.file} ({error.strerror})", "check its permissions") from None
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # of a package that may not be there
                raise self._damaged(error) from None
            raise

    def _damaged(self, error: Exception) -> SlmError:
        return SlmError(f"cannot decompress {self.file} ({error})", "copy or download it again")

    def error(self, what: str, hint: str | None = None, *, after: bool = False) -> SlmError:
        """Returns a complaint about the current line, or about what comes after it."""
        return SlmError(f"{self.file}{_after('line', self.number) if after else f', line {self.number}'}: {what}", hint)


def _after(unit: str, number: int) -> str:
    """Says after which line or row something is; nothing where that would be the first."""
    return f", after {unit} {number}" if number else ""


def _text_documents(lines: _Lines) -> Iterator[str]:
    parts: list[str] = []
    for line in lines:
        if line.strip() == END_OF_TEXT:
            yield "".join(parts).strip("\r\n")
            parts = []
        else:
            parts.append(line)
    yield "".join(parts).strip("\r\n")


def _json_documents(lines: _Lines, column: str) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise lines.error(f"is not JSON ({error.msg})") from None
        except (RecursionError, ValueError):  # nested a thousand deep, or a number of thousands of digits
            raise lines.error("cannot be read: nested too deep, or a number too long") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise lines.error(
                f'is not a row with a "{column}"',
                f'each line is an object such as {{"{column}": "Once upon a time"}}; {OTHER_COLUMN}',
            )
        document = row[column]
        try:
            document.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            raise lines.error("holds half of a surrogate pair") from None
        yield document.strip("\r\n")


def _parquet_documents(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with file.open("rb") as stream, parquet.ParquetFile(stream) as table:
            if column not in table.schema_arrow.names:
                there = ", ".join(table.schema_arrow.names) or "none"
                raise SlmError(f'{file} has no column "{column}"', f"{OTHER_COLUMN}; there is {there}")
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for row, document in enumerate(batch.column(0).to_pylist(), row + 1):  # noqa: B020
                    if not isinstance(document, str):
                        raise SlmError(f'{file}, row {row}: "{column}" is not text', OTHER_COLUMN)
                    yield document.strip("\r\n")
    except UnicodeDecodeError:
        raise SlmError(f"{file}{_after('row', row)}: is not UTF-8 text", "write the file again") from None
    except pyarrow.ArrowException as error:
        raise SlmError(f"cannot read {file} ({' '.join(str(error).split())})", "copy or download it again") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise SlmError(f"cannot read {file} ({reason})", "copy or download it again") from None
