"""Rounding of weights to integers in blocks, in numpy.

Dimensions: N output channels, K input channels.
"""

from collections.abc import Callable

import numpy as np

from slm.core.grid import Grid, between, ends, fitted
from slm.core.manifest import Scheme
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, pack
from slm.export.graph.builder import Array
from slm.quantize.exact import exact_grid, rows_on_grid

# The number of weights that are rounded at a time. Intermediate arrays take several times as much memory.
_CHUNK_VALUES = 1 << 22
# The factors that `searched` tries on the range of a block.
_SHRINKS = np.linspace(1.0, 0.68, 17, dtype=np.float32)


def searched(blocks: Array, scheme: Scheme, importance: Array | None = None) -> Grid:
    """Returns the grid with the least squared error for each block, from several grids with smaller ranges.

    Args:
        blocks: Values (..., blocks, block).
        scheme: The scheme of the weight.
        importance: The weight of each input channel's error, (blocks, block): the mean square of its activations.
    """
    low, high = ends(blocks, scheme)
    best, error = between(low, high, scheme), None
    for shrink in _SHRINKS:
        grid = between(low * shrink, high * shrink, scheme)
        off = grid.values(grid.round(blocks))
        off -= blocks
        off *= off
        found = off.sum(axis=-1) if importance is None else np.einsum("...i,...i->...", off, importance)
        if error is None:
            best, error = grid, found
            continue
        better = found < error
        error = np.where(better, found, error)
        best = Grid(
            np.where(better, grid.scale, best.scale), np.where(better, grid.zero, best.zero), best.lowest, best.highest
        )
    return best


def stored(integers: Array, grid: Grid, scheme: Scheme) -> dict[str, Array]:
    """Returns the graph's parameters, by name, for integers (N, blocks, block) on a grid (N, blocks)."""
    if scheme.dynamic:
        return {
            QUANTIZED: np.ascontiguousarray(integers.reshape(len(integers), -1).T.astype(np.int8)),
            SCALE: np.ascontiguousarray(grid.scale[:, 0]),
        }
    arrays = {QUANTIZED: pack(integers.astype(np.uint8), scheme.bits), SCALE: np.ascontiguousarray(grid.scale)}
    if scheme.zero_points:
        arrays[ZERO_POINTS] = pack(grid.zero.astype(np.uint8), scheme.bits)
    return arrays


def quantize_nearest(
    weight: Array, scheme: Scheme, search: bool = False, importance: Array | None = None
) -> dict[str, Array]:
    """Rounds each weight to the nearest value of its block's grid. An output channel that lies on a grid keeps its grid.

    Args:
        weight: float32 (N, K); K is a multiple of the block size.
        scheme: The scheme of the weight.
        search: Whether to search for the best scales.
        importance: For the search, the weight of each input channel's error, (K,).

    Returns:
        The arrays of the graph's parameters, by name.
    """
    blocks = weight.shape[1] // scheme.block_size
    weights = None if importance is None else importance.reshape(blocks, -1).astype(np.float32)
    make: Callable[[Array], Grid] = (
        (lambda part: searched(part, scheme, weights)) if search else (lambda part: fitted(part, scheme))
    )
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    kept = rows_on_grid(weight, scheme)
    parts = []
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].reshape(-1, blocks, scheme.block_size)
        grid = make(part)
        if kept is not None:
            grid = _of_rows(kept[start : start + rows], exact_grid(part, grid, scheme), grid)
        parts.append(stored(grid.round(part), grid, scheme))
    return {
        name: np.concatenate([part[name] for part in parts], axis=1 if scheme.dynamic and name == QUANTIZED else 0)
        for name in parts[0]
    }


def _of_rows(chosen: Array, grid: Grid, other: Grid) -> Grid:
    """Returns `grid` for the chosen output channels (N,) and `other` for the rest."""
    scale, zero = (np.where(chosen[:, None], a, b) for a, b in ((grid.scale, other.scale), (grid.zero, other.zero)))
    return Grid(scale, zero, grid.lowest, grid.highest)
