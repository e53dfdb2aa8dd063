"""The plan of the portable target: only standard ONNX operators; see `slm.export.graph.portable`."""

from collections.abc import Collection
from typing import Any

from slm.core.config import FULL, SLIDING, ModelConfig
from slm.core.contract import ATTENTION_MASK, INPUT_IDS, past_name
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import BOOL, FLOAT
from slm.core.graph_plan.formats import WeightFormat
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.target import AttentionLayer, Step, frequencies, last_rows

_TO_THE_END = (1 << 63) - 1


class Portable:
    """The target for standard operators."""

    def __init__(self, config: ModelConfig, kind: Kind, names: Collection[str]) -> None:
        """Takes the model's shape, the other properties of the graph, and the names of its tensors."""
        self.opsets = {"": 23}
        self.kind = kind
        self.weights = WeightFormat(config, kind, names)
        self._config = config

    def positions(self, op: Plan) -> Step:
        """Plans positions, rotations and masks of the new tokens."""
        config, ids, mask, step = self._config, Input(INPUT_IDS), Input(ATTENTION_MASK), Step()
        batch_new = op("Shape", ids)
        total = op("Shape", mask, start=1, end=2)
        past = op("Sub", total, op("Shape", ids, start=1, end=2))
        counted = op("Max", op("Sub", op("CumSum", mask, 1), 1), 0)
        positions = op("Cast", op("Slice", counted, past, total, [1]), to=FLOAT)
        for kind, frequency in frequencies(config):
            angles = op("Mul", op("Unsqueeze", positions, [-1]), frequency)
            step.cos[kind], step.sin[kind] = op("Cos", angles), op("Sin", angles)
        new_mask = op("Slice", mask, past, total, [1])
        slots = op("Range", 0, op("Squeeze", total), 1)
        back = op("Sub", op("Unsqueeze", op("Slice", slots, past, total, [0]), [-1]), slots)
        valid = op("Cast", op("Unsqueeze", mask, [1, 2]), to=BOOL)
        seen = op("And", op("GreaterOrEqual", back, 0), valid)
        seen = op("Or", seen, op("Equal", back, 0))
        if FULL in config.layer_types:
            step.mask[FULL] = seen
        if SLIDING in config.layer_types:
            near = op("And", seen, op("Less", back, config.sliding_window))
            cached = op("Shape", Input(past_name(config.layer_types.index(SLIDING), "key")), start=2, end=3)
            step.mask[SLIDING] = op("Slice", near, op("Sub", past, cached), total, [3])
        step.heads = op("Concat", batch_new, [config.num_attention_heads, config.head_dim], axis=0)
        step.kv_heads = op("Concat", batch_new, [config.num_key_value_heads, config.head_dim], axis=0)
        step.ends = op("Add", op("ArgMax", new_mask, axis=1, keepdims=0, select_last_index=1), 1)
        return step

    def rms_norm(self, op: Plan, x: Any, weight: Weight, epsilon: float) -> Any:
        """Plans the root-mean-square norm of x over its last dimension."""
        return op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_rms_norm(self, op: Plan, x: Any, update: Any, weight: Weight, epsilon: float) -> tuple[Any, Any]:
        """Plans the norm of x + update, and x + update."""
        total = op("Add", x, update)
        return self.rms_norm(op, total, weight, epsilon), total

    def activate(self, op: Plan, x: Any) -> Any:
        """Plans the activation of the configuration."""
        match self._config.hidden_activation:
            case "gelu_pytorch_tanh":
                return op("Gelu", x, approximate="tanh")
            case "gelu":
                return op("Gelu", x)
            case "silu":
                return op("Mul", x, op("Sigmoid", x))
            case "relu":
                return op("Relu", x)

    def attend(
        self, op: Plan, qkv: tuple[Any, Any, Any], layer: AttentionLayer, step: Step, past: list[Input]
    ) -> tuple[Any, Any, Any]:
        """Plans the norm of each head, the rotation, and attention to cached and new positions."""
        config, kind, (norm_q, norm_k) = self._config, self._config.layer_types[layer.number], layer.norms
        q, k, v = (op("Reshape", x, to) for x, to in zip(qkv, (step.heads, step.kv_heads, step.kv_heads), strict=True))
        q, k, v = (op("Transpose", x, perm=[0, 2, 1, 3]) for x in (norm_q(op, q), norm_k(op, k), v))
        q, k = (op("RotaryEmbedding", x, step.cos[kind], step.sin[kind]) for x in (q, k))
        scale, window = config.query_pre_attn_scalar**-0.5, config.window(layer.number)
        attended, key, value = op("Attention", q, k, v, step.mask[kind], *past, scale=scale, outputs=3)
        if window is not None:
            key, value = (op("Slice", x, [1 - window or _TO_THE_END], [_TO_THE_END], [2]) for x in (key, value))
        width = config.num_attention_heads * config.head_dim
        return op("Reshape", op("Transpose", attended, perm=[0, 2, 1, 3]), [-1, width]), key, value

    def arranged(self, op: Plan) -> Any:
        """Plans the ids as (B * T,)."""
        return op("Reshape", Input(INPUT_IDS), [-1])

    def kept(self, op: Plan, hidden: Any, step: Step) -> Any:
        """Plans the selection of each row's last valid positions from hidden states (B * T, D)."""
        batch_new = op("Shape", Input(INPUT_IDS))
        rows = last_rows(op, op("Reshape", hidden, op("Concat", batch_new, [-1], axis=0)), step.ends)
        return op("Reshape", rows, op("Concat", [-1], op("Shape", rows, start=2, end=3), axis=0))

    def logits(self, op: Plan, logits: Any) -> Any:
        """Plans the logits as (B, kept, V)."""
        batch = op("Shape", Input(INPUT_IDS), start=0, end=1)
        return op("Reshape", logits, op("Concat", batch, [-1, self._config.vocab_size], axis=0))
