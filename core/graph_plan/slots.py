"""The plan of adapter slots: every product takes LoRA matrices A and B as inputs; see `slm.export.graph.slots`."""

from collections.abc import Collection
from typing import Any

from slm.core.contract import slot_names
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import FLOAT


def slot(op: Plan, path: str, inputs: int, outputs: int, names: Collection[str]) -> tuple[Any, Any]:
    """Plans A and B of a product, and their defaults, which are empty.

    Args:
        op: The plan.
        path: The path of the product.
        inputs: Its number of input channels.
        outputs: Its number of output channels.
        names: The names of the graph's tensors. A and B are scaled by the smoothing factors that are among them.

    Returns:
        A and B.
    """
    a, b = (Input(name) for name in slot_names(path))
    for each, shape in ((a, (1, inputs, 0)), (b, (1, 0, outputs))):  # an adapter of rank 0
        op.defaults[each.name] = Weight(each.name, FLOAT, shape)
    columns, rows = f"{path}.slot_columns", f"{path}.slot_rows"
    left: Any = op("Mul", a, Weight(columns, FLOAT, (inputs, 1))) if columns in names else a
    right: Any = op("Div", b, Weight(rows, FLOAT, (outputs,))) if rows in names else b
    return left, right
