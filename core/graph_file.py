"""Which files a graph reads its weights from, told without the onnx package.

An answering machine has no onnx package, and onnxruntime before 1.29 follows a graph wherever it points. Only the fields on the
way to a tensor's `external_data` are looked at; the rest is passed over. Layout: onnx/onnx.proto of onnx 1.19, and
https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

from slm.core.errors import SlmError

# By message, which fields hold messages that may lead to a tensor, and what they are.
_WAYS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_KEY, _VALUE = 1, 2
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
# protobuf's own limit.
_DEEPEST = 100


def external_files(path: Path) -> set[str]:
    """Returns the names of the files that hold weights of a graph, as it spells them.

    Raises:
        SlmError: When it is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return {name.decode() for name in _locations(data, 0, len(data), "Model", 0)}
    except (ValueError, OSError) as error:  # an empty file cannot be mapped
        raise SlmError(f"not an ONNX file: {path} ({error})", "copy or export the bundle again") from None


def _locations(data: mmap, start: int, stop: int, kind: str, depth: int) -> Iterator[bytes]:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    key, value = b"", b""
    for number, first, end in _fields(data, start, stop):
        if number in _WAYS[kind]:
            yield from _locations(data, first, end, _WAYS[kind][number], depth + 1)
        elif kind == "Entry" and number == _KEY:
            key = data[first:end]
        elif kind == "Entry" and number == _VALUE:
            value = data[first:end]
    if key == b"location":
        yield value


def _fields(data: mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, beginning and end of each field whose length is stated."""
    while at < stop:
        tag, at = _varint(data, at, stop)
        number, form = tag >> 3, tag & 7
        if form == _BYTES:
            size, at = _varint(data, at, stop)
            if size > stop - at:
                raise ValueError("it ends before what it states")
            yield number, at, at + size
            at += size
        elif form == _VARINT:
            _, at = _varint(data, at, stop)
        elif form in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if form == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of form {form}")


def _varint(data: mmap, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it ends before what it states")
