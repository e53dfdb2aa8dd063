"""Readers of documents, which never hold a whole file in memory.

In a `.txt` file a line `<|endoftext|>` ends a document, as in TinyStories; a file without one is a single document. In all
other kinds of files every row is a document: {"text": ...}, or the column `text`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.text.cuts import CUT
from slm.core.text.files import PARQUET, TEXT, find_files, kind
from slm.core.text.parquet_rows import column_names
from slm.core.text.rows import read_rows
from slm.core.text.streams import DOCUMENT_BYTES, MARK, RAISE_LIMIT, TextFile, size
from slm.core.tokenizer import END_OF_TEXT

TEXT_COLUMN = "text"

# Maximum characters read at once.
_CHUNK = 1 << 20
# Size of a batch of documents for a tokenizer: limits on characters and on documents.
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 256
_TAIL = 64 << 10


class Beginning(str):
    """A part of a document that continues in the next part; see `read_parts`."""

    __slots__ = ()


def read_documents(file: Path, column: str = TEXT_COLUMN, limit: int = DOCUMENT_BYTES) -> Iterator[str]:
    """Yields the documents of a file, without surrounding line breaks and without empty documents.

    Args:
        file: The file, of a kind that `find_files` finds.
        column: Name of the field that holds the text, in rows.
        limit: Maximum UTF-8 bytes of a document or row.

    Raises:
        SlmError: When the file cannot be read or is not UTF-8 text, a row has no such text, or a document is longer than the
            limit; the message names file and line.
    """
    return _read(file, column, limit, in_parts=False)


def read_parts(file: Path, column: str = TEXT_COLUMN, limit: int = DOCUMENT_BYTES) -> Iterator[str]:
    """Like `read_documents`, but yields a document of a text file that is longer than the limit in parts.

    All parts but the last are `Beginning`. They are cut before white space, and joined they are the document.
    """
    return _read(file, column, limit, in_parts=True)


def first_documents(parts: Iterator[str], count: int) -> Iterator[str]:
    """Yields the parts of the first documents, and consumes no more."""
    while count > 0 and (part := next(parts, None)) is not None:
        yield part
        count -= not isinstance(part, Beginning)


def whole(documents: Iterable[str], limit: int, why: str) -> Iterator[str]:
    """Yields documents, and rejects parts of documents.

    Args:
        documents: Documents from `read_parts`.
        limit: Maximum bytes of a whole document.
        why: The reason why whole documents are needed, for the message.

    Raises:
        SlmError: When there is a part of a document.
    """
    for document in documents:
        if isinstance(document, Beginning):
            raise SlmError(f"{why}, and one is longer than {size(limit)}", RAISE_LIMIT)
        yield document


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Returns the files of all paths; see `find_files`."""
    return [file for path in paths for file in find_files(path.expanduser())]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yields documents in batches of bounded size for a tokenizer."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read(file: Path, column: str, limit: int, *, in_parts: bool) -> Iterator[str]:
    if kind(file) == TEXT:
        return _text(TextFile(file, limit), in_parts)
    return _column(file, column, limit)


def _text(source: TextFile, in_parts: bool) -> Iterator[str]:
    parts: list[str] = []
    length, begun, split = 0, 1, False

    def ended() -> Iterator[str]:
        document = "".join(parts)
        document = document.rstrip("\r\n") if split else document.lstrip(f"{MARK}\r\n").rstrip("\r\n")
        if split or document.strip():
            yield document

    with source.stream() as stream:
        at_start = True
        while text := stream.readline(_CHUNK):
            line = source.number + 1
            if "\0" in text:
                source.number = line
                source.check_text(text)
            ended_line = text.endswith("\n")
            source.number += ended_line
            if at_start and END_OF_TEXT in text and text.strip().lstrip(MARK).lstrip() == END_OF_TEXT:
                yield from ended()
                parts, length, begun, split = [], 0, line + 1, False
                at_start = ended_line
                continue
            at_start = ended_line
            parts.append(text)
            length += len(text) if text.isascii() else len(text.encode())
            if length > source.limit:
                if not in_parts:
                    raise SlmError(
                        f"{source.file}, line {begun}: the document that begins here is longer than {size(source.limit)}",
                        f"a line {END_OF_TEXT} ends a document; {RAISE_LIMIT}",
                    )
                document = "".join(parts) if split else "".join(parts).lstrip(f"{MARK}\r\n")
                cut = _last_cut(document)
                if cut is not None:
                    yield Beginning(document[:cut])
                    document, split = document[cut:], True
                parts, length = [document], len(document.encode())
                if length > source.limit:
                    source.number = line
                    raise source.error(f"no white space within {size(source.limit)}", RAISE_LIMIT)
    yield from ended()


def _last_cut(text: str) -> int | None:
    tail = _TAIL
    while True:
        start = max(0, len(text) - tail)
        cuts = [match.start() for match in CUT.finditer(text, start)]
        if cuts or not start:
            return cuts[-1] if cuts else None
        tail *= 8


def _column(file: Path, column: str, limit: int) -> Iterator[str]:
    other = "--column NAME reads another column"
    if kind(file) == PARQUET and column not in (names := column_names(file)):
        shown = ", ".join(names[:20]) or "none"
        raise SlmError(f'{file} has no column "{column}"', f"{other}; there is {shown}")
    for value in read_rows(file, limit, columns=(column,)):
        where = f"{file}, {value.place}"
        content = value.content
        if isinstance(content, SlmError):
            raise SlmError(f"{where}: {content.message}", content.hint)
        # Null means absent.
        if not isinstance(content, dict) or not isinstance(content.get(column), str):
            there = content.get(column) if isinstance(content, dict) else None
            what = f'"{column}" is not text' if there is not None else f'is not a row with a "{column}"'
            raise SlmError(f"{where}: {what}", f'each row is such as {{"{column}": "Once upon a time"}}; {other}')
        document = content[column]
        try:
            encoded = document.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is not a character
            raise SlmError(f"{where}: holds half of a surrogate pair", "write the character itself") from None
        del encoded
        document = document.strip("\r\n")
        if document.strip():
            yield document
