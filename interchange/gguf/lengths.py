"""A check of the lengths in a GGUF file, before the gguf package trusts them.

The package reads an array of 2^60 numbers from a file of a kilobyte one by one, without noticing the end of the file.
Layout: ggml-org/ggml, docs/gguf.md.
"""

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

MAGIC = b"GGUF"
# Bytes of each type of value; strings and arrays state their own length.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


def check_lengths(path: Path) -> None:
    """Checks the metadata and the list of tensors.

    Raises:
        ValueError: When a length exceeds the file, or a type is unknown.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        _Walk(data).whole()


class _Walk:
    def __init__(self, data: mmap) -> None:
        self._data = data
        self._at = 0

    def whole(self) -> None:
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        self._skip(4)
        if self._number("I") not in (2, 3):  # the other byte order, or a version older than 64-bit lengths
            raise ValueError("its version is neither 2 nor 3")
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in range(self._bounded(fields, at_least=13)):
            self._string()
            self._value(self._number("I"))
        for _ in range(self._bounded(tensors, at_least=24)):
            self._string()
            dimensions = self._number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            self._skip(8 * dimensions + 12)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element in _SIZES:
                self._skip(count * _SIZES[element])
            elif element == _STRING:
                for _ in range(self._bounded(count, at_least=8)):
                    self._string()
            else:
                raise ValueError(f"an array of kind {element}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"a value of kind {kind}")

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, form: str) -> int:
        size = struct.calcsize(f"<{form}")
        at = self._at
        self._skip(size)
        (value,) = struct.unpack_from(f"<{form}", self._data, at)
        return int(value)

    def _bounded(self, count: int, at_least: int) -> int:
        """Returns a count after checking that the file can hold that many values of a minimum size."""
        if count * at_least > len(self._data) - self._at:
            raise ValueError("it ends before what it states")
        return count

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError("it ends before what it states")
        self._at += size
