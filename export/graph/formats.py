"""How weights are stored and multiplied: one small interface, behind which a format decides both.

The graph asks a format for its linear layers and its embedding, by the path of each, for a format may treat them
differently; the parameters that those declare name the tensors that `build_graph` is given. Dimensions: B batch,
T positions, V vocabulary, D hidden.
"""

from collections.abc import Collection
from typing import Protocol

import onnx_ir as ir

from slm.export.graph.builder import Module, Op, Parameter, Value, cast, fused


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
    """y = x Wᵀ with W in unsigned integers, one scale for each block along the input (com.microsoft MatMulNBits).

    An integer q stands for (q - 2^(bits - 1)) * scale.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, block_size: int, accuracy_level: int) -> None:
        super().__init__()
        blocks = in_features // block_size
        self.dtype = ir.DataType.FLOAT
        self.weight_quantized = Parameter([out_features, blocks, block_size * bits // 8], ir.DataType.UINT8)
        self.weight_scale = Parameter([out_features, blocks], ir.DataType.FLOAT)
        self._attributes = {
            "K": in_features,
            "N": out_features,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        return fused(op).MatMulNBits(x, self.weight_quantized, self.weight_scale, **self._attributes)


class BlockEmbedding(BlockLinear):
    """One 8-bit table for lookup and head: the head wants it in blocks (V, blocks, block), the lookup as (V, D)."""

    def __init__(self, vocab_size: int, hidden_size: int, block_size: int, accuracy_level: int) -> None:
        super().__init__(hidden_size, vocab_size, 8, block_size, accuracy_level)
        self._shape = [vocab_size, hidden_size]
        self._block_size = block_size

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""
        table = op.Reshape(self.weight_quantized, self._shape)
        return fused(op).GatherBlockQuantized(
            table, input_ids, self.weight_scale, bits=8, block_size=self._block_size, gather_axis=0, quantize_axis=1
        )

    def head(self, op: Op, hidden: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        return super().forward(op, hidden)


class BlockFormat:
    """Linear layers, embedding and head in blocks of integers; norms stay in float32."""

    def __init__(self, bits: int, block_size: int, accuracy_level: int) -> None:
        self.bits = bits
        self.block_size = block_size
        self.accuracy_level = accuracy_level

    def linear(self, path: str, in_features: int, out_features: int) -> BlockLinear:
        """Returns a quantized linear layer."""
        return BlockLinear(in_features, out_features, self.bits, self.block_size, self.accuracy_level)

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> BlockEmbedding:
        """Returns an 8-bit embedding."""
        return BlockEmbedding(vocab_size, hidden_size, self.block_size, self.accuracy_level)
