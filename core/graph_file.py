"""Parses `.onnx` files without the onnx package, which is not installed on devices.

onnxruntime before 1.29 reads a graph's `external_data` from any path, and every version runs any operator. `external_files`
finds all such paths; `read_graph` returns nodes and tensors for `slm.core.graph_check`. The format is onnx/onnx.proto of onnx
1.19, encoded as in https://protobuf.dev/programming-guides/encoding/.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError

# For each type of message: the fields whose messages can contain a tensor, and the types of these messages.
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
# `struct` formats of protobuf's fixed-length numbers, such as an attribute's float.
_FIXED = {_EIGHT_BYTES: "<d", _FOUR_BYTES: "<f"}
# The limit of nested messages, which is also protobuf's.
_DEEPEST = 100
# The limit of nodes and tensors. A model of 1,024 layers has about 60,000.
_MAX_ENTRIES = 200_000
# The limit of a tensor's bytes in the graph itself, where slm stores only constants.
_MAX_RAW = 1 << 20
# The bits of an element and its `struct` format, by ONNX type number.
_ELEMENTS = {
    1: (32, "f"),
    2: (8, "B"),
    3: (8, "b"),
    6: (32, "i"),
    7: (64, "q"),
    9: (8, "?"),
    10: (16, "e"),
    21: (4, ""),
    22: (4, ""),
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor. Its data is `raw`, or `external` (a file name, an offset, and a length or None)."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: bytes = b""
    external: tuple[str, int, int | None] | None = None

    @property
    def bytes(self) -> int | None:
        """The size in bytes that follows from the shape; None if slm does not write this type."""
        if self.dtype not in _ELEMENTS or min(self.shape, default=0) < 0:
            return None
        return -(-math.prod(self.shape) * _ELEMENTS[self.dtype][0] // 8)

    def numbers(self) -> tuple[Any, ...] | None:
        """Returns the elements of a tensor; None if its data is not in the graph."""
        if self.external is not None or not self.raw or self.bytes != len(self.raw) or not _ELEMENTS[self.dtype][1]:
            return None
        return struct.unpack(f"<{math.prod(self.shape)}{_ELEMENTS[self.dtype][1]}", self.raw)


@dataclass
class FileNode:
    """A node. Attributes are numbers, strings, lists of integers, tensors, or graphs of nodes without graphs of their own.

    `extras` names its unsupported parts.
    """

    type: str = ""
    domain: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)


@dataclass
class FileGraph:
    """A graph. `extras` names its unsupported parts: everything except nodes, tensors, inputs and outputs."""

    opsets: dict[str, int] = field(default_factory=dict)
    nodes: list[FileNode] = field(default_factory=list)
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)


def read_graph(path: Path) -> FileGraph:
    """Returns the nodes and tensors of a graph, with the data of small tensors.

    Raises:
        SlmError: If the file is not an ONNX file, or has more nodes and tensors than graphs that slm writes.
    """
    found = FileGraph()
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            _read_model(data, found)
    except (ValueError, OSError, struct.error) as error:
        raise SlmError(f"not an ONNX file: {path} ({error})", "copy or export the bundle again") from None
    return found


def _read_model(data: mmap, found: FileGraph) -> None:
    graphs = 0
    for number, form, value in _all_fields(data, 0, len(data)):
        if number == 7 and form == _BYTES:
            graphs += 1
            _read_graph(data, value[0], value[1], found, [_MAX_ENTRIES])
        elif number == 8 and form == _BYTES:
            fields = {n: v for n, _, v in _all_fields(data, *value)}
            domain = _words(data, fields.get(1, (0, 0)))
            found.opsets["" if domain == "ai.onnx" else domain] = _signed(fields.get(2, 0))
        elif number in (20, 25):
            found.extras.append("training information" if number == 20 else "a function")
    if graphs != 1:
        raise ValueError(f"it has {graphs} graphs")


def _read_graph(data: mmap, start: int, stop: int, found: FileGraph, entries: list[int], inside: bool = False) -> None:
    """Reads a graph. `entries` is the number of nodes and tensors that it and the graphs after it may have."""
    for number, form, value in _all_fields(data, start, stop):
        if form != _BYTES:
            continue
        entries[0] -= 1
        if entries[0] < 0:
            raise ValueError(f"it has more than {_MAX_ENTRIES:,} entries")
        if number == 1:
            found.nodes.append(_read_node(data, value[0], value[1], entries, inside))
        elif number == 5:
            tensor = _read_tensor(data, *value)
            if tensor.name in found.tensors:
                raise ValueError(f"it has two tensors named {tensor.name!r}")
            found.tensors[tensor.name] = tensor
        elif number in (11, 12):
            names = [_words(data, v) for n, f, v in _all_fields(data, *value) if n == 1 and f == _BYTES]
            (found.inputs if number == 11 else found.outputs).append(names[-1] if names else "")
        elif number in (14, 15):
            found.extras.append("quantization annotations" if number == 14 else "sparse tensors")


_NODE_TEXTS = {3: "name", 4: "type", 7: "domain"}


def _read_node(data: mmap, start: int, stop: int, entries: list[int], inside: bool) -> FileNode:
    node = FileNode()
    for number, form, value in _all_fields(data, start, stop):
        if form != _BYTES:
            continue
        if number in (1, 2):
            (node.inputs if number == 1 else node.outputs).append(_words(data, value))
        elif number in _NODE_TEXTS:
            setattr(node, _NODE_TEXTS[number], _words(data, value))
        elif number == 5:
            name, attribute = _read_attribute(data, value[0], value[1], node, entries, inside)
            if name in node.attributes:
                raise ValueError(f"a node has the attribute {name!r} twice")
            node.attributes[name] = attribute
        elif number in (8, 10) and value[0] != value[1]:
            node.extras.append("an overload" if number == 8 else "a device configuration")
    node.domain = "" if node.domain == "ai.onnx" else node.domain
    return node


def _read_attribute(
    data: mmap, start: int, stop: int, node: FileNode, entries: list[int], inside: bool
) -> tuple[str, Any]:
    """Returns an attribute's name and value. Graphs in graphs (`inside`) are not supported."""
    name, kind, values, whole = "", 0, {}, []
    for number, form, value in _all_fields(data, start, stop):
        if number == 1 and form == _BYTES:
            name = _words(data, value)
        elif number == 20 and form == _VARINT:
            kind = value
        elif number == 8:  # integers, packed or one by one
            whole += _packed(data, *value) if form == _BYTES else [_signed(value)]
        elif (number, form) in ((2, _FOUR_BYTES), (3, _VARINT), (4, _BYTES), (5, _BYTES)):
            values[number] = value
        elif (number, form) == (6, _BYTES) and not inside and 6 not in values:  # protobuf would merge two graphs
            values[6] = value
        elif number != 13:  # 13 is the documentation string
            node.extras.append("a subgraph" if number in (6, 11) else "an unsupported attribute")
    if 6 in values and kind != 5:
        node.extras.append("a subgraph")
    match kind:
        case 1:
            return name, float(values.get(2, 0.0))
        case 2:
            return name, _signed(values.get(3, 0))
        case 3:
            return name, _words(data, values.get(4, (0, 0)))
        case 4:
            return name, _read_tensor(data, *values.get(5, (0, 0)))
        case 5 if not inside and 6 in values:
            branch = FileGraph()
            _read_graph(data, values[6][0], values[6][1], branch, entries, inside=True)
            return name, branch
        case 7:
            return name, whole
    node.extras.append("a subgraph" if kind in (5, 10) else "an unsupported attribute")
    return name, None


