"""The expected graph of a bundle, node by node. The manifest and the configuration determine everything except the weights.

`slm.export.graph` writes these graphs. This module repeats their nodes, because the onnx package is not installed on devices,
and because a list of permitted operators is not enough: a chain of concatenations can double a tensor forty times. The tests
compare both modules for every kind of bundle.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from slm.core.config import FULL, SLIDING, LayerType, ModelConfig
from slm.core.contract import (
    ATTENTION_MASK,
    FEW_TOKENS,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    SIDES,
    Device,
    Target,
    head_parts,
    past_name,
    present_name,
    slot_names,
)
from slm.core.graph_nodes import Input, Plan, Weight

MICROSOFT = "com.microsoft"
# Type numbers of ONNX (onnx.proto, TensorProto.DataType).
FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 9, 10, 21, 22
_TO_THE_END = (1 << 63) - 1


@dataclass(frozen=True)
class Stored:
    """The storage of a product's weight, with the fields of the manifest's `Scheme`. `bits` is 0 for floats."""

    bits: int = 0
    block_size: int = 1
    zero_points: bool = False
    dynamic: bool = False
    half: bool = False
    halves: bool = False
    frequent: int = 0


@dataclass(frozen=True)
class Kind:
    """The properties that determine a graph in addition to the configuration.

    Attributes:
        target: The operators: onnxruntime's own ("fused") or standard ("portable").
        device: The device that the bundle is for.
        context: The longest sequence in tokens.
        accuracy_level: The attribute of MatMulNBits.
        stored: Returns the storage of a product's weight, by path.
        slots: Whether the graph has inputs for adapters.
        quantized_cache: Whether keys and values are cached as INT8.
    """

    target: Target
    device: Device
    context: int
    accuracy_level: int
    stored: Callable[[str], Stored]
    slots: bool
    quantized_cache: bool


def plan_graph(config: ModelConfig, kind: Kind, names: Collection[str] = (), branching: bool = True) -> Plan:
    """Returns the expected graph of a bundle.

    Args:
        config: The model's shape.
        kind: The other properties that determine the graph.
        names: The names of the graph's tensors. They determine two properties that the manifest does not record: whether
            adapter slots have smoothing factors, and whether rotation tables are stored, as by earlier versions.
        branching: Whether attention with quantized caches depends on the number of new tokens. In graphs of earlier
            versions it does not.
    """
    portable = kind.target == "portable"
    plan = Plan({"": 23} if portable else {"": 21, MICROSOFT: 1})
    plan.defaults[LOGITS_TO_KEEP] = Weight(LOGITS_TO_KEEP, INT64, ())
    step = _portable_positions(plan, config) if portable else _fused_positions(plan, config, kind, names)
    if kind.quantized_cache and branching:
        step.few = plan("LessOrEqual", plan("Squeeze", plan("Shape", Input(INPUT_IDS), start=1, end=2)), FEW_TOKENS)
        if FULL in config.layer_types:
            capacity = plan("Shape", Input(past_name(config.layer_types.index(FULL), "key")), start=2, end=3)
            total = plan("Shape", Input(ATTENTION_MASK), start=1, end=2)
            step.few = plan("Or", step.few, plan("Squeeze", plan("Less", capacity, total)))
    model = _Model(plan, config, kind, names)
    hidden = model.layers(step, plan("Reshape", Input(INPUT_IDS), [-1]) if portable else Input(INPUT_IDS))
    if portable:
        batch_new = plan("Shape", Input(INPUT_IDS))
        rows = _last_rows(plan, plan("Reshape", hidden, plan("Concat", batch_new, [-1], axis=0)), step.ends)
        hidden = plan("Reshape", rows, plan("Concat", [-1], plan("Shape", rows, start=2, end=3), axis=0))
    else:
        new = plan("Squeeze", plan("Shape", Input(INPUT_IDS), start=1, end=2))
        if kind.device == "cuda":
            hidden = _last_rows_on_gpu(plan, hidden, step, new)
        else:
            hidden = _last_rows(plan, hidden, plan("Min", step.lengths, new))
    logits = model.head(hidden)
    if portable:
        batch = plan("Shape", Input(INPUT_IDS), start=0, end=1)
        logits = plan("Reshape", logits, plan("Concat", batch, [-1, config.vocab_size], axis=0))
    plan.outputs[LOGITS] = logits
    return plan


@dataclass
class _Step:
    """Values that all layers share; see `slm.export.graph.fused.Step` and `portable.Step`."""

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


def _frequencies(config: ModelConfig) -> Iterator[tuple[LayerType, Weight]]:
    for kind in sorted(set(config.layer_types)):
        yield kind, Weight(f"positions.{kind}_inv_freq", FLOAT, (config.head_dim // 2,))


def _fused_positions(op: Plan, config: ModelConfig, kind: Kind, names: Collection[str]) -> _Step:
    ids, mask, step = Input(INPUT_IDS), Input(ATTENTION_MASK), _Step()
    step.lengths = op("ReduceSum", mask, [-1], keepdims=0)
    stored = _tables(config, kind) if kind.device == "cpu" else []
    if stored and stored[0].name in names:
        for index, layers in enumerate(sorted(set(config.layer_types))):
            step.cos[layers], step.sin[layers] = stored[2 * index : 2 * index + 2]
        return _with_lengths(op, step)
    if kind.device == "cpu":
        new = op("Shape", ids, start=1, end=2)
        alone = op("Equal", op("Shape", mask, start=1, end=2), new)
        first = op("Unsqueeze", op("Where", alone, 0, op("Sub", step.lengths, new)), [-1])
        positions = op("Add", first, op("Range", 0, op("Squeeze", new), 1))
        step.rows = op("Reshape", op("Range", 0, op("Size", ids), 1), op("Shape", ids))
    else:
        positions = op("Range", 0, kind.context, 1)
    positions = op("Cast", op("Reshape", positions, [-1, 1]), to=FLOAT)
    for layers, frequencies in _frequencies(config):
        angles = op("Mul", positions, frequencies)
        cos, sin = op("Cos", angles), op("Sin", angles)
        if kind.device != "cpu":
            cos, sin = op("Cast", cos, to=FLOAT16), op("Cast", sin, to=FLOAT16)
        step.cos[layers], step.sin[layers] = cos, sin
    return _with_lengths(op, step)


def _tables(config: ModelConfig, kind: Kind) -> list[Weight]:
    shape = (kind.context, config.head_dim // 2)
    kinds = sorted(set(config.layer_types))
    return [Weight(f"positions.{layers}_{part}", FLOAT, shape) for layers in kinds for part in ("cos", "sin")]


def _with_lengths(op: Plan, step: _Step) -> _Step:
    step.last_index = op("Cast", op("Sub", step.lengths, 1), to=INT32)
    step.total = op("Cast", op("Squeeze", op("Shape", Input(ATTENTION_MASK), start=1, end=2)), to=INT32)
    return step


def _portable_positions(op: Plan, config: ModelConfig) -> _Step:
    ids, mask, step = Input(INPUT_IDS), Input(ATTENTION_MASK), _Step()
    batch_new = op("Shape", ids)
    total = op("Shape", mask, start=1, end=2)
    past = op("Sub", total, op("Shape", ids, start=1, end=2))
    counted = op("Max", op("Sub", op("CumSum", mask, 1), 1), 0)
    positions = op("Cast", op("Slice", counted, past, total, [1]), to=FLOAT)
    for layers, frequencies in _frequencies(config):
        angles = op("Mul", op("Unsqueeze", positions, [-1]), frequencies)
        step.cos[layers], step.sin[layers] = op("Cos", angles), op("Sin", angles)
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


def _last_rows(op: Plan, hidden: Any, ends: Any) -> Any:
    keep = Input(LOGITS_TO_KEEP)
    new = op("Squeeze", op("Shape", Input(INPUT_IDS), start=1, end=2))
    everything = op("Equal", keep, 0)
    kept = op("Where", everything, new, op("Min", keep, new))
    first = op("Where", everything, 0, op("Max", op("Sub", ends, kept), 0))
    rows = op("Add", op("Unsqueeze", first, [-1]), op("Range", 0, kept, 1))
    return op("GatherND", hidden, op("Unsqueeze", rows, [-1]), batch_dims=1)


def _last_rows_on_gpu(op: Plan, hidden: Any, step: _Step, new: Any) -> Any:
    keep = Input(LOGITS_TO_KEEP)
    everything = op("Equal", op("Sub", new, keep), new)
    kept = op("Where", everything, new, op("Min", new, keep))
    lengths = op("Unsqueeze", step.lengths, [-1])
    padded = op("Add", lengths, op("Range", op("Neg", kept), 0, 1))
    whole = op("Range", op("Sub", new, kept), new, 1)
    rows = op("Max", op("Min", padded, whole), op("Range", 0, kept, 1))
    return op("GatherND", hidden, op("Unsqueeze", rows, [-1]), batch_dims=1)


class _Model:
    """Embedding, layers and head; see `slm.export.graph.modules`."""

    def __init__(self, op: Plan, config: ModelConfig, kind: Kind, names: Collection[str]) -> None:
        self._op, self._config, self._kind, self._names = op, config, kind, names
        self._portable = kind.target == "portable"
        self._dtype = FLOAT if kind.device == "cpu" else FLOAT16
        self._lower_rows: Any = None

    def layers(self, step: _Step, ids: Any) -> Any:
        op, config = self._op, self._config
        x, update = op("Mul", self._embedding(ids), config.hidden_size**0.5), None
        for layer in range(config.num_hidden_layers):
            path = f"model.layers.{layer}"
            normed, x = self._add_norm(x, update, f"{path}.input_layernorm")
            update = self._norm(self._attention(normed, step, layer), f"{path}.post_attention_layernorm")
            normed, x = self._add_norm(x, update, f"{path}.pre_feedforward_layernorm")
            update = self._norm(self._mlp(normed, f"{path}.mlp"), f"{path}.post_feedforward_layernorm")
        return self._add_norm(x, update, "model.norm")[0]

    def _norm(self, x: Any, path: str, dim: int = 0, dtype: int = FLOAT) -> Any:
        weight = Weight(f"{path}.weight", dtype, (dim or self._config.hidden_size,))
        name = "RMSNormalization" if self._portable else "SimplifiedLayerNormalization"
        return self._op(name, x, weight, axis=-1, epsilon=self._config.rms_norm_eps, stash_type=1)

    def _add_norm(self, x: Any, update: Any, path: str) -> tuple[Any, Any]:
        if update is None:
            return self._norm(x, path), x
        if self._portable:
            total = self._op("Add", x, update)
            return self._norm(total, path), total
        weight = Weight(f"{path}.weight", FLOAT, (self._config.hidden_size,))
        epsilon = self._config.rms_norm_eps
        name = "SkipSimplifiedLayerNormalization"
        normed, _, _, total = self._op(name, x, update, weight, domain=MICROSOFT, epsilon=epsilon, outputs=4)
        return normed, total

    def _cast(self, x: Any, have: int, want: int) -> Any:
        return x if have == want else self._op("Cast", x, to=want)

    def _normed_as(self, product: Any, dtype: int) -> Any:
        """Casts a product to float32, except on CUDA, whose norm takes float16."""
        return product if self._kind.device == "cuda" else self._cast(product, dtype, FLOAT)

    def _type(self, path: str) -> int:
        return FLOAT16 if self._kind.stored(path).half else FLOAT

    def _attention(self, x: Any, step: _Step, layer: int) -> Any:
        op, config, path = self._op, self._config, f"model.layers.{layer}.self_attn"
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        dtype, out = self._type(f"{path}.qkv_proj"), self._type(f"{path}.o_proj")
        past = [Input(past_name(layer, side)) for side in SIDES]
        qkv = self._linear(self._cast(x, FLOAT, dtype), f"{path}.qkv_proj", config.hidden_size, sum(sizes))
        q, k, v = op("Split", qkv, sizes, axis=-1, outputs=3)
        attend = self._attend_portable if self._portable else self._attend_fused
        attended, key, value = attend(step, layer, (q, k, v), past, dtype, path)
        for side, present in zip(SIDES, (key, value), strict=True):
            op.outputs[present_name(layer, side)] = present
        attended = self._cast(attended, self._dtype, out)
        return self._normed_as(self._linear(attended, f"{path}.o_proj", sizes[0], config.hidden_size), out)

    def _attend_portable(
        self, step: _Step, layer: int, qkv: tuple[Any, Any, Any], past: list[Input], dtype: int, path: str
    ) -> tuple[Any, Any, Any]:
        op, config, kind = self._op, self._config, self._config.layer_types[layer]
        q, k, v = (op("Reshape", x, to) for x, to in zip(qkv, (step.heads, step.kv_heads, step.kv_heads), strict=True))
        q, k = (self._norm(x, f"{path}.{name}_norm", config.head_dim, dtype) for x, name in ((q, "q"), (k, "k")))
        q, k, v = (op("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, k, v))
        q, k = (op("RotaryEmbedding", x, step.cos[kind], step.sin[kind]) for x in (q, k))
        scale, window = config.query_pre_attn_scalar**-0.5, config.window(layer)
        attended, key, value = op("Attention", q, k, v, step.mask[kind], *past, scale=scale, outputs=3)
        if window is not None:
            key, value = (op("Slice", x, [1 - window or _TO_THE_END], [_TO_THE_END], [2]) for x in (key, value))
        width = config.num_attention_heads * config.head_dim
        return op("Reshape", op("Transpose", attended, perm=[0, 2, 1, 3]), [-1, width]), key, value

    def _attend_fused(
        self, step: _Step, layer: int, qkv: tuple[Any, Any, Any], past: list[Input], dtype: int, path: str
    ) -> tuple[Any, Any, Any]:
        op, config, kind = self._op, self._config, self._config.layer_types[layer]
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        made = []
        for x, name, count in ((qkv[0], "q", heads), (qkv[1], "k", kv_heads)):
            normed = self._norm(op("Reshape", x, [0, 0, count, size]), f"{path}.{name}_norm", size, dtype)
            made.append(op("Reshape", normed, [0, 0, count * size]))
        q, k, v = (self._cast(x, dtype, self._dtype) for x in (*made, qkv[2]))
        rotates, window = step.rows is not None, config.window(layer)
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": config.query_pre_attn_scalar**-0.5,
            "do_rotary": int(not rotates),
        }
        if window is not None:
            attributes["local_window_size"] = window
            if self._kind.device != "webgpu":
                attributes["sliding_window_cache"] = 1
        tables: list[Any] = [step.cos[kind], step.sin[kind]]
        if rotates:
            q, k = (
                op("RotaryEmbedding", x, step.rows, *tables, domain=MICROSOFT, num_heads=count)
                for x, count in ((q, heads), (k, kv_heads))
            )
            tables = [None, None]
        operands = [q, k, v, *past, step.last_index, step.total, *tables]
        if not self._kind.quantized_cache:
            return self._group_query(op, operands, attributes)
        scales = [Weight(f"{path}.{side}_scale", FLOAT, (1, kv_heads, 1, size)) for side in ("k", "v")]
        types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        quantized = [*operands, None, None, None, *scales]
        if step.few is None:
            return self._group_query(op, quantized, attributes | types)

        def many(op: Plan) -> tuple[Any, Any, Any]:
            copies = [op("Mul", op("Cast", x, to=FLOAT), scale) for x, scale in zip(past, scales, strict=True)]
            attended, *present = self._group_query(op, [q, k, v, *copies, *operands[5:]], attributes)
            key, value = (
                op("QuantizeLinear", op("Div", x, scale), 1.0, output_dtype=INT8)
                for x, scale in zip(present, scales, strict=True)
            )
            return attended, key, value

        found: tuple[Any, Any, Any] = op.branches(
            step.few, lambda op: self._group_query(op, quantized, attributes | types), many
        )
        return found

    @staticmethod
    def _group_query(op: Plan, operands: list[Any], attributes: dict[str, Any]) -> tuple[Any, Any, Any]:
        found: tuple[Any, Any, Any] = op("GroupQueryAttention", *operands, domain=MICROSOFT, outputs=3, **attributes)
        return found

    def _mlp(self, x: Any, path: str) -> Any:
        op, size, hidden = self._op, self._config.intermediate_size, self._config.hidden_size
        up_type, down_type = self._type(f"{path}.gate_up_proj"), self._type(f"{path}.down_proj")
        gate_up = self._linear(self._cast(x, FLOAT, up_type), f"{path}.gate_up_proj", hidden, 2 * size)
        gate, up = op("Split", gate_up, [size, size], axis=-1, outputs=2)
        product = self._cast(op("Mul", self._activate(gate), up), up_type, down_type)
        return self._normed_as(self._linear(product, f"{path}.down_proj", size, hidden), down_type)

    def _activate(self, x: Any) -> Any:
        op, name = self._op, self._config.hidden_activation
        match name, self._portable:
            case "relu", _:
                return op("Relu", x)
            case "gelu_pytorch_tanh", True:
                return op("Gelu", x, approximate="tanh")
            case "gelu", True:
                return op("Gelu", x)
            case "silu", True:
                return op("Mul", x, op("Sigmoid", x))
            case "silu", False:
                return op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
        return op("FastGelu" if name == "gelu_pytorch_tanh" else "Gelu", x, domain=MICROSOFT)

    # Weights: see `slm.export.graph.formats`, `slots` and `dequantized`.

    def _linear(self, x: Any, path: str, inputs: int, outputs: int) -> Any:
        if not self._kind.slots or not path.startswith("model.layers."):
            return self._product(x, path, inputs, outputs)
        op = self._op
        a, b = (Input(name) for name in slot_names(path))
        for slot, shape in ((a, (1, inputs, 0)), (b, (1, 0, outputs))):  # an adapter of rank 0
            op.defaults[slot.name] = Weight(slot.name, FLOAT, shape)
        columns, rows = f"{path}.slot_columns", f"{path}.slot_rows"
        left: Any = op("Mul", a, Weight(columns, FLOAT, (inputs, 1))) if columns in self._names else a
        right: Any = op("Div", b, Weight(rows, FLOAT, (outputs,))) if rows in self._names else b
        product = self._product(x, path, inputs, outputs)
        return op("Add", product, op("MatMul", op("MatMul", x, left), right))

    def _product(self, x: Any, path: str, inputs: int, outputs: int) -> Any:
        op, stored = self._op, self._kind.stored(path)
        if not stored.bits:
            weight = Weight(f"{path}.weight", self._type(path), (outputs, inputs))
            return op("Gemm", x, weight, transB=1) if self._portable else self._matmul(x, weight)
        if stored.dynamic:
            largest = op("Max", op("ReduceMax", op("Abs", x), [-1], keepdims=1), 1e-9)
            rounded = op("QuantizeLinear", op("Div", x, largest), 1 / 127, 128)
            weights = Weight(f"{path}.weight_quantized", INT8, (inputs, outputs))
            scales = Weight(f"{path}.weight_scale", FLOAT, (outputs,))
            operands = (rounded, weights, 1 / 127, scales, 128)
            return op("Mul", op("MatMulIntegerToFloat", *operands, domain=MICROSOFT), largest)
        if self._portable:
            tensors = self._integers(path, inputs, outputs, by_columns=True)
            return op("MatMul", x, op("DequantizeLinear", *tensors, axis=0, block_size=stored.block_size))
        attributes = {"K": inputs, "N": outputs, "bits": stored.bits, "block_size": stored.block_size}
        level = self._kind.accuracy_level
        tensors = self._blocks(path, inputs, outputs)
        product = op("MatMulNBits", x, *tensors, domain=MICROSOFT, accuracy_level=level, **attributes)
        return self._with_frequent_logits(x, product, path, inputs) if stored.frequent else product

    def _matmul(self, x: Any, weight: Weight) -> Any:
        return self._op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)

    def _blocks(self, path: str, inputs: int, outputs: int) -> list[Weight]:
        stored = self._kind.stored(path)
        blocks = inputs // stored.block_size
        tensors = [
            Weight(f"{path}.weight_quantized", UINT8, (outputs, blocks, stored.block_size * stored.bits // 8)),
            Weight(f"{path}.weight_scale", self._type(path), (outputs, blocks)),
        ]
        points = Weight(f"{path}.weight_zero_points", UINT8, (outputs, -(-blocks * stored.bits // 8)))
        return [*tensors, points] if stored.zero_points else tensors

    def _integers(self, path: str, inputs: int, outputs: int, by_columns: bool) -> list[Weight]:
        stored = self._kind.stored(path)
        dtype = (UINT4 if stored.bits == 4 else UINT8) if stored.zero_points else (INT4 if stored.bits == 4 else INT8)
        whole, scales = (outputs, inputs), (outputs, inputs // stored.block_size)
        if by_columns:
            whole, scales = whole[::-1], scales[::-1]
        tensors = [Weight(f"{path}.weight_quantized", dtype, whole), Weight(f"{path}.weight_scale", FLOAT, scales)]
        points = Weight(f"{path}.weight_zero_points", dtype, scales)
        return [*tensors, points] if stored.zero_points else tensors

    def _embedding(self, ids: Any) -> Any:
        op, config, path = self._op, self._config, "model.embed_tokens"
        stored, rows = self._kind.stored(path), config.vocab_size
        if not stored.bits:
            weight = Weight(f"{path}.weight", self._type(path), (rows, config.hidden_size))
            return self._cast(op("Gather", weight, ids, axis=0), self._type(path), FLOAT)
        if self._portable:
            tensors = self._integers(path, config.hidden_size, rows, by_columns=False)
            taken = [op("Gather", each, ids, axis=0) for each in tensors]
            return op("DequantizeLinear", *taken, axis=1, block_size=stored.block_size)
        if stored.halves:
            return self._looked_up_in_halves(ids, path)
        whole, *others = self._blocks(path, config.hidden_size, rows)
        table = op("Reshape", whole, [rows, config.hidden_size * stored.bits // 8])
        sizes = {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1}
        looked_up = op("GatherBlockQuantized", table, ids, *others, domain=MICROSOFT, **sizes)
        if stored.frequent:
            looked_up = self._with_frequent_rows(ids, looked_up, path)
        return self._cast(looked_up, self._type(path), FLOAT)

    def head(self, hidden: Any) -> Any:
        """Adds the product that computes the logits."""
        op, config = self._op, self._config
        tied = config.tie_word_embeddings
        path = "model.embed_tokens" if tied else "lm_head"
        if tied and self._portable and self._kind.stored(path).bits:
            tensors = self._integers(path, config.hidden_size, config.vocab_size, by_columns=False)
            columns = [op("Transpose", each, perm=[1, 0]) for each in tensors]
            block_size = self._kind.stored(path).block_size
            return op("MatMul", hidden, op("DequantizeLinear", *columns, axis=0, block_size=block_size))
        if tied and self._kind.stored(path).halves:
            return self._head_in_halves(hidden, path)
        dtype = self._type(path)
        hidden = self._cast(hidden, FLOAT, dtype)
        product = self._product if tied else self._linear
        return self._cast(product(hidden, path, config.hidden_size, config.vocab_size), dtype, FLOAT)

    # Rows of frequent tokens: see `slm.export.graph.frequent`.

    def _frequent(self, path: str, inputs: int) -> tuple[Weight, Weight, Weight]:
        stored = self._kind.stored(path)
        rows, blocks = stored.frequent, inputs // stored.block_size
        return (
            Weight(f"{path}.frequent_ids", INT64, (rows,)),
            Weight(f"{path}.frequent_quantized", UINT8, (rows, blocks, stored.block_size)),
            Weight(f"{path}.frequent_scale", self._type(path), (rows, blocks)),
        )

    def _with_frequent_rows(self, ids: Any, found: Any, path: str) -> Any:
        op, stored, hidden_size = self._op, self._kind.stored(path), self._config.hidden_size
        theirs, quantized, scale = self._frequent(path, hidden_size)
        matches = op("Equal", op("Unsqueeze", ids, [-1]), theirs)
        row = op("ArgMax", op("Cast", matches, to=FLOAT), axis=-1, keepdims=0)
        frequent = op("Equal", op("Gather", theirs, row, axis=0), ids)
        table = op("Reshape", quantized, [stored.frequent, hidden_size])
        sizes = {"bits": 8, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1}
        exact = op("GatherBlockQuantized", table, row, scale, domain=MICROSOFT, **sizes)
        return op("Where", op("Unsqueeze", frequent, [-1]), exact, found)

    def _with_frequent_logits(self, hidden: Any, found: Any, path: str, inputs: int) -> Any:
        op, stored = self._op, self._kind.stored(path)
        theirs, quantized, scale = self._frequent(path, inputs)
        attributes = {"K": inputs, "N": stored.frequent, "bits": 8, "block_size": stored.block_size}
        level = self._kind.accuracy_level
        exact = op("MatMulNBits", hidden, quantized, scale, domain=MICROSOFT, accuracy_level=level, **attributes)
        return op("ScatterElements", found, op("Expand", theirs, op("Shape", exact)), exact, axis=-1)

    # The table in halves: see `slm.export.graph.halves`.

    def _halves(self, path: str) -> tuple[Weight, Weight, Weight]:
        rows, block_size = self._config.vocab_size, self._kind.stored(path).block_size
        blocks = self._config.hidden_size // block_size
        upper, lower = (
            Weight(f"{path}.weight_{part}", UINT8, (rows, blocks, block_size // 2)) for part in ("upper", "lower")
        )
        return upper, lower, Weight(f"{path}.weight_scale", FLOAT, (rows, blocks))

    def _rows_of_half(self, table: Any, ids: Any, scale: Weight, path: str) -> Any:
        sizes = {"bits": 4, "block_size": self._kind.stored(path).block_size, "gather_axis": 0, "quantize_axis": 1}
        return self._op("GatherBlockQuantized", table, ids, scale, domain=MICROSOFT, **sizes)

    def _looked_up_in_halves(self, ids: Any, path: str) -> Any:
        op, flat = self._op, [self._config.vocab_size, self._config.hidden_size // 2]
        upper, lower, scale = self._halves(path)
        above = self._rows_of_half(op("Reshape", upper, flat), ids, scale, path)
        self._lower_rows = op("Reshape", lower, flat)
        below = self._rows_of_half(self._lower_rows, ids, scale, path)
        return op("Add", above, op("Mul", below, 1 / 16))

    def _head_in_halves(self, hidden: Any, path: str) -> Any:
        op, config, keep = self._op, self._config, Input(LOGITS_TO_KEEP)
        upper, lower, scale = self._halves(path)
        attributes = {
            "K": config.hidden_size,
            "N": config.vocab_size,
            "bits": 4,
            "block_size": self._kind.stored(path).block_size,
            "accuracy_level": self._kind.accuracy_level,
        }
        small = op("Mul", hidden, 1 / 16)
        coarse = op("MatMulNBits", hidden, upper, scale, domain=MICROSOFT, **attributes)
        few = op("And", op("Equal", op("Size", hidden), config.hidden_size), op("Less", keep, 2))
        parts, each = head_parts(config.vocab_size)

        def candidates(op: Plan) -> list[Any]:
            shifted = op("Add", coarse, Weight(f"{path}.weight_shift", FLOAT, (config.vocab_size,)))
            columns = op("Reshape", shifted, [-1, parts])
            _, found = op("TopK", columns, [each], axis=0, sorted=0, outputs=2)
            tokens = op("Reshape", op("Add", op("Mul", found, parts), list(range(parts))), [1, 1, -1])
            below = self._lower_product(op, small, op("Reshape", tokens, [-1]), scale, path)
            gathered = op("GatherElements", coarse, tokens, axis=-1)
            exact = op("Add", gathered, op("Reshape", below, [1, 1, -1]))
            return [op("ScatterElements", shifted, tokens, exact, axis=-1)]

        def whole(op: Plan) -> list[Any]:
            below = op("MatMulNBits", small, lower, scale, domain=MICROSOFT, **attributes)
            return [op("Add", coarse, below)]

        return op.branches(few, candidates, whole)

    def _lower_product(self, op: Plan, hidden: Any, tokens: Any, scale: Weight, path: str) -> Any:
        block_size = self._kind.stored(path).block_size
        count, half = self._config.hidden_size // block_size, block_size // 2
        blocks = op("Reshape", hidden, [count, block_size])
        step = op("Mul", op("Max", op("ReduceMax", op("Abs", blocks), [-1], keepdims=1), 1e-30), 1 / 127)
        rounded = op("Mul", op("Round", op("Div", blocks, step)), step)
        even, odd = op("Split", op("Reshape", rounded, [count, half, 2]), num_outputs=2, axis=-1, outputs=2)
        even, odd = op("Reshape", even, [count, half]), op("Reshape", odd, [count, half])
        packed = op("Gather", self._lower_rows, tokens, axis=0)
        both = op("Reshape", op("Cast", packed, to=FLOAT), [-1, count, half])
        upper = op("Floor", op("Mul", both, 1 / 16))
        found = op("Add", op("Mul", both, even), op("Mul", upper, op("Sub", odd, op("Mul", even, 16.0))))
        middle = op("Mul", op("ReduceSum", rounded, [-1], keepdims=0), 8.0)
        by_block = op("Sub", op("ReduceSum", found, [-1], keepdims=0), middle)
        scales = op("Gather", scale, tokens, axis=0)
        return op("ReduceSum", op("Mul", by_block, scales), [-1], keepdims=0)
