"""Weight formats of the fused target: how weights are stored and which operators multiply them.

The graph gets its linear layers and its embedding from a format, by path, because a format can treat each one differently.
The parameters of these modules are the names of the tensors that `build_graph` reads.
Dimensions: B batch, T positions, V vocabulary, D hidden.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir

from slm.core.manifest import Scheme
from slm.export.graph.builder import Module, Op, Parameter, Value, cast, fused
from slm.export.graph.frequent import FrequentRows
from slm.export.graph.halves import HalvesEmbedding

# The 8-bit step for activations from -1 to 1, and the smallest divisor of a row, which avoids a division by zero.
_STEP, _SMALLEST_ROW = 1 / 127, 1e-9


class LinearModule(Protocol):
    """A product with a weight. `dtype` is the type of its input and output."""

    dtype: ir.DataType

    def __call__(self, op: Op, x: Value) -> Value:
        """Maps (..., in) to (..., out)."""


class Embedding(Protocol):
    """A token embedding that can also compute the tied head. Its hidden states and logits are float32."""

    def __call__(self, op: Op, input_ids: Value) -> Value:
        """Maps ids (...) to (..., D)."""

    def head(self, op: Op, hidden: Value, keep: Value) -> Value:
        """Maps hidden states (..., D) to logits (..., V) with the same table.

        Args:
            op: The builder.
            hidden: The hidden states.
            keep: The graph's input `num_logits_to_keep`.
        """


class WeightFormat(Protocol):
    """Creates the modules that hold weights."""

    def linear(self, path: str, in_features: int, out_features: int) -> LinearModule:
        """Returns a module that maps (..., in) to (..., out)."""

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Returns the token embedding."""


class _Halves:
    """The products that are computed in float16: none, or all except those in `kept`."""

    def __init__(self, half: bool = False, kept: Collection[str] = ()) -> None:
        self._half, self._kept = half, frozenset(kept)

    def dtype(self, path: str) -> ir.DataType:
        """Returns the type of a product."""
        return ir.DataType.FLOAT16 if self._half and path not in self._kept else ir.DataType.FLOAT


class FloatLinear(Module):
    """y = x Wᵀ with W (out, in), the layout of Hugging Face."""

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = Parameter([out_features, in_features], dtype)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        return fused(op).FusedMatMul(x, self.weight, transB=1)


class FloatEmbedding(Module):
    """A table (V, D) for the lookup and the tied head."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        super().__init__()
        self._dtype = dtype
        self.weight = Parameter([vocab_size, hidden_size], dtype)

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""
        return cast(op, op.Gather(self.weight, input_ids, axis=0), self._dtype, ir.DataType.FLOAT)

    def head(self, op: Op, hidden: Value, keep: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        hidden = cast(op, hidden, ir.DataType.FLOAT, self._dtype)
        return cast(op, self._product(op, hidden), self._dtype, ir.DataType.FLOAT)

    def _product(self, op: Op, hidden: Value) -> Value:
        return fused(op).FusedMatMul(hidden, self.weight, transB=1)


class FloatFormat(_Halves):
    """All products in float32, or most products in float16 (`half`)."""

    def linear(self, path: str, in_features: int, out_features: int) -> FloatLinear:
        """Returns a linear layer."""
        return FloatLinear(in_features, out_features, self.dtype(path))

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> FloatEmbedding:
        """Returns an embedding."""
        return FloatEmbedding(vocab_size, hidden_size, self.dtype(path))


class GemmLinear(FloatLinear):
    """y = x Wᵀ with the standard operator Gemm, for hidden states of two dimensions."""

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (N, in) to (N, out)."""
        return op.Gemm(x, self.weight, transB=1)


class GemmEmbedding(FloatEmbedding):
    """An embedding in standard operators, for hidden states of two dimensions."""

    def _product(self, op: Op, hidden: Value) -> Value:
        return op.Gemm(hidden, self.weight, transB=1)


class GemmFormat:
    """All products in float32, in standard operators."""

    def linear(self, path: str, in_features: int, out_features: int) -> GemmLinear:
        """Returns a linear layer."""
        return GemmLinear(in_features, out_features)

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> GemmEmbedding:
        """Returns an embedding."""
        return GemmEmbedding(vocab_size, hidden_size)


class BlockLinear(Module):
    """y = x Wᵀ with W as unsigned integers and one scale for each block along the input (com.microsoft MatMulNBits)."""

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
        self._frequent = FrequentRows(in_features, scheme, accuracy_level) if scheme.frequent else None
        for name, parameter in (self._frequent.parameters if self._frequent else {}).items():
            setattr(self, f"frequent_{name}", parameter)
        self._attributes = {
            "K": in_features,
            "N": out_features,
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        y = fused(op).MatMulNBits(x, self.weight_quantized, self.weight_scale, *self._points, **self._attributes)
        return self._frequent.logits(op, x, y) if self._frequent else y


class BlockEmbedding(BlockLinear):
    """One table for the lookup, which reads it as (V, bytes), and the tied head, which reads it as (V, blocks, bytes)."""

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
        if self._frequent:
            found = self._frequent.look_up(op, input_ids, found)
        return cast(op, found, self.dtype, ir.DataType.FLOAT)

    def head(self, op: Op, hidden: Value, keep: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        product = super().forward(op, cast(op, hidden, ir.DataType.FLOAT, self.dtype))
        return cast(op, product, self.dtype, ir.DataType.FLOAT)


class DynamicLinear(Module):
    """y = x Wᵀ as a product of 8-bit integers. W has a static scale for each output, x a dynamic one for each token.

    Each row is first divided by its largest absolute value, because onnxruntime's product takes one scale for all rows. With
    a common scale, an outlier in one token would reduce the precision of all tokens, and the result of a row would depend on
    the other rows of the batch.
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
    """Linear layers, embedding and head as integers, each with its own scheme. Norms stay in float32."""

    def __init__(self, schemes: Mapping[str, Scheme], accuracy_level: int) -> None:
        """Takes the scheme of each product, by path, and the `accuracy_level` of MatMulNBits."""
        self._schemes, self._accuracy_level = schemes, accuracy_level

    def linear(self, path: str, in_features: int, out_features: int) -> BlockLinear | DynamicLinear:
        """Returns a quantized linear layer."""
        scheme = self._schemes[path]
        if scheme.dynamic:
            return DynamicLinear(in_features, out_features)
        return BlockLinear(in_features, out_features, scheme, self._accuracy_level)

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> BlockEmbedding | HalvesEmbedding:
        """Returns a quantized embedding."""
        if self._schemes[path].halves:
            return HalvesEmbedding(vocab_size, hidden_size, self._schemes[path], self._accuracy_level)
        return BlockEmbedding(vocab_size, hidden_size, self._schemes[path], self._accuracy_level)
