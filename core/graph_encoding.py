"""Encodes small ONNX models in memory, for installations without the package onnx. `slm.core.graph_file` reads graphs.

Numbers of fields, types and versions are those of onnx/onnx.proto; https://protobuf.dev/programming-guides/encoding/.
"""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "float16": 10}
_FLOAT, _INT = 1, 2
_IR_VERSION = 10


def model(
    name: str,
    nodes: Sequence[bytes],
    tensors: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    opsets: Mapping[str, int],
) -> bytes:
    """Returns an ONNX file.

    Args:
        name: The name of the graph.
        nodes: The operations in the order of execution, from `node`.
        tensors: The constants, from `tensor`.
        inputs: The inputs, from `value`.
        outputs: The outputs, from `value`.
        opsets: The version of each domain of operators; that of ONNX is "".
    """
    graph = _repeated(1, nodes) + _bytes(2, name.encode()) + _repeated(5, tensors)
    graph += _repeated(11, inputs) + _repeated(12, outputs)
    domains = [_bytes(1, domain.encode()) + _integer(2, version) for domain, version in opsets.items()]
    return _integer(1, _IR_VERSION) + _bytes(7, graph) + _repeated(8, domains)


def node(
    operator: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    domain: str = "",
    attributes: Mapping[str, float] | None = None,
) -> bytes:
    """Returns an operation (NodeProto). Attributes of the type int are integers, others float32."""
    names = _repeated(1, [each.encode() for each in inputs]) + _repeated(2, [each.encode() for each in outputs])
    made = [_attribute(name.encode(), value) for name, value in (attributes or {}).items()]
    return names + _bytes(4, operator.encode()) + _repeated(5, made) + _bytes(7, domain.encode())


def tensor(name: str, array: NDArray[np.generic]) -> bytes:
    """Returns a constant (TensorProto)."""
    dims = b"".join(_integer(1, size) for size in array.shape)
    return dims + _integer(2, _TYPES[array.dtype.name]) + _bytes(8, name.encode()) + _bytes(9, array.tobytes())


def value(name: str, dtype: DTypeLike, shape: Sequence[int | str]) -> bytes:
    """Returns an input or output (ValueInfoProto). A dimension of any size is a name."""
    dims = _repeated(1, [_integer(1, size) if isinstance(size, int) else _bytes(2, size.encode()) for size in shape])
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _integer(1, _TYPES[np.dtype(dtype).name]) + _bytes(2, dims)))


def _attribute(name: bytes, value: float) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name) + _integer(3, value) + _integer(20, _INT)
    return _bytes(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _integer(20, _FLOAT)


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _repeated(field: int, contents: Sequence[bytes]) -> bytes:
    return b"".join(_bytes(field, content) for content in contents)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
