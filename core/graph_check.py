"""Compares a bundle's graph with the planned graph for its configuration (`slm.core.graph_plan`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.graph_file import FileGraph, FileNode, FileTensor, read_graph
from slm.core.graph_nodes import Constant, Input, Node, Output, Subgraph, Value, Weight
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.model import plan_graph

# The limit of elements in a constant. slm writes shapes, starts and ends as constants.
_LONGEST_CONSTANT = 16
# The relative tolerance of numbers, which are stored as float32 or float16.
_RELATIVE = 1e-3
# The limit of a rotation table in bytes. 131,072 positions of Gemma's heads take 67 MB.
_LARGEST_TABLE = 512 << 20
_HINT = (
    "export the bundle again with this version of slm; commands that run a bundle take --trust if you trust its author"
)


class _Foreign(Exception):
    """The graph contains something that slm does not write."""


def check_graph(path: Path, config: ModelConfig, kind: Kind, sizes: Mapping[str, int]) -> None:
    """Checks that a graph is the one that slm writes for a configuration.

    Args:
        path: The `.onnx` file.
        config: The model's shape.
        kind: The other properties that determine the graph.
        sizes: Sizes in bytes of the files in the graph's directory, by the names that the graph uses for them.

    Raises:
        SlmError: If the file is not an ONNX file, or differs from the plan; the message names the first difference.
    """
    if kind.device != "cpu" and kind.context * config.head_dim * 4 > _LARGEST_TABLE:
        raise SlmError(f"{path}: the rotation tables for a context of {kind.context:,} tokens are too large")
    try:
        graph = read_graph(path)
        _Comparison(graph, sizes).run(config, kind)
    except _Foreign as error:
        raise SlmError(f"{path}: {error}", _HINT) from None


class _Comparison:
    """Compares the nodes in order. Each must equal the planned node, and its inputs must be defined before it."""

    def __init__(self, graph: FileGraph, sizes: Mapping[str, int]) -> None:
        self._graph = graph
        self._sizes = sizes
        self._known: dict[str, Value] = {}
        self._used: set[str] = set()

    def run(self, config: ModelConfig, kind: Kind) -> None:
        graph = self._graph
        plan = plan_graph(config, kind, graph.tensors, branching=any(node.type == "If" for node in graph.nodes))
        if graph.opsets != plan.opsets:
            raise _Foreign(f"the graph uses the operator sets {_shown(graph.opsets)}, not {_shown(plan.opsets)}")
        if graph.extras:
            raise _Foreign(f"the graph has {graph.extras[0]}, which slm does not write")
        for name in graph.inputs:
            self._know(name, Input(name))
        self._compare_nodes(graph.nodes, plan.nodes)
        for name, value in plan.outputs.items():
            if self._known.get(name) != value or name not in graph.outputs:
                raise _Foreign(f"the output {name!r} is not the planned value")
        if extra := set(graph.outputs) - set(plan.outputs):
            raise _Foreign(f"slm does not write the output {min(extra)!r}")
        if len(graph.outputs) != len(plan.outputs):
            raise _Foreign("the graph has the same output twice")
        for name, tensor in graph.tensors.items():
            if name in graph.inputs:
                self._check_default(tensor, plan.defaults.get(name))
            elif name not in self._used:
                raise _Foreign(f"no node uses the tensor {name!r}")

    def _compare_nodes(self, nodes: Sequence[FileNode], plan: Sequence[Node], subgraph: str = "") -> None:
        planned = iter(enumerate(plan))
        for node in nodes:
            if node.type == "Constant" and not node.domain and len(node.outputs) == 1 and not node.inputs:
                if node.extras or set(node.attributes) != {"value"}:
                    raise _Foreign(f"the constant {node.name!r} has more than a value")
                self._know(node.outputs[0], self._constant(node.attributes["value"], node))
                continue
            if self._is_cast_constant(node):
                continue
            number, wanted = next(planned, (0, None))
            self._compare(node, wanted, number, subgraph)
        if (missing := next(planned, None)) is not None:
            raise _Foreign(f"the graph ends before its {missing[1].type}")

    def _compare_subgraph(self, found: object, wanted: Subgraph, what: str) -> None:
        """Compares a subgraph. It can use every value that is defined before it, and its own values end with it."""
        if not isinstance(found, FileGraph) or found.tensors or found.inputs or found.extras:
            raise _Foreign(f"a subgraph of {what} has more than nodes and outputs")
        outside = dict(self._known)
        self._compare_nodes(found.nodes, wanted.nodes, wanted.name)
        if [self._known.get(name) for name in found.outputs] != list(wanted.outputs):
            raise _Foreign(f"a subgraph of {what} does not have the planned outputs")
        self._known = outside

    def _know(self, name: str, value: Value) -> None:
        if name in self._known or (name in self._graph.tensors and not isinstance(value, Input)):
            raise _Foreign(f"the graph defines {name!r} twice")
        self._known[name] = value

    def _is_cast_constant(self, node: FileNode) -> bool:
        """Returns whether a node only casts a constant; if so, its output counts as that constant."""
        if node.type != "CastLike" or node.domain or len(node.inputs) != 2 or len(node.outputs) != 1 or node.extras:
            return False
        constant = self._known.get(node.inputs[0])
        if constant is None and node.inputs[0] in self._graph.tensors:
            constant = self._constant(self._graph.tensors[node.inputs[0]], node)
            self._used.add(node.inputs[0])
        if (
            not isinstance(constant, Constant)
            or node.attributes
            or not isinstance(self._known.get(node.inputs[1]), Output)
        ):
            return False
        self._know(node.outputs[0], constant)
        return True

    def _compare(self, node: FileNode, wanted: Node | None, number: int, subgraph: str) -> None:
        kind = f"{node.domain}:{node.type}" if node.domain else node.type
        what = f"the node {node.name or '(unnamed)'!r} ({kind})"
        if wanted is None or (node.type, node.domain) != (wanted.type, wanted.domain):
            where = "after the last planned one" if wanted is None else f"where slm writes {wanted.type}"
            raise _Foreign(f"{what} is {where}")
        if node.extras:
            raise _Foreign(f"{what} has {node.extras[0]}, which slm does not write")
        if set(node.attributes) != set(wanted.attributes):
            raise _Foreign(f"{what} must have the attributes {', '.join(sorted(wanted.attributes)) or 'none'}")
        for name, value in wanted.attributes.items():
            if isinstance(value, Subgraph):
                self._compare_subgraph(node.attributes[name], value, what)
            elif not _same_attribute(node.attributes[name], value):
                raise _Foreign(f"the attribute {name} of {what} has an unexpected value")
        inputs = list(node.inputs)
        while inputs and not inputs[-1]:  # omitted optional inputs at the end
            inputs.pop()
        expected = list(wanted.inputs)
        while expected and expected[-1] is None:
            expected.pop()
        if len(inputs) != len(expected):
            raise _Foreign(f"{what} has {len(inputs)} inputs instead of {len(expected)}")
        for name, value in zip(inputs, expected, strict=True):
            if not self._is(name, value, what):
                raise _Foreign(f"the input {name!r} of {what} is not the planned value")
        if not 1 <= len(node.outputs) <= wanted.outputs:
            raise _Foreign(f"{what} has {len(node.outputs)} outputs instead of {wanted.outputs}")
        for index, name in enumerate(node.outputs):
            if name:
                self._know(name, Output(number, index, subgraph))

    def _is(self, name: str, value: Value | None, what: str) -> bool:
        if not name or value is None:
            return not name and value is None
        if name in self._known:
            known = self._known[name]
            return _same_constant(known, value) if isinstance(known, Constant) else known == value
        tensor = self._graph.tensors.get(name)
        if tensor is None:
            return False
        self._used.add(name)
        if isinstance(value, Weight):
            if (name, tensor.dtype, tensor.shape) != (value.name, value.dtype, value.shape):
                return False
            self._check_data(tensor)
            return True
        return isinstance(value, Constant) and _same_constant(self._constant(tensor, None), value)

    def _constant(self, tensor: Any, node: FileNode | None) -> Constant:
        if not isinstance(tensor, FileTensor) or len(tensor.shape) > 1 or math.prod(tensor.shape) > _LONGEST_CONSTANT:
            name = tensor.name if isinstance(tensor, FileTensor) else node.name if node else ""
            raise _Foreign(f"the constant {name!r} is not a number or a short list")
        numbers = tensor.numbers()
        if numbers is None:
            raise _Foreign(f"the constant {tensor.name!r} does not have its data in the graph")
        return Constant(numbers if tensor.shape else numbers[0])

    def _check_data(self, tensor: FileTensor) -> None:
        size = tensor.bytes
        if tensor.external is None:
            if size is None or len(tensor.raw) != size:
                raise _Foreign(f"the tensor {tensor.name!r} has {len(tensor.raw):,} bytes instead of {size or 0:,}")
            return
        location, offset, length = tensor.external
        there = self._sizes.get(PurePosixPath(location).as_posix(), 0)
        if size is None or (length is not None and length != size) or not 0 <= offset <= there - size:
            raise _Foreign(f"the tensor {tensor.name!r} does not have its {size or 0:,} bytes in {location!r}")

    def _check_default(self, tensor: FileTensor, wanted: Weight | None) -> None:
        """Checks the default of an optional input, which is a number or an adapter of rank 0."""
        if wanted is None or (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            raise _Foreign(f"the default of the input {tensor.name!r} is not the planned value")
        if tensor.external is not None or len(tensor.raw) != tensor.bytes:
            raise _Foreign(f"the default of the input {tensor.name!r} does not have its data in the graph")


def _same_constant(known: Constant, wanted: Value) -> bool:
    if not isinstance(wanted, Constant):
        return False
    if isinstance(known.value, tuple) != isinstance(wanted.value, tuple):
        return False
    found, expected = (value if isinstance(value, tuple) else (value,) for value in (known.value, wanted.value))
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(found: float, wanted: float) -> bool:
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    return math.isclose(found, wanted, rel_tol=_RELATIVE, abs_tol=1e-37)


def _same_attribute(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return isinstance(found, float) and math.isclose(found, wanted, rel_tol=_RELATIVE, abs_tol=1e-37)
    return type(found) is type(wanted) and bool(found == wanted)


def _shown(opsets: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in sorted(opsets.items()))
