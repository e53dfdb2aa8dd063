"""Calibration of 8-bit caches: quantization steps of keys and values, measured on a text.

An 8-bit cache takes a quarter of the memory of float32, and a step reads a quarter of the bytes.
"""

import numpy as np

from slm.core.contract import SIDES
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.export.graph.builder import Array
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

LEVELS = 127
# Other text can have slightly larger values. Values beyond this headroom are clipped.
_HEADROOM = 1.1


def cache_steps(bundle: Bundle, text: TokenRows, progress: Progress) -> dict[str, Array]:
    """Returns the quantization step of each channel, float32 (1, K, 1, H), by parameter name.

    Args:
        bundle: A bundle with float caches.
        text: The calibration text.
        progress: Advances with each row.
    """
    decoder = OnnxDecoder(bundle)
    largest: dict[str, Array] = {}
    progress.start("measure keys and values", len(text.rows), "rows")
    for row in text.rows:
        decoder.reset()
        decoder.read(row.tolist())
        for layer in bundle.manifest.cache:
            for side in SIDES:
                cached = decoder.buffers.resident(layer, side, len(row))  # (1, K, positions, H)
                name = f"model.layers.{layer.layer}.self_attn.{side[0]}_scale"
                found = np.abs(cached).max(axis=2, keepdims=True)
                largest[name] = np.maximum(found, largest[name]) if name in largest else found
        progress.advance()
    progress.finish()
    smallest = np.float32(np.finfo(np.float32).tiny)
    return {name: np.maximum(found * np.float32(_HEADROOM / LEVELS), smallest) for name, found in largest.items()}
