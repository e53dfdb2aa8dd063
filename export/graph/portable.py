"""The portable target: only standard ONNX operators, and caches that start empty and grow.

Any runtime with opset 23 can run the graph. It has no position input: positions are counted from the mask, so rows may be
padded on either side. Hidden states are (B * T, D), so that every linear layer is one Gemm with the weight as stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from slm.core.config import FULL, SLIDING, Activation, LayerType, ModelConfig
from slm.core.contract import ATTENTION_MASK, INPUT_IDS, CacheLayer, cache_layers, past_name
from slm.export.graph.builder import Op, Value
from slm.export.graph.formats import WeightFormat
from slm.export.graph.target import AttentionLayer, RotaryModule, last_rows, total_length

_TO_THE_END = (1 << 63) - 1


@dataclass(frozen=True)
class Step:
    """Values that all layers share in one step.

    Attributes:
        inputs: The graph's inputs.
        cos: Cosine of the new positions' rotations, (B, T, H / 2), by kind of layer.
        sin: Sine of the new positions' rotations, (B, T, H / 2), by kind of layer.
        mask: True where a new position attends to a cached or new position, bool (B, 1, T, positions), by kind of layer.
        heads: The shape (B, T, N, H).
        kv_heads: The shape (B, T, K, H).
        ends: End of the valid new positions of each row, (B,).
    """

    inputs: Mapping[str, Value]
    cos: Mapping[LayerType, Value]
    sin: Mapping[LayerType, Value]
    mask: Mapping[LayerType, Value]
    heads: Value
    kv_heads: Value
    ends: Value


class PortablePositions(RotaryModule):
    """Computes positions, rotations and masks of the new tokens from the mask and the lengths of the caches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._config = config

    def forward(self, op: Op, inputs: Mapping[str, Value]) -> Step:
        """Returns the shared values of the step."""
        config, mask = self._config, inputs[ATTENTION_MASK]
        batch_new = op.Shape(inputs[INPUT_IDS])  # (2,): B, T
        total = total_length(op, inputs)
        past = op.Sub(total, op.Shape(inputs[INPUT_IDS], start=1, end=2))
        counted = op.Max(op.Sub(op.CumSum(mask, 1), 1), 0)  # (B, L)
        positions = op.Cast(op.Slice(counted, past, total, [1]), to=ir.DataType.FLOAT)  # (B, T)
        cos, sin = {}, {}
        for kind in self._kinds:
            angles = self._angles(op, op.Unsqueeze(positions, [-1]), kind)  # (B, T, H / 2)
            cos[kind], sin[kind] = op.Cos(angles), op.Sin(angles)
        new_mask = op.Slice(mask, past, total, [1])  # (B, T)
        return Step(
            inputs,
            cos,
            sin,
            self._masks(op, inputs, past, total),
            heads=op.Concat(batch_new, [config.num_attention_heads, config.head_dim], axis=0),
            kv_heads=op.Concat(batch_new, [config.num_key_value_heads, config.head_dim], axis=0),
            ends=op.Add(op.ArgMax(new_mask, axis=1, keepdims=0, select_last_index=1), 1),
        )

    def _masks(self, op: Op, inputs: Mapping[str, Value], past: Value, total: Value) -> dict[LayerType, Value]:
        """Returns the attention mask for each kind of layer.

        A position attends to the valid positions up to itself and always to itself: attention of a padding position to
        nothing would be NaN.
        """
        slots = op.Range(0, op.Squeeze(total), 1)  # (L,)
        back = op.Sub(op.Unsqueeze(op.Slice(slots, past, total, [0]), [-1]), slots)  # (T, L)
        valid = op.Cast(op.Unsqueeze(inputs[ATTENTION_MASK], [1, 2]), to=ir.DataType.BOOL)  # (B, 1, 1, L)
        seen = op.Or(op.And(op.GreaterOrEqual(back, 0), valid), op.Equal(back, 0))  # (B, 1, T, L)
        masks: dict[LayerType, Value] = {FULL: seen} if FULL in self._kinds else {}
        if SLIDING in self._kinds:
            near = op.And(seen, op.Less(back, self._config.sliding_window))
            cached = op.Shape(inputs[past_name(self._config.layer_types.index(SLIDING), "key")], start=2, end=3)
            masks[SLIDING] = op.Slice(near, op.Sub(past, cached), total, [3])  # drops positions outside the cache
        return masks


