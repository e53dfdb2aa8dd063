"""The interface of a target, which supplies the operators of a graph.

The modules (`modules.py`) are the same for every target. They get norms, attention, activations and products from the target.
A target keeps hidden states as (B, T, D) or as (B * T, D); modules do not depend on it.
Dimensions: B batch, T new positions, L all positions, N heads, K kv heads, H head dim, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from slm.core.config import Activation, LayerType, ModelConfig
from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS_TO_KEEP, CacheLayer
from slm.export.graph.builder import Array, Module, Op, Parameter, Value
from slm.export.graph.formats import WeightFormat

Norm = Callable[[Op, Value], Value]


@dataclass(frozen=True)
class AttentionShape:
    """The dimensions of one layer's attention. `window` is None for global attention."""

    kind: LayerType
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "AttentionShape":
        """Returns the shape of a layer's attention."""
        return cls(
            config.layer_types[layer],
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.query_pre_attn_scalar**-0.5,
            config.window(layer),
        )

    @property
    def sizes(self) -> list[int]:
        """The widths of q, k and v in their joint product."""
        return [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer's attention consists of, apart from its products.

    Attributes:
        shape: The dimensions.
        norms: The norms of queries and keys.
        dtype: The type of the joint product of q, k and v.
        scales: Scales of quantized keys and values, (1, K, 1, H) each; empty if caches are not quantized.
    """

    shape: AttentionShape
    norms: tuple[Norm, Norm]
    dtype: ir.DataType
    scales: tuple[Value, ...]


S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Positions(Protocol[S_co]):
    """A module that computes the values that all layers share in one step. `tensors` is the data of its parameters."""

    tensors: Mapping[str, Array]

    def __call__(self, op: Op, inputs: Mapping[str, Value]) -> S_co:
        """Returns the shared values of the step."""


class Operators(Protocol[S]):
    """The operators of a target. `S` is the type of a step's shared values."""

    opsets: dict[str, int]
    weights: WeightFormat
    quantized_cache: bool
    dtype: ir.DataType

    def caches(self, config: ModelConfig) -> tuple[CacheLayer, ...]:
        """Returns the caches in the order of inputs and outputs."""

    def positions(self, config: ModelConfig, context: int) -> Positions[S]:
        """Returns the module that computes a step's shared values; `context` is the longest sequence, past included."""

    def rms_norm(self, op: Op, x: Value, weight: Value, epsilon: float) -> Value:
        """Returns the root-mean-square norm of x over its last dimension."""

    def add_rms_norm(self, op: Op, x: Value, update: Value, weight: Value, epsilon: float) -> tuple[Value, Value]:
        """Returns the norm of x + update, and x + update."""

    def normed_as(self, op: Op, product: Value, dtype: ir.DataType) -> Value:
        """Casts a product of type `dtype` to the input type of the norm after it."""

    def activate(self, op: Op, name: Activation, x: Value) -> Value:
        """Applies an activation."""

    def attend(
        self,
        op: Op,
        qkv: Value,
        layer: AttentionLayer,
        step: S,
        past: tuple[Value, Value],
    ) -> tuple[Value, Value, Value]:
        """Norms queries and keys, rotates them, and attends.

        Args:
            op: The builder.
            qkv: The joint product, in the layout of hidden states.
            layer: The layer's dimensions, norms and scales.
            step: The step's shared values, from `positions`.
            past: Cached keys and values.

        Returns:
            The attention output, as wide as the queries and of the target's type, and the present keys and values.
        """

    def arranged(self, op: Op, input_ids: Value) -> Value:
        """Reshapes ids (B, T) so that their embeddings have the layout of hidden states."""

    def kept(self, op: Op, hidden: Value, step: S) -> Value:
        """Returns the hidden states of each row's last valid positions, for which the caller requests logits."""

    def logits(self, op: Op, logits: Value, step: S, vocab_size: int) -> Value:
        """Reshapes the output of the head to (B, kept, V)."""


class RotaryModule(Module):
    """The part of `Positions` that every target shares: the rotation frequencies of each kind of layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._kinds: list[LayerType] = sorted(set(config.layer_types))
        self.tensors: dict[str, Array] = {}
        for kind in self._kinds:
            self.tensors[f"{kind}_inv_freq"] = inverse_frequencies(config, kind)
            setattr(self, f"{kind}_inv_freq", Parameter([config.head_dim // 2], ir.DataType.FLOAT))

    def _angles(self, op: Op, positions: Value, kind: LayerType) -> Value:
        """Returns the angles (..., H / 2) of positions (..., 1) in radians."""
        return op.Mul(positions, getattr(self, f"{kind}_inv_freq"))


def inverse_frequencies(config: ModelConfig, kind: LayerType) -> Array:
    """Returns the rotation of each pair of channels in radians per position, float32 (H / 2,)."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    rope = config.rope_parameters[kind]
    frequencies: Array = (rope.rope_theta**-exponents / rope.factor).astype(np.float32)
    return frequencies


def last_rows(op: Op, hidden: Value, inputs: Mapping[str, Value], ends: Value) -> Value:
    """Returns the hidden states (B, kept, D) of each row's last valid positions.

    Args:
        op: The builder.
        hidden: Hidden states (B, T, D).
        inputs: The graph's inputs.
        ends: End of the valid new positions of each row, (B,).
    """
    new = op.Squeeze(op.Shape(inputs[INPUT_IDS], start=1, end=2))  # T, scalar
    keep = inputs[LOGITS_TO_KEEP]
    everything = op.Equal(keep, 0)
    kept = op.Where(everything, new, op.Min(keep, new))
    first = op.Where(everything, 0, op.Max(op.Sub(ends, kept), 0))  # (B,)
    rows = op.Add(op.Unsqueeze(first, [-1]), op.Range(0, kept, 1))  # (B, kept)
    return op.GatherND(hidden, op.Unsqueeze(rows, [-1]), batch_dims=1)


def total_length(op: Op, inputs: Mapping[str, Value]) -> Value:
    """Returns L, the length of the longest row, past included, as (1,)."""
    return op.Shape(inputs[ATTENTION_MASK], start=1, end=2)
