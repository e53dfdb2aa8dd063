"""The plan of the rows of frequent tokens, which are stored in 8 bits as well; see `slm.export.graph.frequent`."""

from typing import Any

from slm.core.graph_nodes import Plan, Weight
from slm.core.graph_plan.builder import FLOAT, INT64, MICROSOFT, UINT8
from slm.core.graph_plan.kind import Kind


class FrequentRows:
    """The 8-bit rows of a table, and the ids of their tokens."""

    def __init__(self, path: str, hidden_size: int, kind: Kind) -> None:
        """Takes the path of the table, its number of columns, and the properties of the graph."""
        stored = kind.stored(path)
        rows, blocks = stored.frequent, hidden_size // stored.block_size
        self._ids = Weight(f"{path}.frequent_ids", INT64, (rows,))
        self._quantized = Weight(f"{path}.frequent_quantized", UINT8, (rows, blocks, stored.block_size))
        self._scale = Weight(f"{path}.frequent_scale", kind.dtype(path), (rows, blocks))
        self._shape = [rows, hidden_size]
        self._sizes = {"bits": 8, "block_size": stored.block_size}
        self._product = {"K": hidden_size, "N": rows, "accuracy_level": kind.accuracy_level}

    def look_up(self, op: Plan, ids: Any, found: Any) -> Any:
        """Plans the replacement of the embeddings of frequent tokens in `found`."""
        matches = op("Equal", op("Unsqueeze", ids, [-1]), self._ids)
        row = op("ArgMax", op("Cast", matches, to=FLOAT), axis=-1, keepdims=0)
        frequent = op("Equal", op("Gather", self._ids, row, axis=0), ids)
        table = op("Reshape", self._quantized, self._shape)
        sizes = {"gather_axis": 0, "quantize_axis": 1, **self._sizes}
        exact = op("GatherBlockQuantized", table, row, self._scale, domain=MICROSOFT, **sizes)
        return op("Where", op("Unsqueeze", frequent, [-1]), exact, found)

    def logits(self, op: Plan, hidden: Any, found: Any) -> Any:
        """Plans the replacement of the logits of frequent tokens in `found`."""
        operands = (hidden, self._quantized, self._scale)
        exact = op("MatMulNBits", *operands, domain=MICROSOFT, **self._product, **self._sizes)
        return op("ScatterElements", found, op("Expand", self._ids, op("Shape", exact)), exact, axis=-1)
