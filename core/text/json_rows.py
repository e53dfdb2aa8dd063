"""JSON lines and JSON arrays, value by value."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slm.core.errors import SlmError
from slm.core.text.streams import MARK, RAISE_LIMIT, TextFile, size
from slm.core.text.value import Value

_CHUNK = 1 << 20
# Longer rows are scanned before they are parsed: "[{},{},…" takes thirty times its length in memory.
_LOOKED_THROUGH = 1 << 20
# Maximum bytes outside of strings, as a share of the limit, so that parsed values stay near the limit.
_STRUCTURE = 16
# If the text ends within a value, the parser fails within this many characters of the end.
_NEAR_END = 16


def read_json(file: Path, limit: int) -> Iterator[Value]:
    """Yields the rows of a file with one value per line, or with one array.

    Yields an `SlmError` for a line that is not JSON.

    Raises:
        SlmError: When the file cannot be read, a row is longer than the limit, or an array is not JSON.
    """
    return _array(TextFile(file, limit)) if _begins_array(file) else _lines(TextFile(file, limit))


def parse(text: str, limit: int) -> Any:
    """Returns the value of a row or cell; an `SlmError` without a place if it is not JSON.

    Raises:
        SlmError: When the text has too many values.
    """
    _check_structure(text, limit)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = None
        if text.strip() in ("{", "[") or error.pos >= len(text.rstrip()):
            hint = "each line must hold a whole row, or the file one array: jq -c . FILE > NEW.jsonl"
        return SlmError(f"not JSON: {error.msg} (column {error.colno})", hint)
    except (RecursionError, ValueError) as error:  # nested a thousand levels deep, or a number with thousands of digits
        return _unreadable(error)


def _unreadable(error: Exception) -> SlmError:
    deep = isinstance(error, RecursionError)
    return SlmError(f"not JSON that can be read: {'nested too deep' if deep else 'a number is too long'}")


def _check_structure(text: str, limit: int) -> None:
    if len(text) <= _LOOKED_THROUGH:
        return
    data = text.encode().replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = np.frombuffer(data, np.uint8) == ord('"')
    outside = int(np.count_nonzero(np.cumsum(quotes, dtype=np.uint8) % 2 == 0))
    if outside > max(_LOOKED_THROUGH, limit // _STRUCTURE):
        raise SlmError("holds too many values", RAISE_LIMIT)


def _lines(source: TextFile) -> Iterator[Value]:
    for line in source.lines():
        line = line.lstrip(MARK)  # byte order marks of files that were joined
        if not line or line.isspace():
            continue
        try:
            content = parse(line, source.limit)
        except SlmError as error:
            raise source.error(error.message, error.hint) from None
        yield Value(f"line {source.number}", content)


def _begins_array(file: Path) -> bool:
    with TextFile(file).stream() as stream:
        while text := stream.read(_CHUNK):
            if begun := text.lstrip():
                return begun.startswith("[")
    return False


class _Buffer:
    """The text of an array that was read but not parsed yet."""

    def __init__(self, source: TextFile, stream: Any) -> None:
        self._source = source
        self._stream = stream
        self._text = ""
        self._place = 0
        self._ended = False
        self._decoder = json.JSONDecoder()
        source.number = 1

    def _read(self, characters: int) -> None:
        more = self._stream.read(characters)
        self._source.check_text(more)
        self._source.number += self._text.count("\n", 0, self._place)
        self._text = self._text[self._place :] + more
        self._place = 0
        self._ended = not more

    def next(self) -> str:
        """Returns the next character that is not white space, without consuming it; "" at the end."""
        while True:
            rest = len(self._text)
            while self._place < rest and self._text[self._place] in " \t\n\r":
                self._place += 1
            if self._place < rest:
                return self._text[self._place]
            if self._ended:
                return ""
            self._read(_CHUNK)

    def take(self) -> None:
        """Consumes the next character."""
        self._place += 1

    def value(self) -> Any:
        """Returns the next value."""
        while True:
            error = None
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as failure:
                error = failure
                if self._ended or not (failure.msg.startswith("Unterminated") or self._near_end(failure.pos)):
                    raise self.error(f"not JSON: {failure.msg}", failure.pos) from None
            except (RecursionError, ValueError) as failure:
                raise self.error(_unreadable(failure).message, self._place) from None
            else:
                if end < len(self._text) or self._ended:  # otherwise a number may continue
                    self._check_length(end)
                    self._place = end
                    return value
            self._check_length(len(self._text))
            self._read(max(_CHUNK, len(self._text) - self._place))
            # The whole buffer belongs to one value.
            try:
                _check_structure(self._text, self._source.limit) if error is not None else None
            except SlmError as failure:
                raise self.error(failure.message, self._place, failure.hint) from None

    def _near_end(self, place: int) -> bool:
        return place >= len(self._text) - _NEAR_END

    def _check_length(self, end: int) -> None:
        limit = self._source.limit
        length = end - self._place
        if length > limit or (length * 4 > limit and len(self._text[self._place : end].encode()) > limit):
            raise self.error(f"is longer than {size(limit)}", self._place, RAISE_LIMIT)

    def error(self, what: str, place: int | None = None, hint: str | None = None) -> SlmError:
        """Returns an error at a place in the text."""
        place = self._place if place is None else place
        line = self._source.number + self._text.count("\n", 0, place)
        return SlmError(f"{self._source.file}, line {line}: {what}", hint)


def _array(source: TextFile) -> Iterator[Value]:
    with source.stream() as stream:
        buffer = _Buffer(source, stream)
        buffer.next()
        buffer.take()
        number = 0
        while (found := buffer.next()) != "]" or number:
            if number:
                if found == "]":
                    break
                if found != ",":
                    raise buffer.error(
                        "not JSON: Expecting ',' delimiter" if found else "not JSON: the array has no end"
                    )
                buffer.take()
                buffer.next()
            number += 1
            yield Value(f"row {number}", buffer.value())
        buffer.take()
        if buffer.next():
            raise buffer.error("not JSON: there is something after the array")
