"""The interface of a target, which plans operators; see `slm.export.graph.target`.

The targets are in `fused.py` and `portable.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from slm.core.config import LayerType, ModelConfig
from slm.core.contract import INPUT_IDS, LOGITS_TO_KEEP
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import FLOAT
from slm.core.graph_plan.formats import WeightFormat
from slm.core.graph_plan.kind import Kind

Norm = Callable[[Plan, Any], Any]


@dataclass
class Step:
    """Values that all layers share in one step; `Step` in `slm.export.graph.fused` and in `portable` has their shapes.

    Both targets set `cos` and `sin`. The fused target also sets `rows`, `lengths`, `last_index`, `total` and `few`. The
    portable target also sets `mask`, `heads`, `kv_heads` and `ends`.
    """

    cos: dict[LayerType, Any] = field(default_factory=dict)
    sin: dict[LayerType, Any] = field(default_factory=dict)
    mask: dict[LayerType, Any] = field(default_factory=dict)
    rows: Any = None
    lengths: Any = None
    last_index: Any = None
    total: Any = None
    few: Any = None
    heads: Any = None
    kv_heads: Any = None
    ends: Any = None


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention, apart from its products.

    Attributes:
        number: The number of the layer.
        path: The path of the attention module.
        norms: The norms of queries and keys.
        dtype: The type number of the joint product of q, k and v.
    """

    number: int
    path: str
    norms: tuple[Norm, Norm]
    dtype: int


class Operators(Protocol):
    """The operators of a target, with the properties and the weights of its graph."""

    opsets: dict[str, int]
    kind: Kind
    weights: WeightFormat

    def positions(self, op: Plan) -> Step:
        """Plans the values that all layers share in one step."""

    def rms_norm(self, op: Plan, x: Any, weight: Weight, epsilon: float) -> Any:
        """Plans the root-mean-square norm of x over its last dimension."""

    def add_rms_norm(self, op: Plan, x: Any, update: Any, weight: Weight, epsilon: float) -> tuple[Any, Any]:
        """Plans the norm of x + update, and x + update."""

    def activate(self, op: Plan, x: Any) -> Any:
        """Plans the activation of the configuration."""

    def attend(
        self, op: Plan, qkv: tuple[Any, Any, Any], layer: AttentionLayer, step: Step, past: list[Input]
    ) -> tuple[Any, Any, Any]:
        """Plans the norms of queries and keys, their rotation, and attention.

        Returns:
            The attention output, and the present keys and values.
        """

    def arranged(self, op: Plan) -> Any:
        """Plans the input of the embedding."""

    def kept(self, op: Plan, hidden: Any, step: Step) -> Any:
        """Plans the selection of the hidden states for which the caller requests logits."""

    def logits(self, op: Plan, logits: Any) -> Any:
        """Plans the last reshape of the logits."""


def frequencies(config: ModelConfig) -> Iterator[tuple[LayerType, Weight]]:
    """Yields the tensor of rotation frequencies of each kind of layer, (H / 2,)."""
    for kind in sorted(set(config.layer_types)):
        yield kind, Weight(f"positions.{kind}_inv_freq", FLOAT, (config.head_dim // 2,))


def last_rows(op: Plan, hidden: Any, ends: Any) -> Any:
    """Plans the selection of each row's last valid positions; `ends` is the end of the valid new positions of each row."""
    keep = Input(LOGITS_TO_KEEP)
    new = op("Squeeze", op("Shape", Input(INPUT_IDS), start=1, end=2))
    everything = op("Equal", keep, 0)
    kept = op("Where", everything, new, op("Min", keep, new))
    first = op("Where", everything, 0, op("Max", op("Sub", ends, kept), 0))
    rows = op("Add", op("Unsqueeze", first, [-1]), op("Range", 0, kept, 1))
    return op("GatherND", hidden, op("Unsqueeze", rows, [-1]), batch_dims=1)
