"""The complete plan: embedding, decoder layers, last norm and head; see `slm.export.graph.model`."""

from collections.abc import Collection
from typing import Any

from slm.core.config import ModelConfig
from slm.core.contract import LOGITS, LOGITS_TO_KEEP
from slm.core.graph_nodes import Plan, Weight
from slm.core.graph_plan.builder import INT64
from slm.core.graph_plan.fused import Fused, few_tokens
from slm.core.graph_plan.kind import Kind
from slm.core.graph_plan.modules import DecoderLayer, RMSNorm
from slm.core.graph_plan.portable import Portable
from slm.core.graph_plan.target import Operators, Step


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
    target: Operators = (Portable if kind.target == "portable" else Fused)(config, kind, names)
    op = Plan(target.opsets)
    op.defaults[LOGITS_TO_KEEP] = Weight(LOGITS_TO_KEEP, INT64, ())
    step = target.positions(op)
    if kind.quantized_cache and branching:
        step.few = few_tokens(op, config)
    hidden = _text_model(op, config, target, step)
    logits = target.weights.head(op, target.kept(op, hidden, step))
    op.outputs[LOGITS] = target.logits(op, logits)
    return op


def _text_model(op: Plan, config: ModelConfig, target: Operators, step: Step) -> Any:
    """Plans embedding, decoder layers and last norm; returns the hidden states."""
    ids = target.arranged(op)
    x, update = op("Mul", target.weights.embedding(op, ids), config.hidden_size**0.5), None
    for layer in range(config.num_hidden_layers):
        x, update = DecoderLayer(config, layer, f"model.layers.{layer}", target)(op, x, update, step)
    hidden, _ = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, target)(op, x, update)
    return hidden
