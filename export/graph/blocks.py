"""What integers in blocks stand for, in numpy.

Dimensions: N output channels, K input channels.
"""

import numpy as np

from slm.export.graph.builder import Array

# 8-bit values are stored with this added: 128 stands for 0.
ZERO_POINT = 128


def dequantize_blocks(quantized: Array, scale: Array) -> Array:
    """Returns the weight float32 (N, K) that integers (N, K / block, block) and scales (N, K / block) stand for."""
    blocks = (quantized.astype(np.float32) - ZERO_POINT) * scale[..., None]
    return blocks.reshape(blocks.shape[0], -1)
