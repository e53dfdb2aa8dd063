"""The graph that a file must have, as data: nodes in order with their inputs. `slm.core.graph_plan` builds it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Output:
    """An output of a node, by the node's index in the plan, or in a subgraph of the plan."""

    node: int
    index: int = 0
    subgraph: str = ""


@dataclass(frozen=True)
class Input:
    """An input of the graph."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, with its ONNX type number and shape."""

    name: str
    dtype: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A number or a short list of numbers."""

    value: float | tuple[float, ...]


Value: TypeAlias = Output | Input | Weight | Constant


@dataclass(frozen=True)
class Node:
    """A node: its operator, inputs (None if omitted), number of outputs, and attributes."""

    type: str
    domain: str
    inputs: tuple[Value | None, ...]
    outputs: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Subgraph:
    """An attribute with a graph: its nodes in order and its outputs. `name` is unique in the plan."""

    name: str
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]


@dataclass
class Plan:
    """A graph under construction.

    Attributes:
        opsets: Versions of the operator sets, by domain.
        nodes: The nodes in order.
        outputs: The graph's outputs, by name.
        defaults: The defaults of optional inputs, by name.
        subgraph: The name of the subgraph that the plan describes; empty for the graph of the file.
    """

    opsets: dict[str, int]
    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    defaults: dict[str, Weight] = field(default_factory=dict)
    subgraph: str = ""

    def __call__(self, type: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds a node and returns its output, or a tuple of outputs. Numbers and lists become constants."""
        self.nodes.append(Node(type, domain, tuple(map(_value, inputs)), outputs, attributes))
        made = tuple(Output(len(self.nodes) - 1, index, self.subgraph) for index in range(outputs))
        return made if outputs > 1 else made[0]

    def branches(self, condition: Any, then: Callable[["Plan"], Any], otherwise: Callable[["Plan"], Any]) -> Any:
        """Adds a node that evaluates one of two subgraphs, and returns its outputs."""
        graphs = []
        for name, body in (("then_branch", then), ("else_branch", otherwise)):
            inner = Plan(self.opsets, subgraph=f"{len(self.nodes)}.{name}")
            outputs = body(inner)
            graphs.append(Subgraph(inner.subgraph, tuple(inner.nodes), tuple(outputs)))
        then_branch, else_branch = graphs
        count = len(then_branch.outputs)
        return self("If", condition, outputs=count, then_branch=then_branch, else_branch=else_branch)


def _value(given: Any) -> Value | None:
    if isinstance(given, list):
        return Constant(tuple(given))
    return Constant(given) if isinstance(given, int | float) else given
