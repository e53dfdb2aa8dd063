"""Coordinate descent on the error of a product's output, after GPTQ: scales and integers in turn.

GPTQ rounds each column once, before the later ones. Here every integer is rounded again, given all others, as in QuantEase
(arXiv:2309.01885), and the scales of all blocks of an output channel are solved for together by least squares. No step
increases the error E M Eᵀ, where E (N, K) is the error of the weight and M (K, K) the moments, with two exceptions: scales that
are stored in float16, and output channels in which a scale would change its sign. That scale stays, and the others move.

Dimensions: N output channels, K input channels, B blocks of an output channel.
"""

import numpy as np

from slm.core.grid import Grid, as_stored
from slm.core.manifest import Scheme
from slm.export.graph.builder import Array

# The number of times that scales and integers are improved. On Gemma 3 270M, three more lower the error by a further 1 %.
_ROUNDS = 3
# The number of columns whose changes are applied to all other columns at once.
_TOGETHER = 32
# The term added to the diagonal of the equations for the changes of the scales, relative to it. It limits the changes of blocks
# whose products are almost the same.
_DAMPING = 1e-4


def descended(weight: Array, integers: Array, grid: Grid, moments: Array, scheme: Scheme) -> tuple[Array, Grid]:
    """Returns integers and a grid with a smaller error. Zero points stay.

    Args:
        weight: The weight to approximate, float32 (N, K).
        integers: Float32 (N, B, block).
        grid: The grid (N, B).
        moments: The damped second moments of the inputs, float32 (K, K).
        scheme: The scheme of the weight.
    """
    target = weight @ moments
    for _ in range(_ROUNDS):
        grid = _rescaled(target, integers, grid, moments, scheme)
        integers = _rounded_again(weight, integers, grid, moments)
    return integers, grid


def _rescaled(target: Array, integers: Array, grid: Grid, moments: Array, scheme: Scheme) -> Grid:
    """Returns the grid with the scales that have the least error for the integers.

    A scale that would be 0 or change its sign stays: the stored form of some schemes depends on it.
    """
    outputs, blocks, size = integers.shape
    steps = integers - grid.zero[..., None]
    equations = np.empty((outputs, blocks, blocks), np.float32)
    for block in range(blocks):
        products = steps[:, block] @ moments[block * size : (block + 1) * size]  # (N, K)
        equations[:, block] = np.einsum("nbi,nbi->nb", products.reshape(steps.shape), steps)
    slopes = np.einsum("nab,nb->na", equations, grid.scale)  # half the derivative of the error by each scale
    own = np.einsum("nbb->nb", equations)  # a view of the diagonals
    used = own > 0
    own += np.where(used, _DAMPING * own, 1)
    slopes -= np.einsum("nbi,nbi->nb", target.reshape(steps.shape), steps)
    scale = as_stored(grid.scale - np.linalg.solve(equations, slopes[..., None])[..., 0], scheme)
    return Grid(np.where(used & (scale * grid.scale > 0), scale, grid.scale), grid.zero, grid.lowest, grid.highest)


def _rounded_again(weight: Array, integers: Array, grid: Grid, moments: Array) -> Array:
    """Returns the integers after one pass over the columns, each of which gets the best integers given all others."""
    outputs, inputs = weight.shape
    size = inputs // integers.shape[1]
    # Transposed, so that each column is contiguous.
    rounded = np.ascontiguousarray(integers.reshape(outputs, inputs).T)
    scale, zero = (np.repeat(each.T, size, axis=0) for each in (grid.scale, grid.zero))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    slopes = moments @ ((rounded - zero) * scale - weight.T)  # half the derivative of the error by each weight, (K, N)
    curvature = np.diagonal(moments)
    for start in range(0, inputs, _TOGETHER):
        stop = min(start + _TOGETHER, inputs)
        changes = np.empty((stop - start, outputs), np.float32)
        for k in range(start, stop):
            best = np.clip(np.rint(rounded[k] - slopes[k] / curvature[k] * inverse[k]), grid.lowest, grid.highest)
            changes[k - start] = (best - rounded[k]) * scale[k]
            rounded[k] = best
            # Columns of the same group are corrected immediately.
            slopes[k + 1 : stop] += moments[k + 1 : stop, k, None] * changes[k - start]
        slopes[stop:] += moments[stop:, start:stop] @ changes
    return np.ascontiguousarray(rounded.T).reshape(integers.shape)
