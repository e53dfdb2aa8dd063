"""What smoothing did to a graph's tensors: factors on columns and rows (`slm.quantize.smoothing` chooses them).

Dimensions: N output channels, K input channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from slm.core.config import ModelConfig
from slm.export.graph.builder import Array
from slm.export.graph.store import LazyTensors

# Factors are rounded to eighths of a power of two, so that they can be told from tensors that were rounded since.
_STEPS_A_DOUBLING = 8
# Where nothing was rounded: what float32 leaves of two equal rows.
_SUREST = 1e-12


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


def smoothing_between(
    before: Mapping[str, Array], after: Mapping[str, Array], config: ModelConfig, exponent: float
) -> Smoothing:
    """Returns the factors that were used, told from the tensors before and after, which may have been rounded since.

    Factors are a ninth apart. What rounding to 4 bits does to a short row can be half of that, so a factor between two products
    is told from both: the first's row was divided by it, the second's columns were multiplied.
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
    """Returns what channels of a product (N, K) were divided by and of the next, (N, M), multiplied with.

    Each is told from before and after; the surer counts more.
    """
    divided, first = _log_changes(*rows)
    multiplied, second = _log_changes(*columns)
    factors: Array = np.exp2((multiplied * second - divided * first) / (first + second))
    return factors


def _log_changes(before: Array, after: Array) -> tuple[Array, Array]:
    """Returns log2 of how many times as large each row is after, and how sure that is: one over the variance."""
    tiny = np.finfo(np.float64).tiny
    along, whole, changed = (
        np.einsum("nk,nk->n", *pair, dtype=np.float64) for pair in ((before, after), (before, before), (after, after))
    )
    told = (whole > 0) & (along > 0)
    share = np.divide(along, whole, out=np.ones_like(whole), where=told)
    rest = (
        np.divide(whole * changed, along * along, out=np.ones_like(whole), where=told) - 1
    )  # tan² of what they enclose
    sure = np.where(told, before.shape[1] / np.maximum(rest, _SUREST), tiny)
    return np.log2(share), sure


def _channels(weight: Array, groups: int, size: int) -> Array:
    """Returns columns of a weight (M, K) by channel, (groups * size, n): a group's channels go to several runs of columns."""
    runs = weight.reshape(len(weight), groups, -1, size).transpose(1, 3, 2, 0)  # (groups, size, runs, M)
    return runs.reshape(groups * size, -1)


def _ratios(before: Array, after: Array) -> Array:
    """Returns how many times as large each row (N, K) was before; 1 where there is nothing to tell it from."""
    along = np.einsum("nk,nk->n", before, after)
    whole = np.einsum("nk,nk->n", before, before)
    told = (whole > 0) & (along > 0)
    ratios: Array = np.divide(whole, along, out=np.ones_like(whole), where=told)
    return ratios


def nearest_factors(ratios: Array) -> Array:
    """Returns the factors that smoothing can have used nearest to these ratios."""
    exponents = np.rint(np.log2(ratios) * _STEPS_A_DOUBLING) / _STEPS_A_DOUBLING
    factors: Array = np.exp2(exponents).astype(np.float32)
    return factors


def _along_rows(factors: Array, array: Array) -> Array:
    spread: Array = factors.reshape(-1, *[1] * (array.ndim - 1))
    return spread
