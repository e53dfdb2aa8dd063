"""Smoothing: what is hard to round is moved from activations into weights and back, at no cost when the model runs.

Activations of a few channels are large, and rounding them costs the others of their block their precision. A channel of
a product's input can be divided by a factor and the weight's column multiplied with it; what made the channel divides it in
advance: a norm's weight (before q, k, v and gate, up), rows of the up projection (before down), rows of the values'
projection (before o). Factors are x^a / w^(1 - a), x being the root mean square of the channel's activations and w its
column's largest weight (SmoothQuant, arXiv:2211.10438), divided by their geometric mean and rounded to eighths of a power of
two, so that `slm verify` can tell them from the weights.

Dimensions: N output channels, K input channels, H head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from slm.core.config import ModelConfig
from slm.export.graph import LazyTensors
from slm.export.graph.builder import Array

# The share of the activations: 0.5 to 0.8 measured, best from 0.5 to 0.7 (docs/LOG.md).
EXPONENT = 0.6
_STEPS_A_DOUBLING = 8


@dataclass(frozen=True)
class Smoothing:
    """Factors by name of a tensor: its columns are multiplied with some, its rows divided by others.

    Attributes:
        exponent: The share of the activations in them.
        columns: Of products' weights, (K,).
        rows: Of products' and norms' weights, (N,).
    """

    exponent: float
    columns: Mapping[str, Array]
    rows: Mapping[str, Array]

    def apply(self, tensors: Mapping[str, Array]) -> LazyTensors:
        """Returns the tensors of a float graph that computes the same with smoother activations."""
        return LazyTensors({name: partial(self._scaled, tensors, name) for name in tensors})

    def revert(self, name: str, array: Array) -> Array:
        """Returns a tensor as it would be without smoothing."""
        if name in self.columns:
            array = array / self.columns[name]
        if name in self.rows:
            array = array * _along_rows(self.rows[name], array)
        return array

    def activations(self, name: str, channels: Array) -> Array:
        """Returns what was measured of the input channels (K,) of a product as it is after smoothing."""
        return channels / self.columns[name] if name in self.columns else channels

    def _scaled(self, tensors: Mapping[str, Array], name: str) -> Array:
        array = tensors[name]
        if name in self.columns:
            array = array * self.columns[name]
        if name in self.rows:
            array = array / _along_rows(self.rows[name], array)
        return array


NO_SMOOTHING = Smoothing(0.0, {}, {})


def smoothing(
    tensors: Mapping[str, Array], config: ModelConfig, rms: Mapping[str, Array], exponent: float = EXPONENT
) -> Smoothing:
    """Returns the factors for a model.

    Args:
        tensors: The float graph's tensors.
        config: The model's shape.
        rms: Root mean square of each input channel (K,), by path of the product.
        exponent: The share of the activations in the factors.
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
        # One head of values feeds all query heads of its group.
        grouped = np.sqrt((rms[o].reshape(kv_heads, group, size) ** 2).mean(axis=1)).reshape(-1)
        widest = _widest(tensors[f"{o}.weight"]).reshape(kv_heads, group, size).max(axis=1).reshape(-1)
        values = _factors(grouped, widest, exponent)
        columns[f"{down}.weight"] = within
        columns[f"{o}.weight"] = np.repeat(values.reshape(kv_heads, 1, size), group, axis=1).reshape(-1)
        rows[f"{qkv}.weight"] = np.concatenate([np.ones((heads + kv_heads) * size, np.float32), values])
        rows[f"{gate_up}.weight"] = np.concatenate([np.ones(config.intermediate_size, np.float32), within])
        for product, norm in ((qkv, "input_layernorm"), (gate_up, "pre_feedforward_layernorm")):
            name = f"{product}.weight"
            factors = _factors(rms[product], _widest(tensors[name] / rows[name][:, None]), exponent)
            columns[name] = rows[f"{layer}.{norm}.weight"] = factors
    return Smoothing(exponent, columns, rows)


def smoothing_between(
    before: Mapping[str, Array], after: Mapping[str, Array], config: ModelConfig, exponent: float
) -> Smoothing:
    """Returns the factors that were used, told from the tensors before and after, which may have been rounded since.

    Factors are a ninth apart and rounding moves a row by less than a hundredth, so each is found exactly.
    """
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        qkv, o = f"{layer}.self_attn.qkv_proj.weight", f"{layer}.self_attn.o_proj.weight"
        gate_up, down = f"{layer}.mlp.gate_up_proj.weight", f"{layer}.mlp.down_proj.weight"
        found: dict[str, Array] = {}
        for product, norm, untouched in (
            (qkv, "input_layernorm", (heads + kv_heads) * size),
            (gate_up, "pre_feedforward_layernorm", config.intermediate_size),
        ):
            name = f"{layer}.{norm}.weight"
            columns[product] = rows[name] = nearest_factors(_ratios(before[name][:, None], after[name][:, None]))
            ratios = _ratios(before[product] * columns[product], after[product])
            ratios[:untouched] = 1
            rows[product] = nearest_factors(ratios)
            found[product] = rows[product][untouched:]
        columns[down] = found[gate_up]
        columns[o] = np.repeat(found[qkv].reshape(kv_heads, 1, size), heads // kv_heads, axis=1).reshape(-1)
    return Smoothing(exponent, columns, rows)


def _ratios(before: Array, after: Array) -> Array:
    """Returns how many times as large each row (N, K) was before; 1 where there is nothing to tell it from."""
    along = np.einsum("nk,nk->n", before, after)
    whole = np.einsum("nk,nk->n", before, before)
    told = (whole > 0) & (along > 0)
    return np.divide(whole, along, out=np.ones_like(whole), where=told)


def nearest_factors(ratios: Array) -> Array:
    """Returns the factors that smoothing can have used nearest to these ratios."""
    exponents = np.rint(np.log2(ratios) * _STEPS_A_DOUBLING) / _STEPS_A_DOUBLING
    factors: Array = np.exp2(exponents).astype(np.float32)
    return factors


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


def _along_rows(factors: Array, array: Array) -> Array:
    spread: Array = factors.reshape(-1, *[1] * (array.ndim - 1))
    return spread
