"""Reading documents out of text and JSONL files, one after the other, never a whole corpus at once.

In a `.txt` file a line `<|endoftext|>` ends a document, as in the dumps of TinyStories; without one the file is one
document. In a `.jsonl` file every row is a document: {"text": ...}. Either may be compressed (.gz, .xz).
"""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT

_SUFFIXES = (".txt", ".jsonl")
_OPEN: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}
_WHAT_FITS = "slm trains on .txt and .jsonl files (.gz and .xz too) and directories of them"


def find_files(path: Path) -> list[Path]:
    """Returns the text files that a path means: itself, or everything readable below a directory, sorted.

    Raises:
        SlmError: When it does not exist, is not text by its name, or a directory holds nothing of the kind.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in _SUFFIXES)
        if not found:
            raise SlmError(f"no .txt or .jsonl file in {path}", _WHAT_FITS)
        return found
    if not path.exists():
        raise SlmError(f"data not found: {path}", f"check the path; {_WHAT_FITS}")
    if _kind(path) not in _SUFFIXES:
        raise SlmError(f"not a kind of file to train on: {path}", _WHAT_FITS)
    return [path]


def read_documents(file: Path) -> Iterator[str]:
    """Yields the documents of a file, line breaks around them removed; empty ones are left out.

    Raises:
        SlmError: When the file cannot be read, is not UTF-8 text, or a row is not {"text": ...}; it and the line are named.
    """
    lines = _Lines(file)
    documents = _json_documents(lines) if _kind(file) == ".jsonl" else _text_documents(lines)
    return (document for document in documents if document.strip())


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
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise SlmError(f"cannot decompress {self.file} ({error})", "copy or download it again") from None
        except OSError as error:
            raise SlmError(f"cannot read {self.file} ({error.strerror})", "check its permissions") from None

    def error(self, what: str, hint: str | None = None, *, after: bool = False) -> SlmError:
        """Returns a complaint about the current line, or about what comes after it."""
        return SlmError(f"{self.file}, {'after ' if after else ''}line {self.number}: {what}", hint)


def _text_documents(lines: _Lines) -> Iterator[str]:
    parts: list[str] = []
    for line in lines:
        if line.strip() == END_OF_TEXT:
            yield "".join(parts).strip("\r\n")
            parts = []
        else:
            parts.append(line)
    yield "".join(parts).strip("\r\n")


def _json_documents(lines: _Lines) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise lines.error(f"is not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise lines.error(
                'is not a row with a "text"', 'each line is an object such as {"text": "Once upon a time"}'
            )
        try:
            row["text"].encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            raise lines.error("holds half of a surrogate pair") from None
        yield row["text"].strip("\r\n")
