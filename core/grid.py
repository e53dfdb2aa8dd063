"""Grids: the values that blocks of weights can take. Quantization and quantization-aware training share this arithmetic.

Every function works on arrays of numpy and on tensors of PyTorch: `xp` is the module whose functions it calls, `numpy` or
`torch`, which have the same names for them.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.manifest import Scheme

Array = NDArray[Any]

# Larger blocks have fewer scales to load and multiply. A size of 128 decodes about 20 % faster than 32 (docs/LOG.md).
BLOCK_SIZES = (128, 64, 32, 16)
# The largest integer of a rounded activation. MatMulNBits (accuracy level 4) rounds each block of inputs to 8 bits.
_ACTIVATION_TOP = 127
# The number of weights that are rounded at a time. Intermediate arrays take several times as much memory.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Grid:
    """The values of blocks: (q - zero) * scale for integers q from `lowest` to `highest`. Zero and scale: (..., blocks)."""

    scale: Any
    zero: Any
    lowest: int
    highest: int
    xp: Any = np

    def round(self, blocks: Any) -> Any:
        """Returns the nearest integers, as float32, of values (..., blocks, block); the zero if the scale is 0."""
        xp = self.xp
        steps = blocks / xp.where(self.scale == 0, 1, self.scale)[..., None]  # a block with the scale 0 is all zeros
        steps = xp.round(steps, out=steps)
        steps += self.zero[..., None]
        return xp.clip(steps, self.lowest, self.highest, out=steps)

    def values(self, integers: Any) -> Any:
        """Returns the values of integers (..., blocks, block)."""
        return (integers - self.zero[..., None]) * self.scale[..., None]


def as_stored(scale: Array, scheme: Scheme) -> Array:
    """Returns scales, as float32, rounded to the type in which a scheme stores them.

    Integers are chosen for the rounded scales, so that saving adds no error. Below float16's normal range, where rounding is
    coarse, scales are rounded away from zero: a smaller scale would clip the largest weight of the block.
    """
    if not scheme.half:
        return scale
    half = scale.astype(np.float16)
    short = (np.abs(half) < np.abs(scale)) & (np.abs(scale) < np.finfo(np.float16).tiny)
    rounded = np.where(short, np.nextafter(half, np.copysign(np.float16(np.inf), half)), half)
    found: Array = rounded.astype(np.float32)
    return found


def fitted(blocks: Any, scheme: Scheme, xp: Any = np) -> Grid:
    """Returns the grid that covers the full range of each block (..., blocks, block)."""
    return between(*ends(blocks, scheme, xp), scheme, xp)


def ends(blocks: Any, scheme: Scheme, xp: Any = np) -> tuple[Any, Any]:
    """Returns the lowest and the highest value (..., blocks) that the grid of each block (..., blocks, block) has to cover."""
    if scheme.bits == 8 and not scheme.zero_points:
        largest = xp.amax(xp.abs(blocks), axis=-1)
        return -largest, largest
    low, high = xp.amin(blocks, axis=-1), xp.amax(blocks, axis=-1)
    if scheme.zero_points:  # the range always includes 0
        return xp.clip(low, None, 0), xp.clip(high, 0, None)
    # 4-bit integers have one more negative value than positive ones. The sign of the scale puts it at the largest weight.
    furthest = xp.where(-low >= high, low, high)
    return furthest, -furthest


def between(low: Any, high: Any, scheme: Scheme, xp: Any = np) -> Grid:
    """Returns the grid over the range from `low` to `high`, both (..., blocks)."""
    top = (1 << scheme.bits) - 1
    middle = 1 << (scheme.bits - 1)
    if scheme.zero_points:
        scale = as_stored((high - low) / top, scheme)
        zero = xp.round(xp.where(scale == 0, 0, -low / xp.where(scale == 0, 1, scale)))
        return Grid(scale, xp.clip(zero, 0, top), 0, top, xp)
    if scheme.dynamic:
        largest = 63 if scheme.reduced else 127
        return Grid(high / largest, xp.zeros_like(high), -largest, largest, xp)
    zero = xp.full_like(high, middle)
    if scheme.bits == 8:  # 1 to 255, so that the range is symmetric
        return Grid(as_stored(high / (middle - 1), scheme), zero, 1, top, xp)
    return Grid(as_stored(-low / middle, scheme), zero, 0, top, xp)


def rounded(weight: Any, scheme: Scheme, xp: Any = np) -> Any:
    """Returns a weight (N, K) with each value replaced by the nearest one of its block's fitted grid.

    The result lies on the grid: rounding it again changes values by at most a float32 rounding error.
    """
    blocks = weight.reshape(*weight.shape[:-1], -1, scheme.block_size)
    grid = fitted(blocks, scheme, xp)
    values = grid.round(blocks)
    values -= grid.zero[..., None]
    values *= grid.scale[..., None]
    return values.reshape(weight.shape)


def rounded_activations(x: Any, block_size: int, xp: Any = np) -> Any:
    """Returns float32 activations (..., K) as MatMulNBits (accuracy level 4) rounds them: to 8 bits, each block by its maximum.

    A block has the size of the weight's blocks. The kernel divides by the maximum before it multiplies.
    """
    blocks = x.reshape(*x.shape[:-1], -1, block_size)
    largest = xp.amax(xp.abs(blocks), axis=-1)[..., None]
    steps = blocks * xp.where(largest == 0, 0, _ACTIVATION_TOP / xp.where(largest == 0, 1, largest))
    steps = xp.round(steps, out=steps)
    steps *= largest / _ACTIVATION_TOP
    return steps.reshape(x.shape)


def distance(weight: Array, scheme: Scheme) -> float:
    """Returns the distance of a weight (N, K) from its fitted grid: the root mean square, in steps of the grid.

    It is 0 for a weight on the grid, and about 0.29 for an ordinary one.
    """
    total = 0.0
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, len(weight), rows):
        blocks = weight[start : start + rows].reshape(-1, weight.shape[1] // scheme.block_size, scheme.block_size)
        grid = fitted(blocks, scheme)
        off = grid.values(grid.round(blocks)) - blocks
        off /= np.where(grid.scale == 0, 1, grid.scale)[..., None]
        total += float(np.einsum("nbk,nbk->", off, off, dtype=np.float64))
    return (total / weight.size) ** 0.5 if weight.size else 0.0


def fitting_block(inputs: int, most: int) -> int | None:
    """Returns the largest block size up to `most` that divides a number of inputs, or the smallest; None if none does."""
    fitting = [size for size in BLOCK_SIZES if inputs % size == 0]
    return next((size for size in fitting if size <= most), fitting[-1] if fitting else None)
