"""An 8-bit table whose upper and lower four bits are stored apart, so that a step of one token reads mostly the upper ones.

An integer from -136 to 119 is 16 u + l, with u and l from -8 to 7. The scale of a block is that of the upper halves and can be
negative, so that the largest weight of a block lies at the wide end of the range. The lower halves have 1/16 of the scale.

The head of one row computes all logits from the upper halves, adds each token's mean error (`weight_shift`, from calibration),
and adds the lower halves only to the most likely tokens. The head of several rows, or of a caller that asks for two or more
positions, adds the product with all lower halves. Both branches are in one graph.
Dimensions: B batch, T positions, D hidden, V vocabulary, C candidates.
"""

import onnx_ir as ir

from slm.core.contract import head_parts
from slm.core.manifest import Scheme
from slm.export.graph.builder import Module, Op, Parameter, Value, branch, fused

_LOWER_STEP = 1 / 16
# The 8-bit step for activations from -1 to 1, and the smallest divisor of a block, which avoids a division by zero.
_ACTIVATION_STEP, _SMALLEST_BLOCK = 1 / 127, 1e-30


class HalvesEmbedding(Module):
    """A table in halves for the lookup and the tied head."""

    def __init__(self, vocab_size: int, hidden_size: int, scheme: Scheme, accuracy_level: int) -> None:
        super().__init__()
        blocks = hidden_size // scheme.block_size
        self._shape = [vocab_size, hidden_size // 2]
        self._hidden_size, self._block_size = hidden_size, scheme.block_size
        self._parts = head_parts(vocab_size)
        for part in ("upper", "lower"):
            packed = Parameter([vocab_size, blocks, scheme.block_size // 2], ir.DataType.UINT8)
            setattr(self, f"weight_{part}", packed)
        self.weight_scale = Parameter([vocab_size, blocks], ir.DataType.FLOAT)
        self.weight_shift = Parameter([vocab_size], ir.DataType.FLOAT)
        self._product = {
            "K": hidden_size,
            "N": vocab_size,
            "bits": 4,
            "block_size": scheme.block_size,
            "accuracy_level": accuracy_level,
        }
        self._lower_rows: Value | None = None

    def forward(self, op: Op, input_ids: Value) -> Value:
        """Looks up ids (B, T) as (B, T, D), exactly."""
        self.weight_shift._realize(op.builder)  # only branches of the head use it
        upper = self._rows(op, op.Reshape(self.weight_upper, self._shape), input_ids)
        self._lower_rows = op.Reshape(self.weight_lower, self._shape)
        lower = self._rows(op, self._lower_rows, input_ids)
        return op.Add(upper, op.Mul(lower, _LOWER_STEP))

    def head(self, op: Op, hidden: Value, keep: Value) -> Value:
        """Maps (B, T, D) to logits (B, T, V); `keep` is the number of positions that the caller asks for."""
        small = op.Mul(hidden, _LOWER_STEP)  # the scales are those of the upper halves
        coarse = fused(op).MatMulNBits(hidden, self.weight_upper, self.weight_scale, **self._product)
        one_row = op.Equal(op.Size(hidden), self._hidden_size)
        few = op.And(one_row, op.Less(keep, 2))

        parts, each = self._parts

        def candidates(op: Op) -> Value:
            shifted = op.Add(coarse, self.weight_shift)
            columns = op.Reshape(shifted, [-1, parts])  # onnxruntime searches columns in parallel
            _, rows = op.TopK(columns, [each], axis=0, sorted=0, _outputs=2)
            tokens = op.Reshape(op.Add(op.Mul(rows, parts), list(range(parts))), [1, 1, -1])  # (1, 1, C)
            lower = self._lower_product(op, small, op.Reshape(tokens, [-1]))
            exact = op.Add(op.GatherElements(coarse, tokens, axis=-1), op.Reshape(lower, [1, 1, -1]))
            return op.ScatterElements(shifted, tokens, exact, axis=-1)

        def whole(op: Op) -> Value:
            lower = fused(op).MatMulNBits(small, self.weight_lower, self.weight_scale, **self._product)
            return op.Add(coarse, lower)

        return op.If(few, then_branch=branch(op, "candidates", candidates), else_branch=branch(op, "whole", whole))

    def _lower_product(self, op: Op, hidden: Value, tokens: Value) -> Value:
        """Returns the products (C,) of one hidden state with the lower halves of some tokens, as MatMulNBits computes them.

        The kernel rounds activations to 8 bits by block, and so does this. A byte is an even channel's integer and 16 times an
        odd channel's, both plus 8. GatherBlockQuantized with a float product takes three times as long.
        """
        count, half = self._hidden_size // self._block_size, self._block_size // 2
        blocks = op.Reshape(hidden, [count, self._block_size])
        step = op.Mul(op.Max(op.ReduceMax(op.Abs(blocks), [-1], keepdims=1), _SMALLEST_BLOCK), _ACTIVATION_STEP)
        rounded = op.Mul(op.Round(op.Div(blocks, step)), step)
        even, odd = op.Split(op.Reshape(rounded, [count, half, 2]), num_outputs=2, axis=-1, _outputs=2)
        even, odd = (op.Reshape(each, [count, half]) for each in (even, odd))
        packed = op.Gather(self._lower_rows, tokens, axis=0)  # (C, D / 2)
        both = op.Reshape(op.Cast(packed, to=ir.DataType.FLOAT), [-1, count, half])
        upper = op.Floor(op.Mul(both, _LOWER_STEP))
        found = op.Add(op.Mul(both, even), op.Mul(upper, op.Sub(odd, op.Mul(even, 16.0))))
        middle = op.Mul(op.ReduceSum(rounded, [-1], keepdims=0), 8.0)  # (blocks,)
        by_block = op.Sub(op.ReduceSum(found, [-1], keepdims=0), middle)  # (C, blocks)
        scales = op.Gather(self.weight_scale, tokens, axis=0)
        return op.ReduceSum(op.Mul(by_block, scales), [-1], keepdims=0)

    def _rows(self, op: Op, table: Value | None, ids: Value) -> Value:
        return fused(op).GatherBlockQuantized(
            table, ids, self.weight_scale, bits=4, block_size=self._block_size, gather_axis=0, quantize_axis=1
        )
