"""How weights are stored and multiplied: one small interface, behind which a format decides both.

The graph asks a format for its linear layers and its embedding, by the path of each, for a format may treat them
differently; the parameters that those declare name the tensors that `build_graph` is given. Dimensions: B batch,
T positions, V vocabulary, D hidden.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir

from slm.core.manifest import Scheme
from slm.export.graph.builder import Module, Op, Parameter, Value, cast, fused

# A row of activations from -1 to 1 in 8 bits; no row counts as smaller than this, or zeros would be divided by zero.
_STEP, _SMALLEST_ROW = 1 / 127, 1e-9


class Linear(Protocol):
    """A product with a weight; `dtype` is what it takes and gives."""

    dtype: ir.DataType

    def __call__(self, op: Op, x: Value) -> Value:
        """Maps (..., in) to (..., out)."""


class Embedding(Protocol):
    """A token embedding that can also serve as a tied head; its hidden states and logits are float32."""

    def __call__(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (...) as (..., D)."""

    def head(self, op: Op, hidden: Value) -> Value:
        """Multiplies hidden states (..., D) with the same table to logits (..., V)."""


class WeightFormat(Protocol):
    """Makes the modules that hold weights."""

    def linear(self, path: str, in_features: int, out_features: int) -> Linear:
        """Returns a module that maps (..., in) to (..., out)."""

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Returns the token embedding."""


class _Halves:
    """Which products are computed in float16: all but those named, or none."""

    def __init__(self, half: bool = False, kept: Collection[str] = ()) -> None:
        self._half, self._kept = half, frozenset(kept)

    def dtype(self, path: str) -> ir.DataType:
        """Returns the type in which a product is computed."""
        return ir.DataType.FLOAT16 if self._half and path not in self._kept else ir.DataType.FLOAT


class FloatLinear(Module):
    """y = x Wᵀ, W as Hugging Face stores it: (out, in)."""

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = Parameter([out_features, in_features], dtype)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        return fused(op).FusedMatMul(x, self.weight, transB=1)


class FloatEmbedding(Module):
    """A table (V, D), looked up on the way in and multiplied with on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        super().__init__()
        self._dtype = dtype
        self.weight = Parameter([vocab_size, hidden_size], dtype)

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""
        return cast(op, op.Gather(self.weight, input_ids, axis=0), self._dtype, ir.DataType.FLOAT)

    def head(self, op: Op, hidden: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        hidden = cast(op, hidden, ir.DataType.FLOAT, self._dtype)
        return cast(op, self._product(op, hidden), self._dtype, ir.DataType.FLOAT)

    def _product(self, op: Op, hidden: Value) -> Value:
        return fused(op).FusedMatMul(hidden, self.weight, transB=1)


class FloatFormat(_Halves):
    """Everything in float32, or products in float16."""

    def linear(self, path: str, in_features: int, out_features: int) -> FloatLinear:
        """Returns a linear layer."""
        return FloatLinear(in_features, out_features, self.dtype(path))

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> FloatEmbedding:
        """Returns an embedding."""
        return FloatEmbedding(vocab_size, hidden_size, self.dtype(path))


class GemmLinear(FloatLinear):
    """The same in a standard operator, on hidden states of two dimensions."""

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (N, in) to (N, out)."""
        return op.Gemm(x, self.weight, transB=1)


class GemmEmbedding(FloatEmbedding):
    """The same in standard operators, on hidden states of two dimensions."""

    def _product(self, op: Op, hidden: Value) -> Value:
        return op.Gemm(hidden, self.weight, transB=1)


class GemmFormat:
    """Everything in float32, in standard operators."""

    def linear(self, path: str, in_features: int, out_features: int) -> GemmLinear:
        """Returns a linear layer."""
        return GemmLinear(in_features, out_features)

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> GemmEmbedding:
        """Returns an embedding."""
        return GemmEmbedding(vocab_size, hidden_size)


class BlockLinear(Module):
    """y = x Wᵀ with W in unsigned integers, one scale for each block along the input (com.microsoft MatMulNBits)."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, accuracy_level: int) -> None:
        super().__init__()
        blocks = in_features // scheme.block_size
        self.dtype = ir.DataType.FLOAT16 if scheme.half else ir.DataType.FLOAT
        self.weight_quantized = Parameter(
            [out_features, blocks, scheme.block_size * scheme.bits // 8], ir.DataType.UINT8
        )
        self.weight_scale = Parameter([out_features, blocks], self.dtype)
        self._points: tuple[Parameter, ...] = ()
        if scheme.zero_points:
            self.weight_zero_points = Parameter([out_features, -(-blocks * scheme.bits // 8)], ir.DataType.UINT8)
            self._points = (self.weight_zero_points,)
        self._attributes = {
            "K": in_features,
            "N": out_features,
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        return fused(op).MatMulNBits(x, self.weight_quantized, self.weight_scale, *self._points, **self._attributes)


class BlockEmbedding(BlockLinear):
    """One table for lookup and head: the head wants it in blocks (V, blocks, bytes), the lookup as (V, bytes)."""

    def __init__(self, vocab_size: int, hidden_size: int, scheme: Scheme, accuracy_level: int) -> None:
        super().__init__(hidden_size, vocab_size, scheme, accuracy_level)
        self._shape = [vocab_size, hidden_size * scheme.bits // 8]
        self._scheme = scheme

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""
        found = fused(op).GatherBlockQuantized(
            op.Reshape(self.weight_quantized, self._shape),
            input_ids,
            self.weight_scale,
            *self._points,
            bits=self._scheme.bits,
            block_size=self._scheme.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return cast(op, found, self.dtype, ir.DataType.FLOAT)

    def head(self, op: Op, hidden: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        product = super().forward(op, cast(op, hidden, ir.DataType.FLOAT, self.dtype))
        return cast(op, product, self.dtype, ir.DataType.FLOAT)


class DynamicLinear(Module):
    """y = x Wᵀ as a product of 8-bit integers: W has a scale for each output, x one for each token, found as it comes.

    Rows are divided by their largest value first. onnxruntime's product takes one scale for all rows, with which one token's
    outlier would cost every other token its precision, and a row's result would depend on those beside it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dtype = ir.DataType.FLOAT
        self.weight_quantized = Parameter([in_features, out_features], ir.DataType.INT8)
        self.weight_scale = Parameter([out_features], ir.DataType.FLOAT)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        largest = op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), _SMALLEST_ROW)  # (B, T, 1)
        middle = op.Constant(value=ir.tensor(np.array(128, np.uint8)))
        rounded = op.QuantizeLinear(op.Div(x, largest), _STEP, middle)
        y = fused(op).MatMulIntegerToFloat(rounded, self.weight_quantized, _STEP, self.weight_scale, middle)
        return op.Mul(y, largest)


class BlockFormat:
    """Linear layers, embedding and head in integers, each by a scheme of its own; norms stay in float32."""

    def __init__(self, schemes: Mapping[str, Scheme], accuracy_level: int) -> None:
        """Takes the scheme of each product by its path."""
        self._schemes, self._accuracy_level = schemes, accuracy_level

    def linear(self, path: str, in_features: int, out_features: int) -> BlockLinear | DynamicLinear:
        """Returns a quantized linear layer."""
        scheme = self._schemes[path]
        if scheme.dynamic:
            return DynamicLinear(in_features, out_features)
        return BlockLinear(in_features, out_features, scheme, self._accuracy_level)

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> BlockEmbedding:
        """Returns a quantized embedding."""
        return BlockEmbedding(vocab_size, hidden_size, self._schemes[path], self._accuracy_level)
