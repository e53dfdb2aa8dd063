"""Integer weights for the portable target: standard operators in a layout that onnxruntime fuses.

A weight (N, K) is stored by columns as (K, N), with its blocks along the first axis. In this layout, onnxruntime fuses
DequantizeLinear and MatMul into one integer product. Other runtimes compute both operators in floats. The embedding is
stored by rows, because lookups gather rows.
Dimensions: N output channels, K input channels, V vocabulary, D hidden, T tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from slm.core.manifest import Scheme
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, unpack
from slm.export.graph.builder import Array, Module, Op, Parameter, Value
from slm.export.graph.store import LazyTensors

_Make: TypeAlias = Callable[[Mapping[str, Array], str, Scheme], Array]
# The weight that is stored by rows.
_TABLE = "model.embed_tokens"


def integers(scheme: Scheme) -> ir.DataType:
    """Returns the type of a scheme's integers: signed if the scheme is symmetric, unsigned if it has zero points."""
    return {
        (8, False): ir.DataType.INT8,
        (8, True): ir.DataType.UINT8,
        (4, False): ir.DataType.INT4,
        (4, True): ir.DataType.UINT4,
    }[scheme.bits, scheme.zero_points]


class DequantizedLinear(Module):
    """y = x Wᵀ with an integer weight and one scale for each block along the input (DequantizeLinear, MatMul)."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        blocks, dtype = in_features // scheme.block_size, integers(scheme)
        self.dtype = ir.DataType.FLOAT
        self._block_size = scheme.block_size
        self.weight_quantized = Parameter([in_features, out_features], dtype)
        self.weight_scale = Parameter([blocks, out_features], ir.DataType.FLOAT)
        self._stored: tuple[Parameter, ...] = (self.weight_quantized, self.weight_scale)
        if scheme.zero_points:
            self.weight_zero_points = Parameter([blocks, out_features], dtype)
            self._stored = (*self._stored, self.weight_zero_points)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (T, K) to (T, N)."""
        return op.MatMul(x, op.DequantizeLinear(*self._stored, axis=0, block_size=self._block_size))


class DequantizedEmbedding(Module):
    """One integer table (V, D) for the lookup and the tied head. The lookup dequantizes only the gathered rows.

    The head reads a transposed copy, which runtimes compute once, when they load the graph. onnxruntime needs this copy: it
    fuses a product only if no other operator reads its weight.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scheme: Scheme) -> None:
        super().__init__()
        blocks, dtype = hidden_size // scheme.block_size, integers(scheme)
        self._block_size = scheme.block_size
        self.weight_quantized = Parameter([vocab_size, hidden_size], dtype)
        self.weight_scale = Parameter([vocab_size, blocks], ir.DataType.FLOAT)
        self._stored: tuple[Parameter, ...] = (self.weight_quantized, self.weight_scale)
        if scheme.zero_points:
            self.weight_zero_points = Parameter([vocab_size, blocks], dtype)
            self._stored = (*self._stored, self.weight_zero_points)

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (T,) as (T, D)."""
        rows = (op.Gather(each, input_ids, axis=0) for each in self._stored)
        return op.DequantizeLinear(*rows, axis=1, block_size=self._block_size)

    def head(self, op: Op, hidden: Value, keep: Value) -> Value:
        """Maps (T, D) to logits (T, V)."""
        columns = (op.Transpose(each, perm=[1, 0]) for each in self._stored)
        return op.MatMul(hidden, op.DequantizeLinear(*columns, axis=0, block_size=self._block_size))


class DequantizedFormat:
    """Linear layers, embedding and head as integers in standard operators, each with its own scheme."""

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        """Takes the scheme of each product, by path. Dynamic schemes are not supported."""
        self._schemes = schemes

    def linear(self, path: str, in_features: int, out_features: int) -> DequantizedLinear:
        """Returns a quantized linear layer."""
        return DequantizedLinear(in_features, out_features, self._schemes[path])

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> DequantizedEmbedding:
        """Returns a quantized embedding."""
        return DequantizedEmbedding(vocab_size, hidden_size, self._schemes[path])


def portable_tensors(tensors: Mapping[str, Array], schemes: Mapping[str, Scheme]) -> LazyTensors:
    """Converts the tensors of a fused quantized graph to the layout of a portable one, under the same names.

    Args:
        tensors: Integers, scales and zero points in the fused layout of `blocks.dequantize`. Other tensors are unchanged.
        schemes: The scheme of each product, by path.
    """

    def arranged(make: _Make, path: str) -> Array:
        rows = make(tensors, path, schemes[path])
        return np.ascontiguousarray(rows if path == _TABLE else rows.T)

    makers: dict[str, Callable[[], Array]] = {}
    for name in tensors:
        path, _, part = name.rpartition(".")
        make = _PARTS.get(part)
        makers[name] = partial(tensors.__getitem__, name) if make is None else partial(arranged, make, path)
    return LazyTensors(makers)


def _quantized(tensors: Mapping[str, Array], path: str, scheme: Scheme) -> Array:
    found = unpack(tensors[f"{path}.{QUANTIZED}"], scheme.bits, scheme.block_size)  # (N, blocks, block)
    return _typed(found.reshape(len(found), -1), scheme)


def _scale(tensors: Mapping[str, Array], path: str, scheme: Scheme) -> Array:
    return tensors[f"{path}.{SCALE}"]


def _zero_points(tensors: Mapping[str, Array], path: str, scheme: Scheme) -> Array:
    blocks = tensors[f"{path}.{SCALE}"].shape[1]
    return _typed(unpack(tensors[f"{path}.{ZERO_POINTS}"], scheme.bits, blocks), scheme)


def _typed(unsigned: Array, scheme: Scheme) -> Array:
    """Returns unsigned integers in a scheme's type. For a signed type, subtracts half of the range."""
    if not scheme.zero_points:
        unsigned = (unsigned - np.uint8(1 << (scheme.bits - 1))).view(np.int8)  # modulo 256
    if scheme.bits == 4:
        unsigned = unsigned.astype(ml_dtypes.uint4 if scheme.zero_points else ml_dtypes.int4)
    return unsigned


_PARTS: dict[str, _Make] = {QUANTIZED: _quantized, SCALE: _scale, ZERO_POINTS: _zero_points}
