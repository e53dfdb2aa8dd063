"""The whole graph: what happens before, between and after the modules.

Dimensions: B batch, T new positions, D hidden, V vocabulary, P rows of the rotation tables.
"""

from collections import ChainMap
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from slm.core.config import LayerType, ModelConfig
from slm.core.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    SIDES,
    input_specs,
    output_specs,
    past_name,
    present_name,
)
from slm.export.graph.builder import Array, GraphUnderWay, Module, ModuleList, Op, Parameter, Value
from slm.export.graph.formats import WeightFormat
from slm.export.graph.modules import DecoderLayer, Positions, RMSNorm
from slm.version import __version__


class TextModel(Module):
    """Embedding, blocks and last norm."""

    def __init__(self, config: ModelConfig, weights: WeightFormat) -> None:
        super().__init__()
        self._config = config
        self.embed_tokens = weights.embedding(config.vocab_size, config.hidden_size)
        self.layers = ModuleList([DecoderLayer(config, i, weights) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, op: Op, input_ids: Value, kinds: Mapping[LayerType, Positions], inputs: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value]]:
        """Maps ids (B, T) to hidden states (B, T, D), and past caches to present ones by name."""
        x, update = op.Mul(self.embed_tokens(op, input_ids), self._config.hidden_size**0.5), None
        present: dict[str, Value] = {}
        for i, (kind, layer) in enumerate(zip(self._config.layer_types, self.layers, strict=True)):
            past = tuple(inputs[past_name(i, side)] for side in SIDES)
            x, update, *cache = layer(op, x, update, kinds[kind], past)
            present |= {present_name(i, side): value for side, value in zip(SIDES, cache, strict=True)}
        hidden, _ = self.norm(op, x, update)
        return hidden, present


class CausalLM(Module):
    """The decoder with its head."""

    def __init__(self, config: ModelConfig, weights: WeightFormat, context: int) -> None:
        super().__init__(name="")
        self._tied = config.tie_word_embeddings
        self.model = TextModel(config, weights)
        if not self._tied:
            self.lm_head = weights.linear(config.hidden_size, config.vocab_size)
        self._kinds = sorted(set(config.layer_types))
        for kind in self._kinds:
            for table in ("cos", "sin"):
                setattr(self, f"{kind}_{table}", Parameter([context, config.head_dim // 2], ir.DataType.FLOAT))

    def forward(self, op: Op, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Returns logits (B, kept, V) and the present caches by name."""
        lengths = op.ReduceSum(inputs[ATTENTION_MASK], [-1], keepdims=0)  # (B,)
        total = op.Shape(inputs[ATTENTION_MASK], start=1, end=2)  # (1,)
        kinds: dict[LayerType, Positions] = {
            kind: Positions(
                cos=getattr(self, f"{kind}_cos"),
                sin=getattr(self, f"{kind}_sin"),
                last_index=op.Cast(op.Sub(lengths, 1), to=ir.DataType.INT32),
                total=op.Cast(op.Squeeze(total), to=ir.DataType.INT32),
            )
            for kind in self._kinds
        }
        hidden, outputs = self.model(op, inputs[INPUT_IDS], kinds, inputs)
        hidden = self._kept(op, hidden, lengths, inputs)
        outputs[LOGITS] = self.model.embed_tokens.head(op, hidden) if self._tied else self.lm_head(op, hidden)
        return outputs

    def _kept(self, op: Op, hidden: Value, lengths: Value, inputs: Mapping[str, Value]) -> Value:
        """Returns the hidden states (B, kept, D) whose logits are asked for, each row's last valid ones.

        Rows are padded on the right, and only while there is no past: a row's valid tokens are then the first
        min(length, T) of the new ones.
        """
        new = op.Squeeze(op.Shape(inputs[INPUT_IDS], start=1, end=2))  # T, scalar
        keep = inputs[LOGITS_TO_KEEP]
        everything = op.Equal(keep, 0)
        kept = op.Where(everything, new, op.Min(keep, new))
        first = op.Where(everything, 0, op.Max(op.Sub(op.Min(lengths, new), kept), 0))  # (B,)
        rows = op.Add(op.Unsqueeze(first, [-1]), op.Range(0, kept, 1))  # (B, kept)
        return op.GatherND(hidden, op.Unsqueeze(rows, [-1]), batch_dims=1)


def build_graph(config: ModelConfig, weights: WeightFormat, tensors: Mapping[str, Array], context: int) -> ir.Model:
    """Builds the fused graph (DESIGN: the ONNX contract).

    Args:
        config: The model's shape.
        weights: How weights are stored.
        tensors: Data of every parameter under its name; looked up when the graph is saved, one at a time.
        context: The longest sequence, past included, in tokens; the rotation tables are as long.

    Returns:
        The model, its initializers not yet evaluated.
    """
    under_way = GraphUnderWay("slm", input_specs(config), defaults={LOGITS_TO_KEEP: 1})
    outputs = CausalLM(config, weights, context)(under_way.op, under_way.inputs)
    for spec in output_specs(config):
        under_way.output(outputs[spec.name], spec)
    model = under_way.finish(__version__)
    everything = ChainMap(rope_tables(config, context), tensors)  # type: ignore[arg-type]  # only read
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _lazy(name, value, everything)
    return model


def rope_tables(config: ModelConfig, context: int) -> dict[str, Array]:
    """Returns cosine and sine (P, H/2) of every position, in float32, for each kind of layer."""
    tables: dict[str, Array] = {}
    for kind in sorted(set(config.layer_types)):
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        rope = config.rope_parameters[kind]
        inverse_frequency = (rope.rope_theta**-exponents / rope.factor).astype(np.float32)
        angles = np.arange(context, dtype=np.float32)[:, None] * inverse_frequency
        tables |= {f"{kind}_cos": np.cos(angles), f"{kind}_sin": np.sin(angles)}
    return tables


def _lazy(name: str, value: Value, tensors: Mapping[str, Array]) -> ir.LazyTensor:
    shape, dtype = value.shape, value.dtype
    assert shape is not None and dtype is not None

    def read() -> ir.TensorProtocol:
        array = np.ascontiguousarray(tensors[name])
        assert array.shape == tuple(shape) and array.dtype == dtype.numpy(), (name, array.shape, array.dtype)
        return ir.tensor(array, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
