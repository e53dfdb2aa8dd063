"""The values that blocks of weights can take.

Dimensions: N output channels, K input channels.
"""

from dataclasses import dataclass

import numpy as np

from slm.core.manifest import Scheme
from slm.export.graph.builder import Array


@dataclass(frozen=True)
class Grid:
    """The values that blocks can take: (q - zero) * scale for integers q from `lowest` to `highest`; both (..., blocks)."""

    scale: Array
    zero: Array
    lowest: int
    highest: int

    def round(self, blocks: Array) -> Array:
        """Returns the nearest integers, float32, for values (..., blocks, block); where a scale is 0, the zero."""
        scale, zero = self.scale[..., None], self.zero[..., None]
        steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
        np.rint(steps, out=steps)
        steps += zero
        clipped: Array = np.clip(steps, self.lowest, self.highest, out=steps)
        return clipped

    def values(self, integers: Array) -> Array:
        """Returns what integers (..., blocks, block) stand for."""
        found: Array = (integers - self.zero[..., None]) * self.scale[..., None]
        return found


def as_stored(scale: Array, scheme: Scheme) -> Array:
    """Returns scales as a scheme stores them, float32: integers are chosen for these, so no error is added when they are saved.

    Below float16's normal range, where a step is a large share of the scale, they are rounded away from zero: integers end at
    the ends of their range, and the largest weight of the block must not be beyond them.
    """
    if not scheme.half:
        return scale
    half = scale.astype(np.float16)
    short = (np.abs(half) < np.abs(scale)) & (np.abs(scale) < np.finfo(np.float16).tiny)
    rounded = np.where(short, np.nextafter(half, np.copysign(np.float16(np.inf), half)), half)
    found: Array = rounded.astype(np.float32)
    return found
