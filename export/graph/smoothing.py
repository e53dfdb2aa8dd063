"""Smoothing factors on the columns and rows of a graph's tensors. `slm.quantize.smoothquant` chooses the factors.

Dimensions: N output channels, K input channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from slm.core.config import ModelConfig
from slm.export.graph.builder import Array
from slm.export.graph.store import LazyTensors

# The logarithms (base 2) of factors are rounded to eighths, so that they can be recovered from quantized tensors.
_STEPS_A_DOUBLING = 8
# The floor of the variance estimate: the float32 rounding error of two equal rows.
_SUREST = 1e-12


@dataclass(frozen=True)
class Smoothing:
    """Smoothing factors by name of a tensor.

    Attributes:
        exponent: The exponent of the activations in the factors.
        columns: The factors (K,) that multiply the columns of a product's weight.
        rows: The factors (N,) that divide the rows of a product's or norm's weight.
    """

    exponent: float
    columns: Mapping[str, Array]
    rows: Mapping[str, Array]

    def apply(self, tensors: Mapping[str, Array]) -> LazyTensors:
        """Returns the smoothed tensors. The graph computes the same function, with smoother activations."""
        return LazyTensors({name: partial(self._scaled, tensors, name) for name in tensors})

    def revert(self, name: str, array: Array) -> Array:
        """Returns a smoothed tensor without its factors."""
        if name in self.columns:
            array = array / self.columns[name]
        if name in self.rows:
            array = array * _along_rows(self.rows[name], array)
        return array

    def activations(self, name: str, channels: Array) -> Array:
        """Returns measured magnitudes of a product's input channels (K,) as they are after smoothing."""
        return channels / self.columns[name] if name in self.columns else channels

    def _scaled(self, tensors: Mapping[str, Array], name: str) -> Array:
        array = tensors[name]
        if name in self.columns:
            array = array * self.columns[name]
        if name in self.rows:
            array = array / _along_rows(self.rows[name], array)
        return array


NO_SMOOTHING = Smoothing(0.0, {}, {})


def smoothing_between(
    before: Mapping[str, Array], after: Mapping[str, Array], config: ModelConfig, exponent: float
) -> Smoothing:
    """Recovers the factors from the tensors before and after smoothing. The later tensors may be quantized.

    Neighbouring factors differ by 9 %, and quantizing a short row to 4 bits can change its magnitude by half of that. A factor
    between two products is therefore estimated from both: it divided the first one's row and multiplied the second one's
    columns.
    """
    columns: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        qkv, o = f"{layer}.self_attn.qkv_proj.weight", f"{layer}.self_attn.o_proj.weight"
        gate_up, down = f"{layer}.mlp.gate_up_proj.weight", f"{layer}.mlp.down_proj.weight"
        found: dict[str, Array] = {}
        for product, norm, untouched, following, (groups, size) in (
            (qkv, "input_layernorm", (heads + kv_heads) * head_dim, o, (kv_heads, head_dim)),
            (gate_up, "pre_feedforward_layernorm", config.intermediate_size, down, (1, config.intermediate_size)),
        ):
            name = f"{layer}.{norm}.weight"
            columns[product] = rows[name] = nearest_factors(_ratios(before[name][:, None], after[name][:, None]))
            ratios = np.ones(len(before[product]))
            ratios[untouched:] = _of_both(
                (before[product][untouched:] * columns[product], after[product][untouched:]),
                (_channels(before[following], groups, size), _channels(after[following], groups, size)),
            )
            rows[product] = nearest_factors(ratios)
            found[product] = rows[product][untouched:]
        columns[down] = found[gate_up]
        columns[o] = np.repeat(found[qkv].reshape(kv_heads, 1, head_dim), heads // kv_heads, axis=1).reshape(-1)
    return Smoothing(exponent, columns, rows)


def _of_both(rows: tuple[Array, Array], columns: tuple[Array, Array]) -> Array:
    """Estimates the factors (N,) that divided the rows of a product and multiplied the columns of the next product.

    Args:
        rows: The first product's rows (N, K) before and after smoothing.
        columns: The next product's columns (N, M) before and after smoothing.

    Returns:
        The mean of both estimates, weighted by their inverse variances.
    """
    divided, first = _log_changes(*rows)
    multiplied, second = _log_changes(*columns)
    factors: Array = np.exp2((multiplied * second - divided * first) / (first + second))
    return factors


def _log_changes(before: Array, after: Array) -> tuple[Array, Array]:
    """Returns log2 of the factor by which each row grew, and the inverse variance of that estimate."""
    tiny = np.finfo(np.float64).tiny
    along, whole, changed = (
        np.einsum("nk,nk->n", *pair, dtype=np.float64) for pair in ((before, after), (before, before), (after, after))
    )
    told = (whole > 0) & (along > 0)
    share = np.divide(along, whole, out=np.ones_like(whole), where=told)
    rest = (
        np.divide(whole * changed, along * along, out=np.ones_like(whole), where=told) - 1
    )  # tan² of the angle between the rows before and after
    sure = np.where(told, before.shape[1] / np.maximum(rest, _SUREST), tiny)
    return np.log2(share), sure


def _channels(weight: Array, groups: int, size: int) -> Array:
    """Returns the columns of a weight (M, K) by channel, (groups * size, n). Several runs of columns share a group."""
    runs = weight.reshape(len(weight), groups, -1, size).transpose(1, 3, 2, 0)  # (groups, size, runs, M)
    return runs.reshape(groups * size, -1)


def _ratios(before: Array, after: Array) -> Array:
    """Returns the ratio of each row (N, K) before to after; 1 for a row of zeros."""
    along = np.einsum("nk,nk->n", before, after)
    whole = np.einsum("nk,nk->n", before, before)
    told = (whole > 0) & (along > 0)
    ratios: Array = np.divide(whole, along, out=np.ones_like(whole), where=told)
    return ratios


def nearest_factors(ratios: Array) -> Array:
    """Rounds ratios to the nearest factors that smoothing uses."""
    exponents = np.rint(np.log2(ratios) * _STEPS_A_DOUBLING) / _STEPS_A_DOUBLING
    factors: Array = np.exp2(exponents).astype(np.float32)
    return factors


def _along_rows(factors: Array, array: Array) -> Array:
    spread: Array = factors.reshape(-1, *[1] * (array.ndim - 1))
    return spread
