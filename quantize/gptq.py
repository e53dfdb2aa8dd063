"""GPTQ (arXiv:2210.17323): rounds the columns of a weight in turn, and later columns compensate for earlier errors.

Dimensions: N output channels, K input channels.
"""

import numpy as np

from slm.core.grid import Grid
from slm.core.manifest import Scheme
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest, searched, stored
from slm.quantize.exact import rows_on_grid

# The term added to the diagonal, relative to its mean. It avoids a division by almost zero for a channel with little variance.
DAMPING = 0.01
# The weight of the error of a token's embedding beside the error of its logit, relative to the mean of the moments' diagonal.
# Measured on Gemma 3 270M, whose table then has the least KL divergence for both uses together (docs/quantization.md).
LOOKUP_SHARE = 0.2
# The number of rows of a table that are rounded at a time. Intermediate arrays take some ten times as much memory as the rows.
_TABLE_ROWS = 1 << 13
# The number of columns whose errors are applied to all later columns at once.
_TOGETHER = 128


def quantize_gptq(weight: Array, moments: Array, scheme: Scheme, factor: Array | None = None) -> dict[str, Array]:
    """Rounds a weight so that the product's output changes least. An output channel that lies on a grid keeps its grid.

    Args:
        weight: float32 (N, K); K is a multiple of the block size.
        moments: The sum of x xᵀ (K, K) over measured inputs x of the product.
        scheme: The scheme of the weight. GPTQ chooses the scale and zero point of a block just before it rounds the block's
            first column.
        factor: The `inverse_factor` of the moments, if the caller has it.

    Returns:
        The arrays of the graph's parameters, by name.
    """
    kept = rows_on_grid(weight, scheme)
    if kept is None:
        return _compensated(weight, moments, scheme, factor)
    # Output channels are independent of each other.
    exact = quantize_nearest(weight, scheme, search=True, importance=np.diagonal(moments))
    if not kept.all():
        for name, array in _compensated(weight[~kept], moments, scheme, factor).items():
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
    factor = inverse_factor(moments)
    # Rows are independent of each other.
    parts = [
        quantize_gptq(weight[start : start + _TABLE_ROWS], moments, scheme, factor)
        for start in range(0, len(weight), _TABLE_ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compensated(weight: Array, moments: Array, scheme: Scheme, factor: Array | None) -> dict[str, Array]:
    outputs, inputs = weight.shape
    size = scheme.block_size
    factor = inverse_factor(moments) if factor is None else factor  # (K, K), upper
    rest = weight.T.copy()  # (K, N): transposed, so that each column is contiguous
    integers = np.empty((inputs, outputs), np.float32)
    importance = np.diagonal(moments).reshape(-1, 1, size)
    grids: list[Grid] = []
    for start in range(0, inputs, max(size, _TOGETHER)):
        stop = min(start + max(size, _TOGETHER), inputs)
        errors = np.empty((stop - start, outputs), np.float32)
        for k in range(start, stop):
            if k % size == 0:
                block = np.ascontiguousarray(rest[k : k + size].T)[:, None]  # (N, 1, block)
                grids.append(searched(block, scheme, importance[k // size]))
                scale, zero = grids[-1].scale[:, 0], grids[-1].zero[:, 0]
                inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
            column = rest[k]
            rounded = np.clip(np.rint(column * inverse) + zero, grids[-1].lowest, grids[-1].highest)
            integers[k] = rounded
            error = (column - (rounded - zero) * scale) / factor[k, k]
            errors[k - start] = error
            # Columns of the same group are corrected immediately.
            rest[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    grid = Grid(
        np.concatenate([each.scale for each in grids], axis=1),
        np.concatenate([each.zero for each in grids], axis=1),
        grids[0].lowest,
        grids[0].highest,
    )
    return stored(np.ascontiguousarray(integers.T).reshape(outputs, -1, size), grid, scheme)


def inverse_factor(moments: Array) -> Array:
    """Returns the upper Cholesky factor of the inverse of the damped moments, float32 (K, K)."""
    damped = moments.astype(np.float64)
    damped /= max(float(np.diagonal(damped).mean()), np.finfo(np.float64).tiny)
    damped[np.diag_indices_from(damped)] += DAMPING
    # With rows and columns in reverse order, the result is the inverse of the lower factor.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return np.ascontiguousarray(upper, np.float32)
