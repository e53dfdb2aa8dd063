"""Packing and dequantization of block-quantized weights, in numpy.

Dimensions: N output channels, K input channels.
"""

from collections.abc import Mapping

import numpy as np

from slm.core.manifest import Scheme
from slm.export.graph.builder import Array

# Names of a quantized weight's tensors in the graph.
QUANTIZED, SCALE, ZERO_POINTS = "weight_quantized", "weight_scale", "weight_zero_points"
# The names of a table in halves, which also has scales.
UPPER, LOWER, SHIFT = "weight_upper", "weight_lower", "weight_shift"
# The names of the rows of frequent tokens (`slm.export.graph.frequent`).
FREQUENT_IDS, FREQUENT_QUANTIZED, FREQUENT_SCALE = "frequent_ids", "frequent_quantized", "frequent_scale"

# The number of rows that are dequantized at a time. Unpacked integers of a whole table take a quarter of its memory.
_CHUNK_ROWS = 1 << 13


def parts_of(scheme: Scheme) -> tuple[str, ...]:
    """Returns the names of a quantized weight's tensors."""
    if scheme.halves:
        return UPPER, LOWER, SCALE, SHIFT
    points = (ZERO_POINTS,) if scheme.zero_points else ()
    frequent = (FREQUENT_IDS, FREQUENT_QUANTIZED, FREQUENT_SCALE) if scheme.frequent else ()
    return (QUANTIZED, SCALE, *points, *frequent)


def pack(integers: Array, bits: int) -> Array:
    """Packs unsigned integers uint8 (..., n) into bytes (..., ceil(n * bits / 8)), low bits first."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], axis=-1)
    packed: Array = integers[..., 0::2] | (integers[..., 1::2] << 4)
    return packed


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Returns the unsigned integers uint8 (..., count) that `pack` packed."""
    if bits == 8:
        return packed
    integers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    found: Array = integers[..., :count]
    return found


def dequantize(quantized: Array, scale: Array, zero_points: Array | None, scheme: Scheme) -> Array:
    """Returns the dequantized weight, float32 (N, K).

    Args:
        quantized: uint8 (N, blocks, bytes of a block); int8 (K, N) if the scheme is dynamic; in a portable graph, 4- or
            8-bit integers by columns, (K, N), or by rows, (N, K).
        scale: float32 (N, blocks); (N,) if the scheme is dynamic; in a portable graph (blocks, N) or (N, blocks).
        zero_points: uint8 (N, bytes of all blocks), or None if the scheme has none; in a portable graph, 4- or 8-bit
            integers in the shape of the scales.
        scheme: The quantization scheme.
    """
    if scheme.dynamic:
        return quantized.T.astype(np.float32) * scale[:, None]
    if quantized.ndim == 2:
        return _of_portable(quantized, scale, zero_points)
    count, blocks = scale.shape
    weight = np.empty((count, blocks, scheme.block_size), np.float32)
    for start in range(0, count, _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        part = weight[rows]
        part[...] = unpack(quantized[rows], scheme.bits, scheme.block_size)
        if zero_points is None:
            part -= 1 << (scheme.bits - 1)
        else:
            part -= unpack(zero_points[rows], scheme.bits, blocks)[..., None].astype(np.float32)
        part *= scale[rows, :, None]
    return weight.reshape(count, -1)


def dequantized(arrays: Mapping[str, Array], scheme: Scheme) -> Array:
    """Returns the dequantized weight, float32 (N, K), of the tensors that `parts_of` names."""
    if scheme.halves:
        return dequantize_halves(arrays[UPPER], arrays[LOWER], arrays[SCALE], scheme)
    weight = dequantize(arrays[QUANTIZED], arrays[SCALE], arrays[ZERO_POINTS] if scheme.zero_points else None, scheme)
    if scheme.frequent:
        rows = dequantize(arrays[FREQUENT_QUANTIZED], arrays[FREQUENT_SCALE], None, scheme.of_frequent)
        weight[arrays[FREQUENT_IDS]] = rows
    return weight


def _of_portable(quantized: Array, scale: Array, zero_points: Array | None) -> Array:
    if len(quantized) != len(scale):  # by columns
        quantized, scale = quantized.T, scale.T
        zero_points = None if zero_points is None else zero_points.T
    integers = quantized.astype(np.float32).reshape(*scale.shape, -1)  # (N, blocks, block)
    if zero_points is not None:
        integers -= zero_points.astype(np.float32)[..., None]
    integers *= scale[..., None]
    found: Array = integers.reshape(len(integers), -1)
    return found


def dequantize_halves(upper: Array, lower: Array, scale: Array, scheme: Scheme) -> Array:
    """Returns the dequantized weight of a table in halves (`slm.export.graph.halves`), float32 (N, K).

    Args:
        upper: The upper halves, uint8 (N, blocks, bytes of a block).
        lower: The lower halves.
        scale: The scales of the upper halves, float32 (N, blocks).
        scheme: The quantization scheme.
    """
    integers = unpack(lower, 4, scheme.block_size).astype(np.float32)  # (N, blocks, block)
    integers -= 8
    integers /= 16
    integers += unpack(upper, 4, scheme.block_size)
    integers -= 8
    integers *= scale[..., None]
    return integers.reshape(len(integers), -1)


def relative_error(before: Array, after: Array) -> float:
    """Returns the norm of `after - before` divided by the norm of `before`; 0 if `before` is all zeros."""
    whole = float(np.einsum("nk,nk->", before, before, dtype=np.float64))
    off = after - before
    return (float(np.einsum("nk,nk->", off, off, dtype=np.float64)) / whole) ** 0.5 if whole else 0.0
