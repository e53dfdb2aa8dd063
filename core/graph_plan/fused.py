"""The plan of the fused target: onnxruntime's own operators; see `slm.export.graph.fused`."""

from collections.abc import Collection
from typing import Any

from slm.core.config import FULL, ModelConfig
from slm.core.contract import ATTENTION_MASK, FEW_TOKENS, INPUT_IDS, LOGITS_TO_KEEP, past_name
from slm.core.graph_nodes import Input, Plan, Weight
from slm.core.graph_plan.builder import FLOAT, FLOAT16, INT8, INT32, MICROSOFT, cast
from slm.core.graph_plan.formats import WeightFormat
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.target import AttentionLayer, Step, frequencies, last_rows


class Fused:
    """The target for onnxruntime's own operators."""

    def __init__(self, config: ModelConfig, kind: Kind, names: Collection[str]) -> None:
        """Takes the model's shape, the other properties of the graph, and the names of its tensors."""
        self.opsets = {"": 21, MICROSOFT: 1}
        self.kind = kind
        self.weights = WeightFormat(config, kind, names)
        self._config, self._names = config, names

    def positions(self, op: Plan) -> Step:
        """Plans rotations, and lengths from the mask."""
        config, device = self._config, self.kind.device
        ids, mask, step = Input(INPUT_IDS), Input(ATTENTION_MASK), Step()
        step.lengths = op("ReduceSum", mask, [-1], keepdims=0)
        stored = self._tables() if device == "cpu" else []
        if stored and stored[0].name in self._names:
            for index, layers in enumerate(sorted(set(config.layer_types))):
                step.cos[layers], step.sin[layers] = stored[2 * index : 2 * index + 2]
            return self._with_lengths(op, step)
        if device == "cpu":
            new = op("Shape", ids, start=1, end=2)
            alone = op("Equal", op("Shape", mask, start=1, end=2), new)
            first = op("Unsqueeze", op("Where", alone, 0, op("Sub", step.lengths, new)), [-1])
            positions = op("Add", first, op("Range", 0, op("Squeeze", new), 1))
            step.rows = op("Reshape", op("Range", 0, op("Size", ids), 1), op("Shape", ids))
        else:
            positions = op("Range", 0, self.kind.context, 1)
        positions = op("Cast", op("Reshape", positions, [-1, 1]), to=FLOAT)
        for layers, frequency in frequencies(config):
            angles = op("Mul", positions, frequency)
            cos, sin = op("Cos", angles), op("Sin", angles)
            if device != "cpu":
                cos, sin = op("Cast", cos, to=FLOAT16), op("Cast", sin, to=FLOAT16)
            step.cos[layers], step.sin[layers] = cos, sin
        return self._with_lengths(op, step)

    def _tables(self) -> list[Weight]:
        """Returns the stored rotation tables of earlier versions, cosine and sine for each kind of layer."""
        shape = (self.kind.context, self._config.head_dim // 2)
        kinds = sorted(set(self._config.layer_types))
        return [Weight(f"positions.{layers}_{part}", FLOAT, shape) for layers in kinds for part in ("cos", "sin")]

    @staticmethod
    def _with_lengths(op: Plan, step: Step) -> Step:
        step.last_index = op("Cast", op("Sub", step.lengths, 1), to=INT32)
        step.total = op("Cast", op("Squeeze", op("Shape", Input(ATTENTION_MASK), start=1, end=2)), to=INT32)
        return step

    def rms_norm(self, op: Plan, x: Any, weight: Weight, epsilon: float) -> Any:
        """Plans the root-mean-square norm of x over its last dimension."""
        return op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_rms_norm(self, op: Plan, x: Any, update: Any, weight: Weight, epsilon: float) -> tuple[Any, Any]:
        """Plans the norm of x + update, and x + update."""
        name = "SkipSimplifiedLayerNormalization"
        normed, _, _, total = op(name, x, update, weight, domain=MICROSOFT, epsilon=epsilon, outputs=4)
        return normed, total

    def activate(self, op: Plan, x: Any) -> Any:
        """Plans the activation of the configuration."""
        match self._config.hidden_activation:
            case "gelu_pytorch_tanh":
                return op("FastGelu", x, domain=MICROSOFT)
            case "gelu":
                return op("Gelu", x, domain=MICROSOFT)
            case "silu":
                return op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
            case "relu":
                return op("Relu", x)

    def attend(
        self, op: Plan, qkv: tuple[Any, Any, Any], layer: AttentionLayer, step: Step, past: list[Input]
    ) -> tuple[Any, Any, Any]:
        """Plans the norm of each head, then one operator that updates the cache and attends."""
        config, kind = self._config, self._config.layer_types[layer.number]
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        made = []
        for x, norm, count in zip(qkv, layer.norms, (heads, kv_heads), strict=False):  # v has no norm
            normed = norm(op, op("Reshape", x, [0, 0, count, size]))
            made.append(op("Reshape", normed, [0, 0, count * size]))
        q, k, v = (cast(op, x, layer.dtype, self.kind.attention_dtype) for x in (*made, qkv[2]))
        rotates, window = step.rows is not None, config.window(layer.number)
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": config.query_pre_attn_scalar**-0.5,
            "do_rotary": int(not rotates),
        }
        if window is not None:
            attributes["local_window_size"] = window
            if self.kind.device != "webgpu":
                attributes["sliding_window_cache"] = 1
        tables: list[Any] = [step.cos[kind], step.sin[kind]]
        if rotates:
            q, k = (
                op("RotaryEmbedding", x, step.rows, *tables, domain=MICROSOFT, num_heads=count)
                for x, count in ((q, heads), (k, kv_heads))
            )
            tables = [None, None]
        operands = [q, k, v, *past, step.last_index, step.total, *tables]
        if not self.kind.quantized_cache:
            return _attention(op, operands, attributes)
        return self._attend_quantized(op, operands, attributes, layer.path, step.few)

    def _attend_quantized(
        self, op: Plan, operands: list[Any], attributes: dict[str, Any], path: str, few: Any
    ) -> tuple[Any, Any, Any]:
        """Plans attention with 8-bit caches: for many new tokens through float32 copies, unless `few` is None."""
        shape = (1, self._config.num_key_value_heads, 1, self._config.head_dim)
        scales = [Weight(f"{path}.{side}_scale", FLOAT, shape) for side in ("k", "v")]
        types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        quantized = [*operands, None, None, None, *scales]
        if few is None:
            return _attention(op, quantized, attributes | types)
        qkv, past, rest = operands[:3], operands[3:5], operands[5:]

        def many(op: Plan) -> tuple[Any, Any, Any]:
            copies = [op("Mul", op("Cast", x, to=FLOAT), scale) for x, scale in zip(past, scales, strict=True)]
            attended, *present = _attention(op, [*qkv, *copies, *rest], attributes)
            key, value = (
                op("QuantizeLinear", op("Div", x, scale), 1.0, output_dtype=INT8)
                for x, scale in zip(present, scales, strict=True)
            )
            return attended, key, value

        found: tuple[Any, Any, Any] = op.branches(few, lambda op: _attention(op, quantized, attributes | types), many)
        return found

    def arranged(self, op: Plan) -> Any:
        """Returns the ids (B, T)."""
        return Input(INPUT_IDS)

    def kept(self, op: Plan, hidden: Any, step: Step) -> Any:
        """Plans the selection of each row's last valid positions from hidden states (B, T, D)."""
        new = op("Squeeze", op("Shape", Input(INPUT_IDS), start=1, end=2))
        if self.kind.device == "cuda":
            return _last_rows_on_gpu(op, hidden, step, new)
        return last_rows(op, hidden, op("Min", step.lengths, new))

    def logits(self, op: Plan, logits: Any) -> Any:
        """Returns the logits (B, kept, V) unchanged."""
        return logits


