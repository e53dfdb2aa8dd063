"""GPTQ (arXiv:2210.17323): rounds the columns of a weight in turn, and later columns compensate for earlier errors.

Dimensions: N output channels, K input channels.
"""

import numpy as np

from slm.core.grid import Grid
from slm.core.manifest import Scheme
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest, searched, stored
from slm.quantize.descent import descended
from slm.quantize.exact import rows_on_grid
from slm.quantize.moments import InputMoments

# The weight of the error of a token's embedding beside the error of its logit, relative to the mean of the moments' diagonal.
# Measured on Gemma 3 270M, whose table then has the least KL divergence for both uses together (docs/quantization.md).
LOOKUP_SHARE = 0.2
# The number of rows of a table that are rounded at a time. Intermediate arrays take some ten times as much memory as the rows.
_TABLE_ROWS = 1 << 13
# The number of columns whose errors are applied to all later columns at once.
_TOGETHER = 32


def quantize_gptq(weight: Array, moments: InputMoments, scheme: Scheme) -> dict[str, Array]:
    """Rounds a weight so that the product's output changes least. An output channel that lies on a grid keeps its grid.

    Args:
        weight: float32 (N, K); K is a multiple of the block size.
        moments: The second moments of the product's inputs.
        scheme: The scheme of the weight.

    Returns:
        The arrays of the graph's parameters, by name.
    """
    kept = rows_on_grid(weight, scheme)
    if kept is None:
        return _fitted(weight, moments, scheme)
    # Output channels are independent of each other.
    exact = quantize_nearest(weight, scheme, search=True, importance=moments.power)
    if not kept.all():
        for name, array in _fitted(weight[~kept], moments, scheme).items():
            exact[name][~kept] = array
    return exact


def quantize_table(weight: Array, moments: Array, scheme: Scheme, lookup: bool) -> dict[str, Array]:
    """Rounds the weight of a head with GPTQ, some rows at a time, so that memory does not grow with the vocabulary.

    Args:
        weight: float32 (N, K), which can be a mapping of a file.
        moments: The sum of x xᵀ (K, K) over the hidden states x that the head multiplies.
        scheme: The scheme of the weight.
        lookup: Whether the same integers are also the token embeddings. The moments then count every channel's own error
            too, because a lookup has no later columns that compensate for it.

    Returns:
        The arrays of the graph's parameters, by name.
    """
    if lookup:
        moments = moments.copy()
        moments[np.diag_indices_from(moments)] += LOOKUP_SHARE * np.diagonal(moments).mean()
    forms = InputMoments.of(moments)
    # Rows are independent of each other.
    parts = [
        quantize_gptq(weight[start : start + _TABLE_ROWS], forms, scheme)
        for start in range(0, len(weight), _TABLE_ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _fitted(weight: Array, moments: InputMoments, scheme: Scheme) -> dict[str, Array]:
    outputs, inputs = weight.shape
    blocks = (inputs // scheme.block_size, scheme.block_size)
    grid = searched(weight.reshape(outputs, *blocks), scheme, moments.power.reshape(blocks))
    integers = _compensated(weight, grid, moments).reshape(outputs, *blocks)
    integers, grid = descended(weight, integers, grid, moments.damped, scheme)
    return stored(integers, grid, scheme)


def _compensated(weight: Array, grid: Grid, moments: InputMoments) -> Array:
    """Returns the integers (N, K), float32, of GPTQ. Channels with the largest moments are rounded first."""
    outputs, inputs = weight.shape
    order, factor = moments.order, moments.factor
    # Transposed, so that each column is contiguous.
    rest = weight.T[order]
    scale, zero = (np.repeat(each.T, inputs // each.shape[1], axis=0)[order] for each in (grid.scale, grid.zero))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    integers = np.empty((inputs, outputs), np.float32)
    for start in range(0, inputs, _TOGETHER):
        stop = min(start + _TOGETHER, inputs)
        errors = np.empty((stop - start, outputs), np.float32)
        for k in range(start, stop):
            column = rest[k]
            rounded = np.clip(np.rint(column * inverse[k]) + zero[k], grid.lowest, grid.highest)
            integers[order[k]] = rounded
            error = (column - (rounded - zero[k]) * scale[k]) / factor[k, k]
            errors[k - start] = error
            # Columns of the same group are corrected immediately.
            rest[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(integers.T)
