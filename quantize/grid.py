"""The values that blocks of weights can take.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass

import numpy as np

from slm.core.manifest import Scheme
from slm.export.graph.builder import Array


@dataclass(frozen=True)
class Grid:
    """The values of blocks: (q - zero) * scale for integers q from `lowest` to `highest`. Zero and scale: (..., blocks)."""

    scale: Array
    zero: Array
    lowest: int
    highest: int

    def round(self, blocks: Array) -> Array:
        """Returns the nearest integers, as float32, of values (..., blocks, block); the zero if the scale is 0."""
        scale, zero = self.scale[..., None], self.zero[..., None]
        steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
        np.rint(steps, out=steps)
        steps += zero
        clipped: Array = np.clip(steps, self.lowest, self.highest, out=steps)
        return clipped

    def values(self, integers: Array) -> Array:
        """Returns the values of integers (..., blocks, block)."""
        found: Array = (integers - self.zero[..., None]) * self.scale[..., None]
        return found


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
