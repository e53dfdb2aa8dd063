"""The rows of frequent tokens of a 4-bit table, which are stored in 8 bits as well.

Few tokens have nearly all of the probability: of Gemma's 262,144 tokens, 4,096 have 98 % in English stories. Their rows in 8
bits remove nearly all of the error of a 4-bit table (docs/quantization.md). The table in 4 bits stays complete, so that ids
need no translation, and the logits of the frequent tokens replace those of the 4-bit product.
Dimensions: D hidden, V vocabulary, F frequent tokens.
"""

import onnx_ir as ir

from slm.core.manifest import Scheme
from slm.export.graph.builder import Op, Parameter, Value, fused


class FrequentRows:
    """The 8-bit rows of a table, and the ids of their tokens. `parameters` belong to the module of the table."""

    def __init__(self, hidden_size: int, scheme: Scheme, accuracy_level: int) -> None:
        """Takes the number of columns, the scheme of the table, and the `accuracy_level` of MatMulNBits."""
        rows, stored = scheme.frequent, scheme.of_frequent
        blocks = hidden_size // stored.block_size
        self._ids = Parameter([rows], ir.DataType.INT64)
        self._quantized = Parameter([rows, blocks, stored.block_size], ir.DataType.UINT8)
        self._scale = Parameter([rows, blocks], ir.DataType.FLOAT16 if stored.half else ir.DataType.FLOAT)
        self.parameters = {"ids": self._ids, "quantized": self._quantized, "scale": self._scale}
        self._shape = [rows, hidden_size]
        self._sizes = {"bits": stored.bits, "block_size": stored.block_size}
        self._product = {"K": hidden_size, "N": rows, "accuracy_level": accuracy_level}

    def look_up(self, op: Op, input_ids: Value, found: Value) -> Value:
        """Replaces the embeddings of frequent tokens in `found` (..., D), the embeddings of ids (...).

        Comparing ids with all F of them takes less than a map of V entries would take in the file, and little time.
        """
        matches = op.Equal(op.Unsqueeze(input_ids, [-1]), self._ids)  # (..., F)
        row = op.ArgMax(op.Cast(matches, to=ir.DataType.FLOAT), axis=-1, keepdims=0)  # 0 if the token is not frequent
        frequent = op.Equal(op.Gather(self._ids, row, axis=0), input_ids)
        table = op.Reshape(self._quantized, self._shape)
        exact = fused(op).GatherBlockQuantized(table, row, self._scale, gather_axis=0, quantize_axis=1, **self._sizes)
        return op.Where(op.Unsqueeze(frequent, [-1]), exact, found)

    def logits(self, op: Op, hidden: Value, found: Value) -> Value:
        """Replaces the logits of frequent tokens in `found` (..., V), the logits of hidden states (..., D)."""
        exact = fused(op).MatMulNBits(hidden, self._quantized, self._scale, **self._product, **self._sizes)  # (..., F)
        return op.ScatterElements(found, op.Expand(self._ids, op.Shape(exact)), exact, axis=-1)
