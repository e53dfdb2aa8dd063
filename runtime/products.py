"""Products of 8-bit integers on CPUs that add two of them in 16 bits, which saturate: x86 without VNNI.

`slm quantize` limits weights so that these sums fit. Older bundles have weights without that limit. On such a CPU, the runtime
rounds their weights again when it opens them.
"""

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from slm.core import graph_encoding
from slm.core.graph_file import FileTensor, read_graph
from slm.core.grid import Array, fitted
from slm.core.manifest import Bundle

# The inputs of the product that `products_saturate` tries, and the extremes of its operands.
_INPUTS, _LARGEST_INPUT, _LARGEST_WEIGHT = 64, 255, 127
# NumPy's types of ONNX's float and int8 (onnx.proto, TensorProto.DataType).
_NUMPY = {1: np.float32, 3: np.int8}


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
    """Returns an ONNX model: the product of `x`, uint8 (rows, 64), and a column of the largest weights, int8 (64, 1)."""
    return graph_encoding.model(
        "product",
        [graph_encoding.node("MatMulInteger", ["x", "w"], ["y"])],
        [graph_encoding.tensor("w", np.full((_INPUTS, 1), _LARGEST_WEIGHT, np.int8))],
        [graph_encoding.value("x", np.uint8, ("rows", _INPUTS))],
        [graph_encoding.value("y", np.int32, ("rows", 1))],
        {"": 21},
    )
