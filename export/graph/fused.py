"""The fused target: onnxruntime's own operators, in-place caches, windows that slide (DESIGN: the ONNX contract).

On the CPU everything is float32. For CUDA and WebGPU, whose attention takes no float32, products, attention and caches are
float16, and norms and the residual stream, which Gemma's activations would overflow, stay float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slm.core.config import Activation, LayerType, ModelConfig
from slm.core.contract import ATTENTION_MASK, INPUT_IDS, CacheLayer, CacheType, Device, cache_layers
from slm.export.graph.builder import Array, Module, Op, Parameter, Value, cast, fused
from slm.export.graph.formats import WeightFormat
from slm.export.graph.target import AttentionShape, Norm, inverse_frequencies, last_rows, total_length


@dataclass(frozen=True)
class Step:
    """What the layers need to know of where the new tokens stand.

    Attributes:
        inputs: The graph's inputs.
        cos: Cosine of each position's rotation by kind of layer, (positions, H / 2).
        sin: Sine of the same.
        lengths: Length of each row, past included, int64 (B,).
        last_index: Index of each row's last valid position, int32 (B,).
        total: Length of the longest row, past included, int32 scalar.
    """

    inputs: Mapping[str, Value]
    cos: Mapping[LayerType, Value]
    sin: Mapping[LayerType, Value]
    lengths: Value
    last_index: Value
    total: Value


class FusedPositions(Module):
    """Rotation tables of every position, and lengths from the mask: rows are padded on the right."""

    def __init__(self, config: ModelConfig, context: int, dtype: ir.DataType) -> None:
        super().__init__()
        self._kinds: list[LayerType] = sorted(set(config.layer_types))
        self.tensors = rope_tables(config, context)
        for name in self.tensors:
            setattr(self, name, Parameter([context, config.head_dim // 2], dtype))

    def forward(self, op: Op, inputs: Mapping[str, Value]) -> Step:
        """Returns what the layers need to know."""
        lengths = op.ReduceSum(inputs[ATTENTION_MASK], [-1], keepdims=0)
        return Step(
            inputs,
            cos={kind: getattr(self, f"{kind}_cos") for kind in self._kinds},
            sin={kind: getattr(self, f"{kind}_sin") for kind in self._kinds},
            lengths=lengths,
            last_index=op.Cast(op.Sub(lengths, 1), to=ir.DataType.INT32),
            total=op.Cast(op.Squeeze(total_length(op, inputs)), to=ir.DataType.INT32),
        )


class Fused:
    """Graphs for onnxruntime."""

    def __init__(self, weights: WeightFormat, device: Device = "cpu", cache: CacheType = "float32") -> None:
        """Chooses a device and how caches are stored.

        Args:
            weights: How weights are stored.
            device: Where the graph is to run.
            cache: The caches' type: float32 or int8 on the CPU, float16 elsewhere.
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
        """Returns the module that reads a step's inputs."""
        return FusedPositions(config, context, self.dtype)

    def rms_norm(self, op: Op, x: Value, weight: Value, epsilon: float) -> Value:
        """Returns the root-mean-square norm of x over its last dimension."""
        return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)

    def add_rms_norm(self, op: Op, x: Value, update: Value, weight: Value, epsilon: float) -> tuple[Value, Value]:
        """Returns the norm of x + update, and x + update."""
        normed, _, _, total = fused(op).SkipSimplifiedLayerNormalization(x, update, weight, epsilon=epsilon, _outputs=4)
        return normed, total

    def activate(self, op: Op, name: Activation, x: Value) -> Value:
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

    def attend(
        self,
        op: Op,
        qkv: Value,
        norms: tuple[Norm, Norm],
        shape: AttentionShape,
        dtype: ir.DataType,
        step: Step,
        past: tuple[Value, Value],
        scales: tuple[Value, ...],
    ) -> tuple[Value, Value, Value]:
        """Norms each head, then rotates, caches and attends in one operator (com.microsoft GroupQueryAttention)."""
        q, k, v = op.Split(qkv, shape.sizes, axis=-1, _outputs=3)
        q, k = (
            op.Reshape(norm(op, op.Reshape(x, [0, 0, heads, shape.head_dim])), [0, 0, heads * shape.head_dim])
            for norm, x, heads in zip(norms, (q, k), (shape.heads, shape.kv_heads), strict=True)
        )
        q, k, v = (cast(op, x, dtype, self.dtype) for x in (q, k, v))
        attributes: dict[str, int | float | str] = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": shape.scale,
            "do_rotary": 1,
        }
        if shape.window is not None:
            attributes["local_window_size"] = shape.window
            if self._device != "webgpu":
                attributes["sliding_window_cache"] = 1
        operands = [q, k, v, *past, step.last_index, step.total, step.cos[shape.kind], step.sin[shape.kind]]
        if scales:
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            operands += [None, None, None, *scales]
        attended, key, value = fused(op).GroupQueryAttention(*operands, **attributes, _outputs=3)
        return attended, key, value

    def arranged(self, op: Op, input_ids: Value) -> Value:
        """Returns the ids as they are: hidden states are (B, T, D)."""
        return input_ids

    def kept(self, op: Op, hidden: Value, step: Step) -> Value:
        """Returns the hidden states (B, kept, D) of each row's last valid positions.

        Rows are padded only while there is no past: a row's valid tokens are then the first min(length, T) of the new ones.
        """
        new = op.Squeeze(op.Shape(step.inputs[INPUT_IDS], start=1, end=2))
        return last_rows(op, hidden, step.inputs, ends=op.Min(step.lengths, new))

    def logits(self, op: Op, logits: Value, step: Step, vocab_size: int) -> Value:
        """Returns the logits (B, kept, V) as they are."""
        return logits


def rope_tables(config: ModelConfig, context: int) -> dict[str, Array]:
    """Returns cosine and sine (positions, H / 2) of every position, in float32, for each kind of layer."""
    tables: dict[str, Array] = {}
    for kind in sorted(set(config.layer_types)):
        angles = np.arange(context, dtype=np.float32)[:, None] * inverse_frequencies(config, kind)
        tables |= {f"{kind}_cos": np.cos(angles), f"{kind}_sin": np.sin(angles)}
    return tables
