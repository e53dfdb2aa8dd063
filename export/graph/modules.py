"""The decoder's modules, which correspond one to one to those of `core/nn`.

They differ where the runtime's kernels require it: q, k, v are one product, gate and up are one product, norm weights include
the 1 that Gemma adds, and one operator computes a residual sum and the norm after it. The target supplies the operators.
Hidden states are (..., D): B batch, T positions, N heads, K kv heads, H head dim, D hidden, F intermediate.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from slm.core.config import ModelConfig
from slm.export.graph.builder import Module, Op, Parameter, Value, cast
from slm.export.graph.target import AttentionLayer, AttentionShape, Operators

FLOAT = ir.DataType.FLOAT


class RMSNorm(Module):
    """Root-mean-square norm of x, or of the sum of a residual stream x and an update."""

    def __init__(self, dim: int, epsilon: float, target: Operators[Any], dtype: ir.DataType = FLOAT) -> None:
        super().__init__()
        self.weight = Parameter([dim], dtype)
        self._epsilon, self._target = epsilon, target

    def forward(self, op: Op, x: Value, update: Value | None = None) -> tuple[Value, Value]:
        """Returns the norm of x (+ update) and x (+ update) itself, both in the shape of x."""
        if update is None:
            return self._target.rms_norm(op, x, self.weight, self._epsilon), x
        return self._target.add_rms_norm(op, x, update, self.weight, self._epsilon)


class Attention(Module):
    """Grouped-query attention with QK-norm before rotation."""

    def __init__(self, config: ModelConfig, layer: int, path: str, target: Operators[Any]) -> None:
        super().__init__()
        self._target, self._shape = target, AttentionShape.of(config, layer)
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = target.weights.linear(f"{path}.qkv_proj", config.hidden_size, sum(self._shape.sizes))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, target, self.qkv_proj.dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, target, self.qkv_proj.dtype)
        self.o_proj = target.weights.linear(f"{path}.o_proj", width, config.hidden_size)
        self._scales: Sequence[str] = ("k_scale", "v_scale") if target.quantized_cache else ()
        for scale in self._scales:
            setattr(self, scale, Parameter([1, config.num_key_value_heads, 1, config.head_dim], FLOAT))

    def forward(self, op: Op, x: Value, step: Any, past: tuple[Value, Value]) -> tuple[Value, Value, Value]:
        """Maps (..., D) to (..., D), and the past keys and values to the present ones."""
        qkv = self.qkv_proj(op, cast(op, x, FLOAT, self.qkv_proj.dtype))
        layer = AttentionLayer(
            self._shape,
            norms=(lambda op, x: self.q_norm(op, x)[0], lambda op, x: self.k_norm(op, x)[0]),
            dtype=self.qkv_proj.dtype,
            scales=tuple(getattr(self, scale) for scale in self._scales),
        )
        attended, key, value = self._target.attend(op, qkv, layer, step, past)
        attended = self.o_proj(op, cast(op, attended, self._target.dtype, self.o_proj.dtype))
        return self._target.normed_as(op, attended, self.o_proj.dtype), key, value


class MLP(Module):
    """Gated MLP; Gemma's activation is the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig, path: str, target: Operators[Any]) -> None:
        super().__init__()
        self._size, self._activation, self._target = config.intermediate_size, config.hidden_activation, target
        self.gate_up_proj = target.weights.linear(f"{path}.gate_up_proj", config.hidden_size, 2 * self._size)
        self.down_proj = target.weights.linear(f"{path}.down_proj", self._size, config.hidden_size)

    def forward(self, op: Op, x: Value) -> Value:
        """Maps (..., D) to (..., D) through F."""
        gate_up = self.gate_up_proj(op, cast(op, x, FLOAT, self.gate_up_proj.dtype))
        gate, up = op.Split(gate_up, [self._size, self._size], axis=-1, _outputs=2)
        product = op.Mul(self._target.activate(op, self._activation, gate), up)
        product = cast(op, product, self.gate_up_proj.dtype, self.down_proj.dtype)
        return self._target.normed_as(op, self.down_proj(op, product), self.down_proj.dtype)


class DecoderLayer(Module):
    """One block: attention and MLP, each with a norm before it and one after it."""

    def __init__(self, config: ModelConfig, layer: int, path: str, target: Operators[Any]) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, f"{path}.self_attn", target)
        self.mlp = MLP(config, f"{path}.mlp", target)
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, epsilon, target)
        self.post_attention_layernorm = RMSNorm(size, epsilon, target)
        self.pre_feedforward_layernorm = RMSNorm(size, epsilon, target)
        self.post_feedforward_layernorm = RMSNorm(size, epsilon, target)

    def forward(
        self, op: Op, x: Value, update: Value | None, step: Any, past: tuple[Value, Value]
    ) -> tuple[Value, Value, Value, Value]:
        """Returns the new residual stream, the new update, and the present keys and values.

        An update is added to the residual stream together with the next norm.
        """
        normed, x = self.input_layernorm(op, x, update)
        attended, key, value = self.self_attn(op, normed, step, past)
        update, _ = self.post_attention_layernorm(op, attended)
        normed, x = self.pre_feedforward_layernorm(op, x, update)
        update, _ = self.post_feedforward_layernorm(op, self.mlp(op, normed))
        return x, update, key, value