def _read_tensor(data: mmap, start: int, stop: int) -> FileTensor:
    name, dtype, shape, raw, entries = "", 0, [], b"", {}
    for number, form, value in _all_fields(data, start, stop):
        if number == 1:
            shape += _packed(data, *value) if form == _BYTES else [_signed(value)]
        elif number == 2 and form == _VARINT:
            dtype = value
        elif number == 8 and form == _BYTES:
            name = _words(data, value)
        elif number == 9 and form == _BYTES:
            if value[1] - value[0] > _MAX_RAW:
                raise ValueError(f"a tensor in the graph has more than {_MAX_RAW:,} bytes")
            raw = data[value[0] : value[1]]
        elif number == 13 and form == _BYTES:
            fields = {n: _words(data, v) for n, f, v in _all_fields(data, *value) if f == _BYTES}
            entries[fields.get(_KEY, "")] = fields.get(_VALUE, "")
        elif number == 14 and form == _VARINT:
            entries |= {"location": entries.get("location", "")} if value == 1 else {}
    external = None
    if entries:
        length = int(entries["length"]) if "length" in entries else None
        external = entries.get("location", ""), int(entries.get("offset", 0)), length
    return FileTensor(name, dtype, tuple(shape), raw, external)


def _words(data: mmap, place: tuple[int, int]) -> str:
    return data[place[0] : place[1]].decode()


def _packed(data: mmap, at: int, stop: int) -> list[int]:
    numbers = []
    while at < stop:
        number, at = _varint(data, at, stop)
        numbers.append(_signed(number))
        if len(numbers) > _MAX_ENTRIES:
            raise ValueError("a list of numbers is too long")
    return numbers


def _signed(number: int) -> int:
    """Returns protobuf's unsigned integer as a signed 64-bit integer."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def external_files(path: Path) -> set[str]:
    """Returns the names of the files with a graph's weights, as spelled in the graph.

    Raises:
        SlmError: If the file is not an ONNX file.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return {name.decode() for name in _locations(data, 0, len(data), "Model", 0)}
    except (ValueError, OSError) as error:  # an empty file cannot be mapped
        raise SlmError(f"not an ONNX file: {path} ({error})", "copy or export the bundle again") from None


def _locations(data: mmap, start: int, stop: int, kind: str, depth: int) -> Iterator[bytes]:
    if depth > _DEEPEST:
        raise ValueError("its messages are nested too deeply")
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
    """Yields the number, start and end of each length-delimited field."""
    for number, form, value in _all_fields(data, at, stop):
        if form == _BYTES:
            yield number, *value


def _all_fields(data: mmap, at: int, stop: int) -> Iterator[tuple[int, int, Any]]:
    """Yields the number, wire type and value of each field; the value of a length-delimited field is its start and end."""
    while at < stop:
        tag, at = _varint(data, at, stop)
        number, form = tag >> 3, tag & 7
        if form == _BYTES:
            size, at = _varint(data, at, stop)
            if size > stop - at:
                raise ValueError("it is truncated")
            yield number, form, (at, at + size)
            at += size
        elif form == _VARINT:
            value, at = _varint(data, at, stop)
            yield number, form, value
        elif form in _FIXED:
            size = struct.calcsize(_FIXED[form])
            if size > stop - at:
                raise ValueError("it is truncated")
            yield number, form, struct.unpack(_FIXED[form], data[at : at + size])[0]
            at += size
        else:
            raise ValueError(f"unknown wire type {form}")


def _varint(data: mmap, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it is truncated")
