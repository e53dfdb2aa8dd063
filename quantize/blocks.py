"""Symmetric block quantization: the arithmetic, in numpy.

Dimensions: N output channels, K input channels.
"""

import numpy as np

from slm.export.graph.blocks import ZERO_POINT
from slm.export.graph.builder import Array

# Of the 8-bit values only 1 to 255 are used, so that the range is symmetric.
LEVELS = 127
# Weights rounded at a time.
_CHUNK_VALUES = 1 << 22


def quantize_blocks(weight: Array, block_size: int) -> tuple[Array, Array]:
    """Rounds each weight to the nearest of 255 levels of its block.

    Args:
        weight: float32 (N, K); K is a multiple of block_size.
        block_size: Input channels that share one scale.

    Returns:
        Integers uint8 (N, K / block_size, block_size), and the scales float32 (N, K / block_size).
    """
    shape = (weight.shape[0], weight.shape[1] // block_size, block_size)
    quantized, scale = np.empty(shape, np.uint8), np.empty(shape[:2], np.float32)
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, shape[0], rows):  # what is in between would be twice the largest matrix
        part = slice(start, start + rows)
        quantized[part], scale[part] = _quantized(weight[part].reshape(-1, *shape[1:]))
    return quantized, scale


def _quantized(blocks: Array) -> tuple[Array, Array]:
    scale = np.abs(blocks).max(axis=-1) / np.float32(LEVELS)
    # A block of zeros has scale 0; anything stands for 0 there.
    steps = np.divide(blocks, scale[..., None], out=np.zeros_like(blocks), where=scale[..., None] != 0)
    return (np.rint(steps, out=steps) + ZERO_POINT).astype(np.uint8), scale
