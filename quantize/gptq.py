"""GPTQ: each column is rounded in turn, and the columns after it make up for what that changed (arXiv:2210.17323).

Dimensions: N output channels, K input channels.
"""

import numpy as np

from slm.core.manifest import Scheme
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest, searched, stored
from slm.quantize.exact import rows_on_grid
from slm.quantize.grid import Grid

# Added to the diagonal, as a share of its mean: a channel that hardly varied would be divided by nearly nothing.
DAMPING = 0.01
# Columns whose errors are handed on to all later ones together.
_TOGETHER = 128


def quantize_gptq(weight: Array, moments: Array, scheme: Scheme) -> dict[str, Array]:
    """Rounds a weight so that the product changes least; an output channel that lies on a grid keeps it.

    Args:
        weight: float32 (N, K); K is a multiple of the block size.
        moments: The sum of x xᵀ (K, K) over the inputs x that the product was seen with.
        scheme: How to store it. Each block's grid is searched for when its first column's turn comes.

    Returns:
        The arrays of the graph's parameters by name.
    """
    kept = rows_on_grid(weight, scheme)
    if kept is None:
        return _compensated(weight, moments, scheme)
    # Output channels do not depend on each other.
    exact = quantize_nearest(weight, scheme, search=True, importance=np.diagonal(moments))
    if not kept.all():
        for name, array in _compensated(weight[~kept], moments, scheme).items():
            exact[name][~kept] = array
    return exact


def _compensated(weight: Array, moments: Array, scheme: Scheme) -> dict[str, Array]:
    outputs, inputs = weight.shape
    size = scheme.block_size
    factor = _inverse_factor(moments)  # (K, K), upper
    rest = weight.T.copy()  # (K, N): a column's turn is a row here, which lies together
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
            # Within the columns that are handed on together, at once.
            rest[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    grid = Grid(
        np.concatenate([each.scale for each in grids], axis=1),
        np.concatenate([each.zero for each in grids], axis=1),
        grids[0].lowest,
        grids[0].highest,
    )
    return stored(np.ascontiguousarray(integers.T).reshape(outputs, -1, size), grid, scheme)


def _inverse_factor(moments: Array) -> Array:
    """Returns the upper Cholesky factor of the inverse of the moments, damped; float32 (K, K)."""
    damped = moments.astype(np.float64)
    damped /= max(float(np.diagonal(damped).mean()), np.finfo(np.float64).tiny)
    damped[np.diag_indices_from(damped)] += DAMPING
    # With the order of rows and columns turned round, the lower factor of a matrix is the inverse of what is wanted.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return np.ascontiguousarray(upper, np.float32)