class Portable:
    """The target for standard operators."""

    quantized_cache = False
    dtype = ir.DataType.FLOAT

    def __init__(self, weights: WeightFormat) -> None:
        self.opsets = {"": 23}
        self.weights = weights

    def caches(self, config: ModelConfig) -> tuple[CacheLayer, ...]:
        """Returns the caches in the order of inputs and outputs."""
        return cache_layers(config)

    def positions(self, config: ModelConfig, context: int) -> PortablePositions:
        """Returns the module that computes a step's shared values. It does not depend on the context."""
        return PortablePositions(config)

    def rms_norm(self, op: Op, x: Value, weight: Value, epsilon: float) -> Value:
        """Returns the root-mean-square norm of x over its last dimension."""
        return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_rms_norm(self, op: Op, x: Value, update: Value, weight: Value, epsilon: float) -> tuple[Value, Value]:
        """Returns the norm of x + update, and x + update."""
        total = op.Add(x, update)
        return self.rms_norm(op, total, weight, epsilon), total

    def normed_as(self, op: Op, product: Value, dtype: ir.DataType) -> Value:
        """Returns the product unchanged, because all products are float32."""
        return product

    def activate(self, op: Op, name: Activation, x: Value) -> Value:
        """Applies an activation."""
        match name:
            case "gelu_pytorch_tanh":
                return op.Gelu(x, approximate="tanh")
            case "gelu":
                return op.Gelu(x)
            case "silu":
                return op.Mul(x, op.Sigmoid(x))
            case "relu":
                return op.Relu(x)

    def attend(
        self, op: Op, qkv: Value, layer: AttentionLayer, step: Step, past: tuple[Value, Value]
    ) -> tuple[Value, Value, Value]:
        """Norms each head, rotates, and attends to cached and new positions."""
        shape, (norm_q, norm_k) = layer.shape, layer.norms
        q, k, v = op.Split(qkv, shape.sizes, axis=-1, _outputs=3)
        q, k, v = (op.Reshape(x, to) for x, to in ((q, step.heads), (k, step.kv_heads), (v, step.kv_heads)))
        q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (norm_q(op, q), norm_k(op, k), v))  # (B, heads, T, H)
        q, k = (op.RotaryEmbedding(x, step.cos[shape.kind], step.sin[shape.kind]) for x in (q, k))
        attended, key, value = op.Attention(
            q, k, v, step.mask[shape.kind], *past, scale=shape.scale, _outputs=3
        )  # (B, N, T, H), (B, K, positions, H) twice
        if shape.window is not None:  # the next token attends to itself and the window - 1 positions before it
            start = 1 - shape.window or _TO_THE_END
            key, value = (op.Slice(x, [start], [_TO_THE_END], [2]) for x in (key, value))
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [-1, shape.sizes[0]]), key, value

    def arranged(self, op: Op, input_ids: Value) -> Value:
        """Returns the ids as (B * T,)."""
        return op.Reshape(input_ids, [-1])

    def kept(self, op: Op, hidden: Value, step: Step) -> Value:
        """Returns the hidden states (B * kept, D) of each row's last valid positions."""
        batch_new = op.Shape(step.inputs[INPUT_IDS])
        rows = last_rows(op, op.Reshape(hidden, op.Concat(batch_new, [-1], axis=0)), step.inputs, step.ends)
        return op.Reshape(rows, op.Concat([-1], op.Shape(rows, start=2, end=3), axis=0))

    def logits(self, op: Op, logits: Value, step: Step, vocab_size: int) -> Value:
        """Returns the logits (B * kept, V) as (B, kept, V)."""
        batch = op.Shape(step.inputs[INPUT_IDS], start=0, end=1)
        return op.Reshape(logits, op.Concat(batch, [-1, vocab_size], axis=0))
