"""Adapter slots of a graph: every product takes LoRA matrices A and B as inputs, which are empty by default.

Dimensions: B batch, T positions.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from slm.core.contract import TensorSpec, slot_names
from slm.core.errors import SlmError
from slm.export.graph.builder import Array, Module, Op, Parameter, Value
from slm.export.graph.formats import Embedding, LinearModule, WeightFormat


class SlottedLinear(Module):
    """y = x Wᵀ + x A B. A and B are scaled by the same smoothing factors as the weight (`slm.quantize.smoothquant`).

    An empty adapter adds zeros.
    """

    def __init__(
        self, inner: LinearModule, a: Value, b: Value, sizes: tuple[int, int], smoothed: tuple[bool, bool]
    ) -> None:
        super().__init__()
        self.dtype = inner.dtype
        self._inner = (inner,)  # in a tuple it is not a child module, so its parameters keep their names
        self._a, self._b = a, b
        self._columns, self._rows = smoothed
        if self._columns:
            self.slot_columns = Parameter([sizes[0], 1], ir.DataType.FLOAT)
        if self._rows:
            self.slot_rows = Parameter([sizes[1]], ir.DataType.FLOAT)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, in) to (B, T, out)."""
        a = op.Mul(self._a, self.slot_columns) if self._columns else self._a
        b = op.Div(self._b, self.slot_rows) if self._rows else self._b
        return op.Add(self._inner[0](op, x), op.MatMul(op.MatMul(x, a), b))


class SlotFormat:
    """Adds adapter slots to the linear layers of another format. The embedding has no slot."""

    def __init__(
        self, inner: WeightFormat, columns: Mapping[str, Array] | None = None, rows: Mapping[str, Array] | None = None
    ) -> None:
        """Takes the format to extend, and the smoothing factors of columns and rows by name of the weight."""
        self._inner = inner
        self._factors = columns or {}, rows or {}
        self._inputs: Mapping[str, Value] = {}

    def bind(self, inputs: Mapping[str, Value]) -> None:
        """Takes the graph's inputs. Must be called before the modules are created."""
        self._inputs = inputs

    def linear(self, path: str, in_features: int, out_features: int) -> LinearModule:
        """Returns a linear layer with a slot, or without one if the graph has no adapter inputs for it (the head)."""
        linear = self._inner.linear(path, in_features, out_features)
        a, b = slot_names(path)
        if a not in self._inputs:
            return linear
        columns, rows = (f"{path}.weight" in factors for factors in self._factors)
        return SlottedLinear(linear, self._inputs[a], self._inputs[b], (in_features, out_features), (columns, rows))

    def embedding(self, path: str, vocab_size: int, hidden_size: int) -> Embedding:
        """Returns the inner format's embedding."""
        return self._inner.embedding(path, vocab_size, hidden_size)

    @property
    def tensors(self) -> dict[str, Array]:
        """The data of the parameters that slots add, by name."""
        columns, rows = self._factors
        found = {f"{name.removesuffix('.weight')}.slot_columns": array[:, None] for name, array in columns.items()}
        products = {name: array for name, array in rows.items() if name in columns}  # norms have rows only
        return found | {f"{name.removesuffix('.weight')}.slot_rows": array for name, array in products.items()}


def empty(spec: TensorSpec) -> Array:
    """Returns the default of an adapter input: a matrix of rank 0."""
    first, second = (size if isinstance(size, int) else 0 for size in spec.shape[1:])
    return np.zeros((1, first, second), np.float32)


def check_slots(target: str, device: str) -> None:
    """Checks that a target and device support adapter slots.

    Raises:
        SlmError: If the target is not "fused" or the device is not "cpu".
    """
    if (target, device) != ("fused", "cpu"):
        raise SlmError(
            "only fused bundles for the CPU support adapter slots", "merge the adapter: slm export --onnx --adapter DIR"
        )
