"""Detection of weights that already lie on a quantization grid. Rounding must not move them to another grid.

Quantization-aware training for llama.cpp's Q4_0, and checkpoints dequantized from 4-bit integers, have blocks of 32 weights
that are multiples d * j of one step, with j from -8 to 7 or -7 to 8, or 16 consecutive integers with a zero point. Q8_0 has
multiples from -127 to 127. A grid over the range of such a block has a different step, unless the block contains both ends.
This module finds the step from the largest weight of a block, which is one of a few multiples of the step.

Dimensions: N output channels, K input channels, M blocks of any channels.
"""

import numpy as np

from slm.core.grid import Grid, as_stored
from slm.core.manifest import Scheme
from slm.export.graph.builder import Array

# The block size of the supported grid formats.
BLOCK_SIZE = 32
# The multiples of the step that the largest weight of a block can be, the most likely first.
_MULTIPLES = (8, 7, 15, 14, 13, 12, 11, 10, 9, 6, 5, 4, 3, 2, 1)
_Q8_MULTIPLE = 127
# The relative tolerance of a multiple: two roundings to bfloat16, of the weight and of the largest weight. Thirty other
# weights do not pass by chance. The larger multiples of Q8_0 need a smaller tolerance, of two roundings to float16.
_ROUNDING, _Q8_ROUNDING = 2.0**-7, 2.0**-10
_TINY = 2.0**-16  # the absolute tolerance in steps, for a 0 stored as a tiny number
# The share of an output channel's blocks that must lie on a grid. A few damaged blocks do not matter.
_ENOUGH = 0.9
# The number of output channels to check first: none of them lies on a grid in an ordinary weight. Checking all takes seconds.
_SAMPLE_ROWS = 64
# The number of weights of a block to check first.
_FIRST = 6
_CHUNK_VALUES = 1 << 21


def rows_on_grid(weight: Array, scheme: Scheme) -> Array | None:
    """Returns a mask (N,) of the output channels of a weight (N, K) that lie on grids of a scheme; None if none does."""
    if not _can_look(scheme):
        return None
    sample = np.unique(np.linspace(0, len(weight) - 1, _SAMPLE_ROWS).astype(int))
    if not _rows(weight[sample], scheme).any():
        return None
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    return np.concatenate([_rows(weight[start : start + rows], scheme) for start in range(0, len(weight), rows)])


def share_on_grid(weight: Array, scheme: Scheme) -> float:
    """Returns the share of a weight's output channels that lie on grids of a scheme."""
    rows = rows_on_grid(weight, scheme)
    return 0.0 if rows is None else float(rows.mean())


def exact_grid(blocks: Array, fallback: Grid, scheme: Scheme) -> Grid:
    """Returns the grids that blocks (N, blocks, block) lie on, or the fallback's where its error is not larger."""
    scale, zero, exact = (found.reshape(blocks.shape[:-1]) for found in _fitted(_flat(blocks), scheme))
    grid = Grid(scale, zero, fallback.lowest, fallback.highest)
    better = exact & (_squared_error(blocks, grid) < _squared_error(blocks, fallback))
    return Grid(
        np.where(better, scale, fallback.scale), np.where(better, zero, fallback.zero), grid.lowest, grid.highest
    )


def _squared_error(blocks: Array, grid: Grid) -> Array:
    off = grid.values(grid.round(blocks)) - blocks
    found: Array = np.einsum("...k,...k->...", off, off)
    return found


def _flat(blocks: Array) -> Array:
    return blocks.reshape(-1, blocks.shape[-1])


def _can_look(scheme: Scheme) -> bool:
    return not scheme.dynamic and not (scheme.bits == 8 and scheme.zero_points)


def _rows(weight: Array, scheme: Scheme) -> Array:
    blocks = weight.reshape(len(weight), -1, scheme.block_size)
    _, _, exact = _fitted(_flat(blocks), scheme)
    exact = exact.reshape(blocks.shape[:2])
    full = np.abs(blocks).max(axis=-1) > 0  # a block of zeros lies on every grid
    count = full.sum(axis=1)
    on_grid: Array = (count > 0) & ((exact & full).sum(axis=1) >= _ENOUGH * count)
    return on_grid


def _fitted(blocks: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Returns the step (M,), the zero (M,), and whether they represent each block (M, block) within the tolerance."""
    size = len(blocks)
    scale, zero, exact = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, bool)
    largest = np.abs(blocks).max(axis=1)
    left = np.flatnonzero(largest)
    multiples = (*_MULTIPLES, _Q8_MULTIPLE) if scheme.bits == 8 else _MULTIPLES
    for multiple in multiples:
        if not len(left):
            break
        share = _Q8_ROUNDING if multiple == _Q8_MULTIPLE else _ROUNDING
        step = largest / np.float32(multiple)
        # In an ordinary block, the first few weights are enough to see that not all are multiples.
        near = left[_multiples(blocks[left, :_FIRST], step[left], share)]
        near = near[_multiples(blocks[near], step[near], share)]
        integers = np.rint(blocks[near] / step[near, None])
        sign, zeros, fits = _stored(integers, scheme)
        found = near[fits]
        scale[found] = as_stored(_refined(blocks[found], integers[fits], step[found]), scheme) * sign[fits]
        zero[found], exact[found] = zeros[fits], True
        left = left[~exact[left]]
    return scale, zero, exact


def _multiples(blocks: Array, step: Array, share: float) -> Array:
    """Returns whether all values of each block (M, block) are multiples of its step (M,)."""
    usable = step >= np.finfo(np.float32).tiny
    steps = blocks / np.where(usable, step, 1)[:, None]
    integers = np.rint(steps)
    near: Array = (np.abs(steps - integers) <= share * np.abs(integers) + _TINY).all(axis=1) & usable
    return near


def _stored(integers: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Returns the sign of the scale (M,), the zero (M,), and whether a scheme can store the integers (M, block) so."""
    low, high = np.minimum(integers.min(axis=1), 0), np.maximum(integers.max(axis=1), 0)
    middle, top = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    zero, sign = np.full_like(low, middle), np.ones_like(low)
    if scheme.bits == 8:
        return sign, zero, np.maximum(-low, high) < middle
    symmetric = (low >= -middle) & (high < middle)
    if scheme.zero_points:
        return sign, np.where(symmetric, zero, -low), high - low <= top
    mirrored = (low > -middle) & (high <= middle)
    return np.where(symmetric, 1, -1).astype(np.float32), zero, symmetric | mirrored


def _refined(blocks: Array, integers: Array, step: Array) -> Array:
    """Returns the step (M,) with the least error: the given one, an adjacent float32, or the least-squares solution."""
    squares = np.einsum("mk,mk->m", integers, integers, dtype=np.float64)
    fitted = np.einsum("mk,mk->m", blocks, integers, dtype=np.float64) / np.maximum(squares, 1)
    best, error = step, np.full(len(step), np.inf)
    for candidate in (step, np.nextafter(step, 0), np.nextafter(step, np.float32(np.inf)), fitted.astype(np.float32)):
        off = (blocks - integers * candidate[:, None]).astype(np.float64)
        found = np.einsum("mk,mk->m", off, off)
        best, error = np.where(found < error, candidate, best), np.minimum(found, error)
    return best
