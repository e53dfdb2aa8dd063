"""The fused target: onnxruntime's own operators, in-place caches and sliding windows (docs/bundles.md).

On the CPU, everything is float32. On CUDA and WebGPU, the attention operator does not support float32, so products, attention
and caches are float16. Norms and the residual stream stay float32, because Gemma's activations would overflow float16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from slm.core.config import FULL, Activation, LayerType, ModelConfig
from slm.core.contract import (
    ATTENTION_MASK,
    FEW_TOKENS,
    INPUT_IDS,
    LOGITS_TO_KEEP,
    CacheLayer,
    CacheType,
    Device,
    cache_layers,
    past_name,
)
from slm.export.graph.builder import Op, Value, branches, cast, fused
from slm.export.graph.formats import WeightFormat
from slm.export.graph.target import AttentionLayer, RotaryModule, last_rows, total_length

# The index of the first scale of a quantized cache among the attention operator's inputs.
_SCALES_FROM = 12


@dataclass(frozen=True)
class Step:
    """Values that all layers share in one step.

    Attributes:
        inputs: The graph's inputs.
        cos: Cosine of rotations, (rows, H / 2), by kind of layer: one row for each new token, or for every position.
        sin: Sine of rotations, in the shape of `cos`.
        rows: The row of `cos` and `sin` for each new token, (B, T); None if they have a row for every position.
        lengths: Length of each row, past included, int64 (B,).
        last_index: Index of each row's last valid position, int32 (B,).
        total: Length of the longest row, past included, int32 scalar.
        few: Whether a row has at most `FEW_TOKENS` new tokens, bool scalar; None if caches are not quantized.
    """

    inputs: Mapping[str, Value]
    cos: Mapping[LayerType, Value]
    sin: Mapping[LayerType, Value]
    rows: Value | None
    lengths: Value
    last_index: Value
    total: Value
    few: Value | None = None


class FusedPositions(RotaryModule):
    """Computes rotations, and lengths from the mask. Rows are padded on the right.

    On a CPU, each step computes the rotations of the new tokens, at no measurable cost. On a GPU, each operator is a kernel
    launch, so rotations are tables of every position. The tables depend on no input, so onnxruntime computes them once, when
    it loads the graph, and the file does not contain them.
    """

    def __init__(
        self, config: ModelConfig, context: int | None, dtype: ir.DataType, quantized_cache: bool = False
    ) -> None:
        """Creates the module.

        Args:
            config: The model's shape.
            context: The number of positions in the tables, or None to compute the rotations of the new tokens at each step.
            dtype: The type of rotations.
            quantized_cache: Whether attention depends on the number of new tokens (`Fused._attend_quantized`).
        """
        super().__init__(config)
        self._context, self._dtype, self._quantized_cache = context, dtype, quantized_cache
        kinds = config.layer_types
        self._full_cache = past_name(kinds.index(FULL), "key") if FULL in kinds else None

    def forward(self, op: Op, inputs: Mapping[str, Value]) -> Step:
        """Returns the shared values of the step."""
        lengths = op.ReduceSum(inputs[ATTENTION_MASK], [-1], keepdims=0)
        rows, positions = (
            self._new(op, inputs, lengths) if self._context is None else (None, op.Range(0, self._context, 1))
        )
        positions = op.Cast(op.Reshape(positions, [-1, 1]), to=ir.DataType.FLOAT)  # (rows, 1)
        cos, sin = {}, {}
        for kind in self._kinds:
            angles = self._angles(op, positions, kind)  # (rows, H / 2)
            cos[kind], sin[kind] = (
                cast(op, x, ir.DataType.FLOAT, self._dtype) for x in (op.Cos(angles), op.Sin(angles))
            )
        return Step(
            inputs,
            cos,
            sin,
            rows,
            lengths=lengths,
            last_index=op.Cast(op.Sub(lengths, 1), to=ir.DataType.INT32),
            total=op.Cast(op.Squeeze(total_length(op, inputs)), to=ir.DataType.INT32),
            few=self._few(op, inputs) if self._quantized_cache else None,
        )

    def _few(self, op: Op, inputs: Mapping[str, Value]) -> Value:
        """Returns whether 8-bit caches are read in place: few new tokens, or caches that grow with each step.

        Other programs pass caches of the past's length. There, onnxruntime would write the longer result into the float32
        copy, because only the operator reads it, and fail.
        """
        few = op.LessOrEqual(op.Squeeze(op.Shape(inputs[INPUT_IDS], start=1, end=2)), FEW_TOKENS)
        if self._full_cache is None:
            return few
        capacity = op.Shape(inputs[self._full_cache], start=2, end=3)
        return op.Or(few, op.Squeeze(op.Less(capacity, total_length(op, inputs))))

    def _new(self, op: Op, inputs: Mapping[str, Value], lengths: Value) -> tuple[Value, Value]:
        """Returns the index and the position of each new token, both (B, T).

        The attention operator allows padded rows only without a past. Then every row starts at position 0.
        """
        ids = inputs[INPUT_IDS]
        new = op.Shape(ids, start=1, end=2)  # T, (1,)
        first = op.Where(op.Equal(total_length(op, inputs), new), 0, op.Sub(lengths, new))  # (B,)
        positions = op.Add(op.Unsqueeze(first, [-1]), op.Range(0, op.Squeeze(new), 1))
        return op.Reshape(op.Range(0, op.Size(ids), 1), op.Shape(ids)), positions


class Fused:
    """The target for onnxruntime's own operators."""

    def __init__(self, weights: WeightFormat, device: Device = "cpu", cache: CacheType = "float32") -> None:
        """Creates the target for a device.

        Args:
            weights: The weight format.
            device: The device that will run the graph.
            cache: The type of the caches: float32 or int8 on the CPU, float16 on other devices.
        """
        self.opsets = {"": 21, "com.microsoft": 1}
        self.weights = weights
        self.quantized_cache = cache == "int8"
        self._device, self._cache = device, cache
        self.dtype = ir.DataType.FLOAT if device == "cpu" else ir.DataType.FLOAT16

    def caches(self, config: ModelConfig) -> tuple[CacheLayer, ...]:
        """Returns the caches in the order of inputs and outputs."""
        return cache_layers(config, self._device, self._cache)

    def positions(self, config: ModelConfig, context: int) -> FusedPositions:
        """Returns the module that computes a step's shared values."""
        return FusedPositions(config, None if self._device == "cpu" else context, self.dtype, self.quantized_cache)

    def rms_norm(self, op: Op, x: Value, weight: Value, epsilon: float) -> Value:
        """Returns the root-mean-square norm of x over its last dimension."""
        return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_rms_norm(self, op: Op, x: Value, update: Value, weight: Value, epsilon: float) -> tuple[Value, Value]:
        """Returns the norm of x + update, and x + update."""
        normed, _, _, total = fused(op).SkipSimplifiedLayerNormalization(x, update, weight, epsilon=epsilon, _outputs=4)
        return normed, total

    def activate(self, op: Op, name: Activation, x: Value) -> Value:
        """Applies an activation, with the operator that has onnxruntime's fastest kernel."""
        match name:
            case "gelu_pytorch_tanh":
                return fused(op).FastGelu(x)
            case "gelu":
                return fused(op).Gelu(x)
            case "silu":
                return fused(op).QuickGelu(x, alpha=1.0)  # x * sigmoid(alpha * x)
            case "relu":
                return op.Relu(x)

    def attend(
        self, op: Op, qkv: Value, layer: AttentionLayer, step: Step, past: tuple[Value, Value]
    ) -> tuple[Value, Value, Value]:
        """Norms each head, then updates the cache and attends in one operator (com.microsoft GroupQueryAttention).

        The operator also applies rotations if they are tables of every position. Otherwise a separate operator applies the
        rotations of the new tokens first.
        """
        shape = layer.shape
        q, k, v = op.Split(qkv, shape.sizes, axis=-1, _outputs=3)
        q, k = (
            op.Reshape(norm(op, op.Reshape(x, [0, 0, heads, shape.head_dim])), [0, 0, heads * shape.head_dim])
            for norm, x, heads in zip(layer.norms, (q, k), (shape.heads, shape.kv_heads), strict=True)
        )
        q, k, v = (cast(op, x, layer.dtype, self.dtype) for x in (q, k, v))
        attributes: dict[str, int | float | str] = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": shape.scale,
            "do_rotary": int(step.rows is None),
        }
        if shape.window is not None:
            attributes["local_window_size"] = shape.window
            if self._device != "webgpu":
                attributes["sliding_window_cache"] = 1
        cos, sin = step.cos[shape.kind], step.sin[shape.kind]
        if step.rows is not None:
            q, k = (
                fused(op).RotaryEmbedding(x, step.rows, cos, sin, num_heads=heads)
                for x, heads in ((q, shape.heads), (k, shape.kv_heads))
            )
        tables = [] if step.rows is not None else [cos, sin]

        def attention(op: Op, past: tuple[Value, Value], scales: tuple[Value, ...] = ()) -> tuple[Value, Value, Value]:
            operands, more = [q, k, v, *past, step.last_index, step.total, *tables], attributes
            if scales:
                operands += [None] * (_SCALES_FROM - len(operands)) + [*scales]
                more = more | {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            attended, key, value = fused(op).GroupQueryAttention(*operands, **more, _outputs=3)
            return attended, key, value

        if not layer.scales:
            return attention(op, past)
        return self._attend_quantized(op, attention, step, past, layer.scales)

    def _attend_quantized(
        self,
        op: Op,
        attention: Callable[..., tuple[Value, Value, Value]],
        step: Step,
        past: tuple[Value, Value],
        scales: tuple[Value, ...],
    ) -> tuple[Value, Value, Value]:
        """Attends with 8-bit caches: directly for a few new tokens, through float32 copies of the caches for many.

        onnxruntime's kernel for 8-bit caches converts keys and values again for each query, which takes three times as long
        as attention in float32 for a prompt, and is faster for single tokens. The copies of earlier positions are exact, and
        rounding them again gives the same integers.
        """
        assert step.few is not None

        def few(op: Op) -> tuple[Value, Value, Value]:
            return attention(op, past, scales)

        def many(op: Op) -> tuple[Value, Value, Value]:
            copies = (op.Mul(op.Cast(x, to=ir.DataType.FLOAT), scale) for x, scale in zip(past, scales, strict=True))
            attended, *present = attention(op, tuple(copies))
            key, value = (
                op.QuantizeLinear(op.Div(x, scale), 1.0, output_dtype=ir.DataType.INT8)
                for x, scale in zip(present, scales, strict=True)
            )
            return attended, key, value

        types = [ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT8]
        attended, key, value = branches(op, step.few, few, many, types)
        return attended, key, value

    def arranged(self, op: Op, input_ids: Value) -> Value:
        """Returns the ids (B, T) unchanged."""
        return input_ids

    def kept(self, op: Op, hidden: Value, step: Step) -> Value:
        """Returns the hidden states (B, kept, D) of each row's last valid positions.

        Rows are padded only without a past, so a row's valid new tokens are its first min(length, T) ones.
        """
        new = op.Squeeze(op.Shape(step.inputs[INPUT_IDS], start=1, end=2))
        if self._device == "cuda":
            return _last_rows_on_gpu(op, hidden, step, new)
        return last_rows(op, hidden, step.inputs, ends=op.Min(step.lengths, new))

    def normed_as(self, op: Op, product: Value, dtype: ir.DataType) -> Value:
        """Returns a product unchanged on CUDA, whose norm takes float16 and computes in float32; otherwise in float32."""
        return product if self._device == "cuda" else cast(op, product, dtype, ir.DataType.FLOAT)

    def logits(self, op: Op, logits: Value, step: Step, vocab_size: int) -> Value:
        """Returns the logits (B, kept, V) unchanged."""
        return logits


def _last_rows_on_gpu(op: Op, hidden: Value, step: Step, new: Value) -> Value:
    """Returns the same rows as `last_rows`, and keeps every number that determines a shape on the host.

    onnxruntime runs a node on the CPU if all of its inputs come from a shape or from the caller. Therefore each node that
    reads `num_logits_to_keep` also reads T, and a host number reaches the GPU only as a limit of a Range, which reads its
    limits from the host. A copy between host and GPU would synchronize each step and prevent CUDA graphs.

    Args:
        op: The builder.
        hidden: Hidden states (B, T, D).
        step: The step's shared values.
        new: T, scalar.
    """
    keep = step.inputs[LOGITS_TO_KEEP]
    kept = op.Where(op.Equal(op.Sub(new, keep), new), new, op.Min(new, keep))  # all T where `keep` is 0
    padded = op.Add(op.Unsqueeze(step.lengths, [-1]), op.Range(op.Neg(kept), 0, 1))  # (B, kept), without a past
    whole = op.Range(op.Sub(new, kept), new, 1)  # (kept,), with a past
    rows = op.Max(op.Min(padded, whole), op.Range(0, kept, 1))
    return op.GatherND(hidden, op.Unsqueeze(rows, [-1]), batch_dims=1)
