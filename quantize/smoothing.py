"""Smoothing: what is hard to round is moved from activations into weights and back, at no cost when the model runs.

Activations of a few channels are large, and rounding them costs the others of their block their precision. A channel of
a product's input can be divided by a factor and the weight's column multiplied with it; what made the channel divides it in
advance: a norm's weight (before q, k, v and gate, up), rows of the up projection (before down), rows of the values'
projection (before o). Factors are x^a / w^(1 - a), x being the root mean square of the channel's activations and w its
column's largest weight (SmoothQuant, arXiv:2211.10438), divided by their geometric mean and rounded to eighths of a power of
two, so that `slm verify` can tell them from the weights.

Dimensions: N output channels, K input channels, H head dim.
"""

from collections.abc import Collection, Mapping

import numpy as np

from slm.core.config import ModelConfig
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import NO_SMOOTHING, Smoothing, nearest_factors, smoothing_between

__all__ = ["EXPONENT", "NO_SMOOTHING", "Smoothing", "nearest_factors", "smoothing", "smoothing_between"]

# The share of the activations: 0.5 to 0.8 measured, best from 0.5 to 0.7 (docs/LOG.md).
EXPONENT = 0.6


def smoothing(
    tensors: Mapping[str, Array],
    config: ModelConfig,
    rms: Mapping[str, Array],
    exponent: float = EXPONENT,
    kept: Collection[str] = (),
) -> Smoothing:
    """Returns the factors for a model.

    Args:
        tensors: The float graph's tensors.
        config: The model's shape.
        rms: Root mean square of each input channel (K,), by path of the product.
        exponent: The share of the activations in the factors.
        kept: Paths of products whose columns keep their values, because they lie on a grid; their factors are 1.
    """
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        qkv, o = f"{layer}.self_attn.qkv_proj", f"{layer}.self_attn.o_proj"
        gate_up, down = f"{layer}.mlp.gate_up_proj", f"{layer}.mlp.down_proj"
        within = _factors(rms[down], _widest(tensors[f"{down}.weight"]), exponent)
        if down in kept:
            within = np.ones_like(within)
        # One head of values feeds all query heads of its group.
        grouped = np.sqrt((rms[o].reshape(kv_heads, group, size) ** 2).mean(axis=1)).reshape(-1)
        widest = _widest(tensors[f"{o}.weight"]).reshape(kv_heads, group, size).max(axis=1).reshape(-1)
        values = _factors(grouped, widest, exponent)
        if o in kept:
            values = np.ones_like(values)
        columns[f"{down}.weight"] = within
        columns[f"{o}.weight"] = np.repeat(values.reshape(kv_heads, 1, size), group, axis=1).reshape(-1)
        rows[f"{qkv}.weight"] = np.concatenate([np.ones((heads + kv_heads) * size, np.float32), values])
        rows[f"{gate_up}.weight"] = np.concatenate([np.ones(config.intermediate_size, np.float32), within])
        for product, norm in ((qkv, "input_layernorm"), (gate_up, "pre_feedforward_layernorm")):
            name = f"{product}.weight"
            factors = _factors(rms[product], _widest(tensors[name] / rows[name][:, None]), exponent)
            if product in kept:
                factors = np.ones_like(factors)
            columns[name] = rows[f"{layer}.{norm}.weight"] = factors
    return Smoothing(exponent, columns, rows)


def _factors(rms: Array, widest: Array, exponent: float) -> Array:
    smallest = np.finfo(np.float32).tiny
    logs = exponent * np.log(np.maximum(rms, smallest)) - (1 - exponent) * np.log(np.maximum(widest, smallest))
    # A channel that is always 0, or that nothing reads, needs none.
    used = (rms > 0) & (widest > 0)
    logs = np.where(used, logs - logs[used].mean() if used.any() else 0, 0)
    return nearest_factors(np.exp(logs))


def _widest(weight: Array) -> Array:
    widest: Array = np.abs(weight).max(axis=0)
    return widest
