"""The plan of the decoder's modules, which correspond one to one to those of `slm.export.graph.modules`."""

from typing import Any

from slm.core.config import ModelConfig
from slm.core.contract import SIDES, past_name, present_name
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import FLOAT, cast
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.target import AttentionLayer, Operators, Step


class RMSNorm:
    """Root-mean-square norm of x, or of the sum of a residual stream x and an update."""

    def __init__(self, path: str, dim: int, epsilon: float, target: Operators, dtype: int = FLOAT) -> None:
        """Takes the module's path, the number of channels, the type number of the weight, and the target."""
        self._weight, self._epsilon, self._target = Weight(f"{path}.weight", dtype, (dim,)), epsilon, target

    def __call__(self, op: Plan, x: Any, update: Any = None) -> tuple[Any, Any]:
        """Plans the norm of x (+ update); returns it and x (+ update) itself."""
        if update is None:
            return self._target.rms_norm(op, x, self._weight, self._epsilon), x
        return self._target.add_rms_norm(op, x, update, self._weight, self._epsilon)


class Attention:
    """Grouped-query attention with QK-norm before rotation."""

    def __init__(self, config: ModelConfig, layer: int, path: str, target: Operators) -> None:
        """Takes the model's shape, the number of the layer, the module's path, and the target."""
        self._config, self._layer, self._path, self._target = config, layer, path, target

    def __call__(self, op: Plan, x: Any, step: Step) -> Any:
        """Plans the module. The present keys and values become outputs of the graph."""
        config, path, kind, linear = self._config, self._path, self._target.kind, self._target.weights.linear
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        dtype, out = kind.dtype(f"{path}.qkv_proj"), kind.dtype(f"{path}.o_proj")
        past = [Input(past_name(self._layer, side)) for side in SIDES]
        qkv = linear(op, cast(op, x, FLOAT, dtype), f"{path}.qkv_proj", config.hidden_size, sum(sizes))
        q_norm, k_norm = (
            RMSNorm(f"{path}.{name}_norm", size, config.rms_norm_eps, self._target, dtype) for name in ("q", "k")
        )
        norms = (lambda op, x: q_norm(op, x)[0], lambda op, x: k_norm(op, x)[0])
        layer = AttentionLayer(self._layer, path, norms, dtype)
        split = op("Split", qkv, sizes, axis=-1, outputs=3)
        attended, key, value = self._target.attend(op, split, layer, step, past)
        for side, present in zip(SIDES, (key, value), strict=True):
            op.outputs[present_name(self._layer, side)] = present
        attended = cast(op, attended, kind.attention_dtype, out)
        return _normed_as(op, linear(op, attended, f"{path}.o_proj", sizes[0], config.hidden_size), out, kind)


class MLP:
    """Gated MLP."""

    def __init__(self, config: ModelConfig, path: str, target: Operators) -> None:
        """Takes the model's shape, the module's path, and the target."""
        self._size, self._hidden_size = config.intermediate_size, config.hidden_size
        self._path, self._target = path, target

    def __call__(self, op: Plan, x: Any) -> Any:
        """Plans the module."""
        size, path, kind, linear = self._size, self._path, self._target.kind, self._target.weights.linear
        up_type, down_type = kind.dtype(f"{path}.gate_up_proj"), kind.dtype(f"{path}.down_proj")
        gate_up = linear(op, cast(op, x, FLOAT, up_type), f"{path}.gate_up_proj", self._hidden_size, 2 * size)
        gate, up = op("Split", gate_up, [size, size], axis=-1, outputs=2)
        product = cast(op, op("Mul", self._target.activate(op, gate), up), up_type, down_type)
        return _normed_as(op, linear(op, product, f"{path}.down_proj", size, self._hidden_size), down_type, kind)


class DecoderLayer:
    """One block: attention and MLP, each with a norm before it and one after it."""

    def __init__(self, config: ModelConfig, layer: int, path: str, target: Operators) -> None:
        """Takes the model's shape, the number of the layer, the module's path, and the target."""
        self._self_attn = Attention(config, layer, f"{path}.self_attn", target)
        self._mlp = MLP(config, f"{path}.mlp", target)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(f"{path}.{name}_layernorm", config.hidden_size, config.rms_norm_eps, target)

        self._input, self._post_attention = norm("input"), norm("post_attention")
        self._pre_feedforward, self._post_feedforward = norm("pre_feedforward"), norm("post_feedforward")

    def __call__(self, op: Plan, x: Any, update: Any, step: Step) -> tuple[Any, Any]:
        """Plans the block; returns the new residual stream and the new update."""
        normed, x = self._input(op, x, update)
        update, _ = self._post_attention(op, self._self_attn(op, normed, step))
        normed, x = self._pre_feedforward(op, x, update)
        update, _ = self._post_feedforward(op, self._mlp(op, normed))
        return x, update


def _normed_as(op: Plan, product: Any, dtype: int, kind: Kind) -> Any:
    """Casts a product to float32, except on CUDA, whose norm takes float16."""
    return product if kind.device == "cuda" else cast(op, product, dtype, FLOAT)