def few_tokens(op: Plan, config: ModelConfig) -> Any:
    """Plans the condition under which 8-bit caches are read in place: few new tokens, or caches that grow with each step."""
    few = op("LessOrEqual", op("Squeeze", op("Shape", Input(INPUT_IDS), start=1, end=2)), FEW_TOKENS)
    if FULL not in config.layer_types:
        return few
    capacity = op("Shape", Input(past_name(config.layer_types.index(FULL), "key")), start=2, end=3)
    total = op("Shape", Input(ATTENTION_MASK), start=1, end=2)
    return op("Or", few, op("Squeeze", op("Less", capacity, total)))


def _attention(op: Plan, operands: list[Any], attributes: dict[str, Any]) -> tuple[Any, Any, Any]:
    found: tuple[Any, Any, Any] = op("GroupQueryAttention", *operands, domain=MICROSOFT, outputs=3, **attributes)
    return found


def _last_rows_on_gpu(op: Plan, hidden: Any, step: Step, new: Any) -> Any:
    keep = Input(LOGITS_TO_KEEP)
    everything = op("Equal", op("Sub", new, keep), new)
    kept = op("Where", everything, new, op("Min", new, keep))
    lengths = op("Unsqueeze", step.lengths, [-1])
    padded = op("Add", lengths, op("Range", op("Neg", kept), 0, 1))
    whole = op("Range", op("Sub", new, kept), new, 1)
    rows = op("Max", op("Min", padded, whole), op("Range", 0, kept, 1))
    return op("GatherND", hidden, op("Unsqueeze", rows, [-1]), batch_dims=1)
