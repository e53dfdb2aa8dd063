"""The plan of products, embedding and head: how weights are stored and which operators multiply them.

See `slm.export.graph.formats`. The integers of portable bundles are in `dequantized.py`, a table in halves in `halves.py`, the
rows of frequent tokens in `frequent.py`, and adapter slots in `slots.py`.
"""

from collections.abc import Collection
from typing import Any

from slm.core.config import ModelConfig
from slm.core.graph_nodes import Plan, Weight
from slm.core.graph_plan import dequantized
from slm.core.graph_plan.builder import FLOAT, INT8, MICROSOFT, UINT8, cast
from slm.core.graph_plan.frequent import FrequentRows
from slm.core.graph_plan.halves import HalvesEmbedding
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.slots import slot

_TABLE = "model.embed_tokens"


class WeightFormat:
    """Plans everything that reads weights of products, each with the storage that the manifest has for its path."""

    def __init__(self, config: ModelConfig, kind: Kind, names: Collection[str]) -> None:
        """Takes the model's shape, the other properties of the graph, and the names of its tensors."""
        self._config, self._kind, self._names = config, kind, names
        self._portable = kind.target == "portable"
        self._halves: HalvesEmbedding | None = None

    def linear(self, op: Plan, x: Any, path: str, inputs: int, outputs: int) -> Any:
        """Plans a product, with the adapter's product if the graph has slots."""
        if not self._kind.slots or not path.startswith("model.layers."):
            return self._product(op, x, path, inputs, outputs)
        a, b = slot(op, path, inputs, outputs, self._names)
        product = self._product(op, x, path, inputs, outputs)
        return op("Add", product, op("MatMul", op("MatMul", x, a), b))

    def embedding(self, op: Plan, ids: Any) -> Any:
        """Plans the lookup of ids, in float32."""
        config, stored, dtype = self._config, self._kind.stored(_TABLE), self._kind.dtype(_TABLE)
        rows, hidden_size = config.vocab_size, config.hidden_size
        if not stored.bits:
            weight = Weight(f"{_TABLE}.weight", dtype, (rows, hidden_size))
            return cast(op, op("Gather", weight, ids, axis=0), dtype, FLOAT)
        if self._portable:
            return dequantized.look_up(op, ids, _TABLE, stored, hidden_size, rows)
        if stored.halves:
            self._halves = HalvesEmbedding(_TABLE, config, self._kind)
            return self._halves.look_up(op, ids)
        whole, *others = self._blocks(_TABLE, hidden_size, rows)
        table = op("Reshape", whole, [rows, hidden_size * stored.bits // 8])
        sizes = {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1}
        found = op("GatherBlockQuantized", table, ids, *others, domain=MICROSOFT, **sizes)
        if stored.frequent:
            found = FrequentRows(_TABLE, hidden_size, self._kind).look_up(op, ids, found)
        return cast(op, found, dtype, FLOAT)

    def head(self, op: Plan, hidden: Any) -> Any:
        """Plans the product that computes the logits, after the embedding. Its input and output are float32."""
        config, tied = self._config, self._config.tie_word_embeddings
        path = _TABLE if tied else "lm_head"
        stored = self._kind.stored(path)
        if tied and self._portable and stored.bits:
            return dequantized.head(op, hidden, path, stored, config.hidden_size, config.vocab_size)
        if tied and self._halves is not None:
            return self._halves.head(op, hidden)
        dtype = self._kind.dtype(path)
        hidden = cast(op, hidden, FLOAT, dtype)
        return cast(op, self._product(op, hidden, path, config.hidden_size, config.vocab_size), dtype, FLOAT)

    def _product(self, op: Plan, x: Any, path: str, inputs: int, outputs: int) -> Any:
        stored, level = self._kind.stored(path), self._kind.accuracy_level
        if not stored.bits:
            weight = Weight(f"{path}.weight", self._kind.dtype(path), (outputs, inputs))
            if self._portable:
                return op("Gemm", x, weight, transB=1)
            return op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)
        if stored.dynamic:
            return _dynamic_product(op, x, path, inputs, outputs)
        if self._portable:
            return dequantized.linear(op, x, path, stored, inputs, outputs)
        attributes = {"K": inputs, "N": outputs, "bits": stored.bits, "block_size": stored.block_size}
        tensors = self._blocks(path, inputs, outputs)
        product = op("MatMulNBits", x, *tensors, domain=MICROSOFT, accuracy_level=level, **attributes)
        return FrequentRows(path, inputs, self._kind).logits(op, x, product) if stored.frequent else product

    def _blocks(self, path: str, inputs: int, outputs: int) -> list[Weight]:
        """Returns the tensors of a weight in blocks: integers, scales and, if it has some, zero points."""
        stored = self._kind.stored(path)
        blocks = inputs // stored.block_size
        tensors = [
            Weight(f"{path}.weight_quantized", UINT8, (outputs, blocks, stored.block_size * stored.bits // 8)),
            Weight(f"{path}.weight_scale", self._kind.dtype(path), (outputs, blocks)),
        ]
        points = Weight(f"{path}.weight_zero_points", UINT8, (outputs, -(-blocks * stored.bits // 8)))
        return [*tensors, points] if stored.zero_points else tensors


def _dynamic_product(op: Plan, x: Any, path: str, inputs: int, outputs: int) -> Any:
    """Plans a product of 8-bit integers, whose input gets one scale for each token."""
    largest = op("Max", op("ReduceMax", op("Abs", x), [-1], keepdims=1), 1e-9)
    rounded = op("QuantizeLinear", op("Div", x, largest), 1 / 127, 128)
    weights = Weight(f"{path}.weight_quantized", INT8, (inputs, outputs))
    scales = Weight(f"{path}.weight_scale", FLOAT, (outputs,))
    operands = (rounded, weights, 1 / 127, scales, 128)
    return op("Mul", op("MatMulIntegerToFloat", *operands, domain=MICROSOFT), largest)
