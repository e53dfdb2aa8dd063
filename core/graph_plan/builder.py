"""The operator domain, the type numbers and the cast that the plan uses. `slm.core.graph_nodes.Plan` adds the nodes."""

from typing import Any

from slm.core.graph_nodes import Plan

# The domain of onnxruntime's own operators.
MICROSOFT = "com.microsoft"
# Type numbers of ONNX (onnx.proto, TensorProto.DataType).
FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 9, 10, 21, 22


def cast(op: Plan, x: Any, have: int, want: int) -> Any:
    """Casts x from one type to another; returns x unchanged if both are the same."""
    return x if have == want else op("Cast", x, to=want)
