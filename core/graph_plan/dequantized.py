"""The plan of integer weights of the portable target: dequantized by a standard operator; see `slm.export.graph.dequantized`.

A weight is stored by columns, and the table of the embedding by rows.
"""

from typing import Any

from slm.core.graph_nodes import Plan, Weight
from slm.core.graph_plan.builder import FLOAT, INT4, INT8, UINT4, UINT8
from slm.core.graph_plan.kind import Stored


def integers(path: str, stored: Stored, inputs: int, outputs: int, by_columns: bool) -> list[Weight]:
    """Returns the tensors of a weight: integers, scales and, if it has some, zero points."""
    dtype = (UINT4 if stored.bits == 4 else UINT8) if stored.zero_points else (INT4 if stored.bits == 4 else INT8)
    whole, scales = (outputs, inputs), (outputs, inputs // stored.block_size)
    if by_columns:
        whole, scales = whole[::-1], scales[::-1]
    tensors = [Weight(f"{path}.weight_quantized", dtype, whole), Weight(f"{path}.weight_scale", FLOAT, scales)]
    points = Weight(f"{path}.weight_zero_points", dtype, scales)
    return [*tensors, points] if stored.zero_points else tensors


def linear(op: Plan, x: Any, path: str, stored: Stored, inputs: int, outputs: int) -> Any:
    """Plans a product."""
    tensors = integers(path, stored, inputs, outputs, by_columns=True)
    return op("MatMul", x, op("DequantizeLinear", *tensors, axis=0, block_size=stored.block_size))


def look_up(op: Plan, ids: Any, path: str, stored: Stored, hidden_size: int, vocab_size: int) -> Any:
    """Plans a lookup, which dequantizes only the gathered rows."""
    tensors = integers(path, stored, hidden_size, vocab_size, by_columns=False)
    taken = [op("Gather", each, ids, axis=0) for each in tensors]
    return op("DequantizeLinear", *taken, axis=1, block_size=stored.block_size)


def head(op: Plan, hidden: Any, path: str, stored: Stored, hidden_size: int, vocab_size: int) -> Any:
    """Plans the tied head, which reads the transposed table."""
    tensors = integers(path, stored, hidden_size, vocab_size, by_columns=False)
    columns = [op("Transpose", each, perm=[1, 0]) for each in tensors]
    return op("MatMul", hidden, op("DequantizeLinear", *columns, axis=0, block_size=stored.block_size))
