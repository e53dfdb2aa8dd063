"""The plan of a table whose upper and lower four bits are stored apart; see `slm.export.graph.halves`."""

from typing import Any

from slm.core.config import ModelConfig
from slm.core.contract import LOGITS_TO_KEEP, head_parts
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import FLOAT, MICROSOFT, UINT8
from slm.core.graph_plan.kind import Kind


class HalvesEmbedding:
    """A table in halves for the lookup and the tied head."""

    def __init__(self, path: str, config: ModelConfig, kind: Kind) -> None:
        """Takes the path of the table, the model's shape, and the properties of the graph."""
        self._vocab_size, self._hidden_size = config.vocab_size, config.hidden_size
        self._block_size = kind.stored(path).block_size
        blocks = self._hidden_size // self._block_size
        self._upper, self._lower = (
            Weight(f"{path}.weight_{part}", UINT8, (self._vocab_size, blocks, self._block_size // 2))
            for part in ("upper", "lower")
        )
        self._scale = Weight(f"{path}.weight_scale", FLOAT, (self._vocab_size, blocks))
        self._shift = Weight(f"{path}.weight_shift", FLOAT, (self._vocab_size,))
        self._product = {
            "K": self._hidden_size,
            "N": self._vocab_size,
            "bits": 4,
            "block_size": self._block_size,
            "accuracy_level": kind.accuracy_level,
        }
        self._lower_rows: Any = None

    def look_up(self, op: Plan, ids: Any) -> Any:
        """Plans the lookup. The head reads the same reshaped lower halves."""
        flat = [self._vocab_size, self._hidden_size // 2]
        above = self._rows(op, op("Reshape", self._upper, flat), ids)
        self._lower_rows = op("Reshape", self._lower, flat)
        below = self._rows(op, self._lower_rows, ids)
        return op("Add", above, op("Mul", below, 1 / 16))

    def head(self, op: Plan, hidden: Any) -> Any:
        """Plans the head, after the lookup."""
        small = op("Mul", hidden, 1 / 16)
        coarse = op("MatMulNBits", hidden, self._upper, self._scale, domain=MICROSOFT, **self._product)
        one_row = op("Equal", op("Size", hidden), self._hidden_size)
        few = op("And", one_row, op("Less", Input(LOGITS_TO_KEEP), 2))
        parts, each = head_parts(self._vocab_size)

        def candidates(op: Plan) -> list[Any]:
            shifted = op("Add", coarse, self._shift)
            columns = op("Reshape", shifted, [-1, parts])
            _, found = op("TopK", columns, [each], axis=0, sorted=0, outputs=2)
            tokens = op("Reshape", op("Add", op("Mul", found, parts), list(range(parts))), [1, 1, -1])
            below = self._lower_product(op, small, op("Reshape", tokens, [-1]))
            gathered = op("GatherElements", coarse, tokens, axis=-1)
            exact = op("Add", gathered, op("Reshape", below, [1, 1, -1]))
            return [op("ScatterElements", shifted, tokens, exact, axis=-1)]

        def whole(op: Plan) -> list[Any]:
            below = op("MatMulNBits", small, self._lower, self._scale, domain=MICROSOFT, **self._product)
            return [op("Add", coarse, below)]

        return op.branches(few, candidates, whole)

    def _lower_product(self, op: Plan, hidden: Any, tokens: Any) -> Any:
        count, half = self._hidden_size // self._block_size, self._block_size // 2
        blocks = op("Reshape", hidden, [count, self._block_size])
        step = op("Mul", op("Max", op("ReduceMax", op("Abs", blocks), [-1], keepdims=1), 1e-30), 1 / 127)
        rounded = op("Mul", op("Round", op("Div", blocks, step)), step)
        even, odd = op("Split", op("Reshape", rounded, [count, half, 2]), num_outputs=2, axis=-1, outputs=2)
        even, odd = op("Reshape", even, [count, half]), op("Reshape", odd, [count, half])
        packed = op("Gather", self._lower_rows, tokens, axis=0)
        both = op("Reshape", op("Cast", packed, to=FLOAT), [-1, count, half])
        upper = op("Floor", op("Mul", both, 1 / 16))
        found = op("Add", op("Mul", both, even), op("Mul", upper, op("Sub", odd, op("Mul", even, 16.0))))
        middle = op("Mul", op("ReduceSum", rounded, [-1], keepdims=0), 8.0)
        by_block = op("Sub", op("ReduceSum", found, [-1], keepdims=0), middle)
        scales = op("Gather", self._scale, tokens, axis=0)
        return op("ReduceSum", op("Mul", by_block, scales), [-1], keepdims=0)

    def _rows(self, op: Plan, table: Any, ids: Any) -> Any:
        sizes = {"bits": 4, "block_size": self._block_size, "gather_axis": 0, "quantize_axis": 1}
        return op("GatherBlockQuantized", table, ids, self._scale, domain=MICROSOFT, **sizes)
