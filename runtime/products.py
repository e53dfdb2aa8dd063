"""Products of 8-bit integers on CPUs that add two of them in 16 bits, which saturate: x86 without VNNI.

`slm quantize` limits weights so that these sums fit. Older bundles have weights without that limit. On such a CPU, the runtime
rounds their weights again when it opens them.
"""

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from slm.core.graph_file import FileTensor, read_graph
from slm.core.grid import Array, fitted
from slm.core.manifest import Bundle

# The inputs of the product that `products_saturate` tries, and the extremes of its operands.
_INPUTS, _LARGEST_INPUT, _LARGEST_WEIGHT = 64, 255, 127
# ONNX's numbers of types (onnx.proto, TensorProto.DataType).
_UINT8, _INT8, _INT32 = 2, 3, 6
_NUMPY = {1: np.float32, _INT8: np.int8}


def saturates(bundle: Bundle) -> bool:
    """Returns whether a bundle's products, with the weights in its file, would saturate on this CPU."""
    quantization = bundle.manifest.quantization
    schemes = () if quantization is None else quantization.schemes.values()
    return any(scheme.dynamic and not scheme.reduced for scheme in schemes) and products_saturate()


@cache
def products_saturate() -> bool:
    """Returns whether onnxruntime's products of 8-bit integers saturate on this CPU. Computes one, in about a millisecond.

    The instruction sets would not tell: the choice of kernels differs between versions and systems.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(product_of_extremes(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((1, _INPUTS), _LARGEST_INPUT, np.uint8)})
    return int(sums[0, 0]) != _INPUTS * _LARGEST_INPUT * _LARGEST_WEIGHT


def limited_weights(bundle: Bundle) -> dict[str, Array]:
    """Returns integers and scales, by name of the tensor, whose products do not saturate. They replace those of the file.

    Args:
        bundle: A bundle with products of 8-bit integers.
    """
    assert bundle.manifest.quantization is not None
    tensors, folder = read_graph(bundle.model_path).tensors, bundle.model_path.parent
    found: dict[str, Array] = {}
    for path, scheme in bundle.manifest.quantization.schemes.items():
        if not scheme.dynamic or scheme.reduced:
            continue
        names = f"{path}.weight_quantized", f"{path}.weight_scale"
        integers, scale = (_read(tensors[name], folder) for name in names)  # (K, N), (N,)
        weight = integers.T.astype(np.float32)
        weight *= scale[:, None]
        blocks = weight[:, None, :]  # one block for each output channel
        grid = fitted(blocks, scheme.model_copy(update={"reduced": True}))
        rounded = grid.round(blocks)[:, 0, :]
        found[names[0]] = np.ascontiguousarray(rounded.T.astype(np.int8))
        found[names[1]] = np.ascontiguousarray(grid.scale[:, 0])
    return found


def _read(tensor: FileTensor, folder: Path) -> Array:
    dtype = _NUMPY[tensor.dtype]
    if tensor.external is None:
        return np.frombuffer(tensor.raw, dtype).reshape(tensor.shape)
    name, offset, _ = tensor.external
    with (folder / name).open("rb") as file:
        file.seek(offset)
        return np.fromfile(file, dtype, int(np.prod(tensor.shape))).reshape(tensor.shape)


def product_of_extremes() -> bytes:
    """Returns an ONNX model: the product of `x`, uint8 (rows, 64), and a column of the largest weights, int8 (64, 1).

    It is encoded by hand, because the package onnx is not installed on devices. The numbers are those of fields in onnx.proto.
    """
    weights = _number(1, _INPUTS) + _number(1, 1) + _number(2, _INT8) + _bytes(8, b"w")
    weights += _bytes(9, bytes([_LARGEST_WEIGHT]) * _INPUTS)  # dims, data_type, name, raw_data
    node = _bytes(1, b"x") + _bytes(1, b"w") + _bytes(2, b"y") + _bytes(4, b"MatMulInteger")  # input, output, op_type
    graph = _bytes(1, node) + _bytes(2, b"product") + _bytes(5, weights)  # node, name, initializer
    graph += _bytes(11, _value(b"x", _UINT8, _INPUTS)) + _bytes(12, _value(b"y", _INT32, 1))  # input, output
    opset = _bytes(1, b"") + _number(2, 21)  # domain, version
    return _number(1, 10) + _bytes(7, graph) + _bytes(8, opset)  # ir_version, graph, opset_import


def _value(name: bytes, dtype: int, columns: int) -> bytes:
    """Returns a ValueInfoProto of shape ("rows", columns)."""
    shape = _bytes(1, _bytes(2, b"rows")) + _bytes(1, _number(1, columns))  # dim_param, dim_value
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, dtype) + _bytes(2, shape)))  # name, type, tensor_type


def _number(field: int, value: int) -> bytes:
    assert value < 128
    return bytes([field << 3, value])


def _bytes(field: int, value: bytes) -> bytes:
    size = bytes([len(value)]) if len(value) < 128 else bytes([len(value) & 127 | 128, len(value) >> 7])
    return bytes([field << 3 | 2]) + size + value
