"""The only module that uses onnxscript's graph builder. Its API is young, so changes to it stay in one place."""

from collections.abc import Callable
from typing import Any, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder, OpBuilder
from onnxscript.nn import Module, ModuleList, Parameter

from slm.core.contract import TensorSpec

__all__ = [
    "DTYPES",
    "Array",
    "GraphUnderWay",
    "Module",
    "ModuleList",
    "Op",
    "Parameter",
    "Value",
    "branch",
    "cast",
    "fused",
]

Array = NDArray[Any]
Op: TypeAlias = OpBuilder
Value: TypeAlias = ir.Value

# The first IR version that supports the opset. Older readers cannot run the graph anyway.
_IR_VERSIONS = {21: 10, 23: 11}
DTYPES = {
    "int64": ir.DataType.INT64,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
}


def fused(op: Op) -> Op:
    """Returns the builder of onnxruntime's own operators (domain com.microsoft)."""
    return op.builder.opset("com.microsoft", 1)


def cast(op: Op, x: Value, have: ir.DataType, want: ir.DataType) -> Value:
    """Returns x cast to a type, or x itself if it already has that type."""
    return x if have == want else op.Cast(x, to=want)


def branch(op: Op, name: str, make: Callable[[Op], Value]) -> ir.Graph:
    """Returns a branch of an If. It can read all values that exist before it; its constants lie in the main graph.

    Args:
        op: The builder of the graph around the branch.
        name: The name of the branch, unique in the graph.
        make: Adds the nodes of the branch with a builder, and returns the result.
    """
    return op.builder.subgraph(make, [], [ir.Value(name=f"{name}.result")], name=name)


class GraphUnderWay:
    """A graph under construction: its inputs by name, its operator builder, and its outputs in order."""

    def __init__(
        self, name: str, opsets: dict[str, int], inputs: tuple[TensorSpec, ...], defaults: dict[str, Array]
    ) -> None:
        graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name=name)
        self._ir_version = _IR_VERSIONS[opsets[""]]
        self._builder = GraphBuilder(graph)
        self.op: Op = self._builder.op
        self.inputs: dict[str, Value] = {}
        for spec in inputs:
            default = ir.tensor(defaults[spec.name], name=spec.name) if spec.optional else None
            shape = spec.shape if default is None else default.shape
            value = self._builder.input(spec.name, dtype=DTYPES[spec.dtype], shape=shape, const_value=default)
            value.shape = ir.Shape(
                spec.shape
            )  # symbolic again: a caller's value may have another size than the default
            self.inputs[spec.name] = value

    def output(self, value: Value, spec: TensorSpec) -> None:
        """Makes a value an output of the graph."""
        value.dtype = DTYPES[spec.dtype]
        value.shape = ir.Shape(spec.shape)
        self._builder.add_output(value, spec.name)

    def finish(self, producer_version: str) -> ir.Model:
        """Returns the model. The caller sets the data of its parameters."""
        return ir.Model(
            self._builder.graph, ir_version=self._ir_version, producer_name="slm", producer_version=producer_version
        )
