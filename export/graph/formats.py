"""How weights are stored and multiplied: one small interface, behind which a format decides both.

The graph asks a format for its linear layers and its embedding; the parameters that those declare name the tensors
that `build_graph` is given. Dimensions: B batch, T positions, V vocabulary, D hidden.
"""

from typing import Protocol

import onnx_ir as ir

from slm.export.graph.builder import Module, Op, Parameter, Value, fused


class Embedding(Protocol):
    """A token embedding that can also serve as a tied head."""

    def __call__(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""

    def head(self, op: Op, hidden: Value) -> Value:
        """Multiplies hidden states (B, T, D) with the same table to logits (B, T, V)."""


class WeightFormat(Protocol):
    """Makes the modules that hold weights."""

    def linear(self, in_features: int, out_features: int) -> Module:
        """Returns a module that maps (B, T, in) to (B, T, out)."""

    def embedding(self, vocab_size: int, hidden_size: int) -> Embedding:
        """Returns the token embedding."""


class FloatLinear(Module):
    """y = x Wᵀ in float32, W as Hugging Face stores it: (out, in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = Parameter([out_features, in_features], ir.DataType.FLOAT)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        return fused(op).FusedMatMul(x, self.weight, transB=1)


class FloatEmbedding(Module):
    """A float32 table (V, D), looked up on the way in and multiplied with on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = Parameter([vocab_size, hidden_size], ir.DataType.FLOAT)

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D)."""
        return op.Gather(self.weight, input_ids, axis=0)

    def head(self, op: Op, hidden: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V)."""
        return fused(op).FusedMatMul(hidden, self.weight, transB=1)


class FloatFormat:
    """Everything in float32."""

    def linear(self, in_features: int, out_features: int) -> FloatLinear:
        """Returns a float32 linear layer."""
        return FloatLinear(in_features, out_features)

    def embedding(self, vocab_size: int, hidden_size: int) -> FloatEmbedding:
        """Returns a float32 embedding."""
        return FloatEmbedding(vocab_size, hidden_size)


class BlockLinear(Module):
    """y = x Wᵀ with W in unsigned integers, one float32 scale for each block along the input (com.microsoft MatMulNBits).

    An integer q stands for (q - 2^(bits - 1)) * scale.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, block_size: int, accuracy_level: int) -> None:
        super().__init__()
        blocks = in_features // block_size
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

    def linear(self, in_features: int, out_features: int) -> BlockLinear:
        """Returns a quantized linear layer."""
        return BlockLinear(in_features, out_features, self.bits, self.block_size, self.accuracy_level)

    def embedding(self, vocab_size: int, hidden_size: int) -> BlockEmbedding:
        """Returns an 8-bit embedding."""
        return BlockEmbedding(vocab_size, hidden_size, self.block_size, self.accuracy_level)
