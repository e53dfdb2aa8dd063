"""The complete graph: embedding, decoder layers, last norm and head.

Dimensions: B batch, T new positions, D hidden, V vocabulary.
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from slm.core.config import ModelConfig
from slm.core.contract import (
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    SIDES,
    TensorSpec,
    input_specs,
    output_specs,
    past_name,
    present_name,
    slot_specs,
)
from slm.core.errors import SlmError
from slm.export.graph.builder import Array, GraphUnderWay, Module, ModuleList, Op, Value, cast
from slm.export.graph.modules import DecoderLayer, RMSNorm
from slm.export.graph.slots import SlotFormat, empty
from slm.export.graph.target import Operators
from slm.version import __version__


class TextModel(Module):
    """Embedding, decoder layers and last norm."""

    def __init__(self, config: ModelConfig, target: Operators[Any]) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = target.weights.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = ModuleList([DecoderLayer(config, i, f"model.layers.{i}", target) for i in layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, target)

    def forward(self, op: Op, ids: Value, step: Any, inputs: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        """Maps ids (...) to hidden states (..., D), and past caches to present ones by name."""
        x, update = op.Mul(self.embed_tokens(op, ids), self._config.hidden_size**0.5), None
        present: dict[str, Value] = {}
        for i, layer in enumerate(self.layers):
            past = tuple(inputs[past_name(i, side)] for side in SIDES)
            x, update, *cache = layer(op, x, update, step, past)
            present |= {present_name(i, side): value for side, value in zip(SIDES, cache, strict=True)}
        hidden, _ = self.norm(op, x, update)
        return hidden, present


class CausalLM(Module):
    """The text model with its head."""

    def __init__(self, config: ModelConfig, target: Operators[Any], context: int) -> None:
        super().__init__(name="")
        self._config, self._target = config, target
        self.positions = target.positions(config, context)
        self.model = TextModel(config, target)
        if not config.tie_word_embeddings:
            self.lm_head = target.weights.linear("lm_head", config.hidden_size, config.vocab_size)

    def forward(self, op: Op, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Returns logits (B, kept, V) and the present caches by name."""
        step = self.positions(op, inputs)
        hidden, outputs = self.model(op, self._target.arranged(op, inputs[INPUT_IDS]), step, inputs)
        logits = self._head(op, self._target.kept(op, hidden, step), inputs[LOGITS_TO_KEEP])
        outputs[LOGITS] = self._target.logits(op, logits, step, self._config.vocab_size)
        return outputs

    def _head(self, op: Op, hidden: Value, keep: Value) -> Value:
        if self._config.tie_word_embeddings:
            return self.model.embed_tokens.head(op, hidden, keep)
        hidden = cast(op, hidden, ir.DataType.FLOAT, self.lm_head.dtype)
        return cast(op, self.lm_head(op, hidden), self.lm_head.dtype, ir.DataType.FLOAT)


def build_graph(config: ModelConfig, target: Operators[Any], tensors: Mapping[str, Array], context: int) -> ir.Model:
    """Builds the graph for a target. docs/bundles.md specifies its inputs and outputs.

    Args:
        config: The model's shape.
        target: The target, which chooses the operators and the weight format.
        tensors: The data of every parameter, by name. Each array is read when the graph is saved, and rounded if the
            target stores it in float16.
        context: The longest sequence, past included, in tokens: the length of a GPU's rotation tables.

    Returns:
        The model, with initializers that are evaluated on saving.
    """
    caches = target.caches(config)
    # Other clients do not pass this input, and expect the logits of all positions.
    defaults: dict[str, Array] = {LOGITS_TO_KEEP: np.array(0)}
    weights = target.weights
    slots: tuple[TensorSpec, ...] = ()
    if isinstance(weights, SlotFormat):
        slots = slot_specs(config)
        defaults |= {spec.name: empty(spec) for spec in slots}
    under_way = GraphUnderWay("slm", target.opsets, input_specs(caches, slots), defaults)
    if isinstance(weights, SlotFormat):
        weights.bind(under_way.inputs)
        tensors = ChainMap(weights.tensors, tensors)  # type: ignore[arg-type]  # only read
    model = CausalLM(config, target, context)
    outputs = model(under_way.op, under_way.inputs)
    for spec in output_specs(config.vocab_size, caches):
        under_way.output(outputs[spec.name], spec)
    graph = under_way.finish(__version__)
    own = {f"positions.{name}": array for name, array in model.positions.tensors.items()}
    everything = ChainMap(own, tensors)  # type: ignore[arg-type]  # only read
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _lazy(name, value, everything)
    return graph


def _lazy(name: str, value: Value, tensors: Mapping[str, Array]) -> ir.LazyTensor:
    shape, dtype = value.shape, value.dtype
    assert shape is not None and dtype is not None

    def read() -> ir.TensorProtocol:
        array = np.ascontiguousarray(tensors[name])
        if dtype == ir.DataType.FLOAT16:
            array = _halved(name, array)
        assert array.shape == tuple(shape) and array.dtype == dtype.numpy(), (name, array.shape, array.dtype)
        return ir.tensor(array, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)


def _halved(name: str, array: Array) -> Array:
    with np.errstate(over="ignore"):
        half: Array = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise SlmError(
            f"{name} has values up to {np.abs(array).max():.0f}, beyond float16",
            "use --device cpu, which keeps float32",
        )
    return half
