"""SmoothQuant (arXiv:2211.10438): moves large activations of a few channels into the weights.

A few channels have large activations, and rounding them reduces the precision of the other channels in their block. Smoothing
divides a channel of a product's input by a factor and multiplies the weight's column by the same factor. The division costs
nothing at run time, because it is applied in advance to the weight that produces the channel: a norm (before q, k, v and
gate, up), rows of the up projection (before down), or rows of the value projection (before o).

The factors are x^a / w^(1 - a), where x is the root mean square of the channel's activations and w the largest weight of its
column. They are divided by their geometric mean, and their base-2 logarithms are rounded to eighths, so that `slm verify` can
recover them from the weights.

Dimensions: N output channels, K input channels, H head dim.
"""

from collections.abc import Collection, Mapping

import numpy as np

from slm.core.config import ModelConfig
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import Smoothing, nearest_factors

# The exponent a of the activations. Of the measured 0.5 to 0.8, 0.5 to 0.7 are best (docs/LOG.md).
EXPONENT = 0.6


def smoothquant(
    tensors: Mapping[str, Array],
    config: ModelConfig,
    rms: Mapping[str, Array],
    exponent: float = EXPONENT,
    kept: Collection[str] = (),
) -> Smoothing:
    """Returns the smoothing factors for a model.

    Args:
        tensors: The float graph's tensors.
        config: The model's shape.
        rms: Root mean square of each input channel (K,), by path of the product.
        exponent: The exponent of the activations in the factors.
        kept: Paths of products that get factors of 1, because their weights lie on a grid.
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
        # A value head feeds all query heads of its group, so they share its factors.
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
    # A channel whose activations or weights are all 0 gets a factor of 1.
    used = (rms > 0) & (widest > 0)
    logs = np.where(used, logs - logs[used].mean() if used.any() else 0, 0)
    return nearest_factors(np.exp(logs))


def _widest(weight: Array) -> Array:
    widest: Array = np.abs(weight).max(axis=0)
    return widest
