"""The decoder's modules, one for one those of `core/nn`: read side by side, they match.

What differs is what the runtime's kernels want: q, k, v as one product and gate, up as one product; norm weights with
the 1 already added; each residual sum made together with the norm that follows it; rotation, cache update and
attention in one operator. Dimensions: B batch, T positions, N heads, K kv heads, H head dim, D hidden, F intermediate.
"""

from dataclasses import dataclass

import onnx_ir as ir

from slm.core.config import SLIDING, Activation, ModelConfig
from slm.export.graph.builder import Module, Op, Parameter, Value, fused
from slm.export.graph.formats import WeightFormat


@dataclass(frozen=True)
class Positions:
    """What a kind of layer needs to know of where the new tokens stand.

    Attributes:
        cos: Cosine of each position's rotation, (positions, H/2).
        sin: Sine of each position's rotation, (positions, H/2).
        last_index: Index of each row's last valid position, int32 (B,).
        total: Length of the longest row, past included, int32 scalar.
    """

    cos: Value
    sin: Value
    last_index: Value
    total: Value


class RMSNorm(Module):
    """Root-mean-square norm, alone or on the sum of a residual stream and an update to it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter([dim], ir.DataType.FLOAT)
        self._eps = eps

    def forward(self, op: Op, x: Value, update: Value | None = None) -> tuple[Value, Value]:
        """Returns the norm of x (+ update) and x (+ update) itself, both in the shape of x."""
        if update is None:
            return op.SimplifiedLayerNormalization(x, self.weight, axis=-1, epsilon=self._eps, stash_type=1), x
        normed, _, _, total = fused(op).SkipSimplifiedLayerNormalization(
            x, update, self.weight, epsilon=self._eps, _outputs=4
        )
        return normed, total


class Attention(Module):
    """Grouped-query attention with QK-norm before rotation (com.microsoft GroupQueryAttention)."""

    def __init__(self, config: ModelConfig, layer: int, weights: WeightFormat) -> None:
        super().__init__()
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._q_size, self._kv_size = (n * config.head_dim for n in (self._heads, self._kv_heads))
        self.qkv_proj = weights.linear(config.hidden_size, self._q_size + 2 * self._kv_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.o_proj = weights.linear(self._q_size, config.hidden_size)
        self._attributes = {
            "num_heads": self._heads,
            "kv_num_heads": self._kv_heads,
            "scale": config.query_pre_attn_scalar**-0.5,
            "do_rotary": 1,
        }
        if config.layer_types[layer] == SLIDING:
            self._attributes |= {"local_window_size": config.sliding_window, "sliding_window_cache": 1}

    def forward(self, op: Op, x: Value, positions: Positions, past: tuple[Value, Value]) -> tuple[Value, Value, Value]:
        """Maps (B, T, D) to (B, T, D), and the past keys and values to the present ones."""
        sizes = [self._q_size, self._kv_size, self._kv_size]
        q, k, v = op.Split(self.qkv_proj(op, x), sizes, axis=-1, _outputs=3)
        q = self._per_head(op, self.q_norm, q, self._heads)
        k = self._per_head(op, self.k_norm, k, self._kv_heads)
        attended, key, value = fused(op).GroupQueryAttention(
            q, k, v, *past, positions.last_index, positions.total, positions.cos, positions.sin,
            **self._attributes, _outputs=3,
        )  # fmt: skip
        return self.o_proj(op, attended), key, value

    def _per_head(self, op: Op, norm: RMSNorm, x: Value, heads: int) -> Value:
        normed, _ = norm(op, op.Reshape(x, [0, 0, heads, self._head_dim]))  # (B, T, heads, H)
        return op.Reshape(normed, [0, 0, heads * self._head_dim])


def activate(op: Op, name: Activation, x: Value) -> Value:
    """Applies an activation, in the operator that onnxruntime has the fastest kernel for."""
    match name:
        case "gelu_pytorch_tanh":
            return fused(op).FastGelu(x)
        case "gelu":
            return fused(op).Gelu(x)
        case "silu":
            return fused(op).QuickGelu(x, alpha=1.0)  # x * sigmoid(alpha * x)
        case "relu":
            return op.Relu(x)


class MLP(Module):
    """Gated MLP; Gemma's activation is the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig, weights: WeightFormat) -> None:
        super().__init__()
        self._size = config.intermediate_size
        self._activation = config.hidden_activation
        self.gate_up_proj = weights.linear(config.hidden_size, 2 * self._size)
        self.down_proj = weights.linear(self._size, config.hidden_size)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (B, T, D) to (B, T, D) through F."""
        gate, up = op.Split(self.gate_up_proj(op, x), [self._size, self._size], axis=-1, _outputs=2)
        return self.down_proj(op, op.Mul(activate(op, self._activation, gate), up))


class DecoderLayer(Module):
    """One block: attention and MLP, each with a norm before it and one after it."""

    def __init__(self, config: ModelConfig, layer: int, weights: WeightFormat) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, weights)
        self.mlp = MLP(config, weights)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, op: Op, x: Value, update: Value | None, positions: Positions, past: tuple[Value, Value]
    ) -> tuple[Value, Value, Value, Value]:
        """Takes the residual stream and the update not yet added to it; returns both anew, and the present cache."""
        normed, x = self.input_layernorm(op, x, update)
        attended, key, value = self.self_attn(op, normed, positions, past)
        update, _ = self.post_attention_layernorm(op, attended)
        normed, x = self.pre_feedforward_layernorm(op, x, update)
        update, _ = self.post_feedforward_layernorm(op, self.mlp(op, normed))
        return x, update, key, value
