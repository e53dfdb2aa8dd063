"""Grids: the values that blocks of weights can take. Quantization and quantization-aware training share this arithmetic.

Every function works on arrays of numpy and on tensors of PyTorch: `xp` is the module whose functions it calls, `numpy` or
`torch`, which have the same names for them.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass, replace
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
# x86 CPUs without VNNI add two products, of adjacent input channels, in 16 bits (vpmaddubsw), which saturate. Activations are
# unsigned, so that integers of one sign may sum to 128: 255 * 128 = 32,640.
PAIR_LIMIT = 128
# Larger steps that the scale of such a product is chosen from. With twice the step, no pair exceeds the limit.
_WIDER = np.linspace(1, 2, 17, dtype=np.float32)


@dataclass(frozen=True)
class Grid:
    """The values of blocks: (q - zero) * scale for integers q from `lowest` to `highest`. Zero and scale: (..., blocks).

    With a `pair` limit, two adjacent integers of one sign, the first at an even position, sum to at most this value.
    """

    scale: Any
    zero: Any
    lowest: int
    highest: int
    xp: Any = np
    pair: int | None = None

    def round(self, blocks: Any) -> Any:
        """Returns the nearest integers, as float32, of values (..., blocks, block); the zero if the scale is 0."""
        xp = self.xp
        steps = blocks / xp.where(self.scale == 0, 1, self.scale)[..., None]  # a block with the scale 0 is all zeros
        steps = xp.round(steps, out=steps)
        steps += self.zero[..., None]
        steps = xp.clip(steps, self.lowest, self.highest, out=steps)
        return steps if self.pair is None else _limited(steps, self.pair, xp)

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
    """Returns the grid that covers the full range of each block (..., blocks, block).

    If pairs of integers are limited, the grid is wider where that reduces the squared error.
    """
    grid = between(*ends(blocks, scheme, xp), scheme, xp)
    return grid if grid.pair is None else replace(grid, scale=grid.scale * _widening(blocks, grid, xp))


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
        return Grid(high / 127, xp.zeros_like(high), -127, 127, xp, PAIR_LIMIT if scheme.reduced else None)
    zero = xp.full_like(high, middle)
    if scheme.bits == 8:  # 1 to 255, so that the range is symmetric
        return Grid(as_stored(high / (middle - 1), scheme), zero, 1, top, xp)
    return Grid(as_stored(-low / middle, scheme), zero, 0, top, xp)


def pair_sums(blocks: Any, xp: Any = np) -> Any:
    """Returns the largest magnitude of the sum of the values of one sign, for each pair of a block.

    Args:
        blocks: Values (..., block); the result is (..., block / 2).
        xp: `numpy` or `torch`.
    """
    pairs = blocks.reshape(*blocks.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return xp.maximum(
        xp.clip(first, 0, None) + xp.clip(second, 0, None), xp.clip(-first, 0, None) + xp.clip(-second, 0, None)
    )


def _widening(blocks: Any, grid: Grid, xp: Any) -> Any:
    """Returns the factor (..., blocks) of the scale that minimizes the expected squared error of rounding with a pair limit."""
    sums = pair_sums(blocks, xp)
    best, least = xp.ones_like(grid.scale), None
    for factor in _WIDER:
        step = grid.scale * float(factor)
        excess = xp.clip(sums - grid.pair * step[..., None], 0, None)
        # Each integer is off by a twelfth of a squared step on average. Both integers of a pair take half of its excess.
        error = blocks.shape[-1] / 12 * step**2 + (excess * excess).sum(-1) / 2
        if least is None:
            least = error
            continue
        best = xp.where(error < least, float(factor), best)
        least = xp.minimum(error, least)
    return best


def _limited(steps: Any, limit: int, xp: Any) -> Any:
    """Returns integers (..., block) whose pairs are within a limit. Both integers of a pair take half of its excess."""
    excess = xp.clip(pair_sums(steps, xp) - limit, 0, None)
    more = xp.ceil(excess / 2)
    pairs = steps.reshape(*steps.shape[:-1], -1, 2)
    pairs[..., 0] -= xp.sign(pairs[..., 0]) * more
    pairs[..., 1] -= xp.sign(pairs[..., 1]) * (excess - more)
    return pairs.reshape(steps.shape)


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
