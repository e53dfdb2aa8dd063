"""Rounding of a tied table that is stored in halves (`slm.export.graph.halves`).

Dimensions: N output channels, K input channels, T positions.
"""

import numpy as np

from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Progress
from slm.export.graph.blocks import LOWER, SCALE, SHIFT, UPPER, pack
from slm.export.graph.builder import Array
from slm.quantize.instrumented import head_inputs
from slm.quantize.results import HeadChange
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.head import both_ways
from slm.runtime.logprobs import log_softmax

# The limit of the mean KL divergence of single-token steps from the whole head, in nats, and the positions that are compared.
MAX_KL_NATS, _COMPARED = 0.001, 256
# The integers of a block, in steps of the lower halves. The largest weight lies at the lowest one.
_LOWEST, _HIGHEST = -136, 119
_CHUNK_VALUES = 1 << 22


def mean_hidden(source: Bundle, text: TokenRows, progress: Progress) -> Array:
    """Returns the mean of the head's input (K,), float32, over a text.

    The first position of each row is left out, because its hidden state is unlike all others and rarely seen.
    """
    total, count = np.zeros(source.config.hidden_size), 0
    progress.start("measure hidden states", len(text.rows), "rows")
    for hidden in head_inputs(source, text.rows):
        total += hidden[1:].sum(axis=0, dtype=np.float64)
        count += len(hidden) - 1
        progress.advance()
    progress.finish()
    return (total / max(1, count)).astype(np.float32)


def compare_ways(decoder: OnnxDecoder, text: TokenRows) -> HeadChange:
    """Compares the two ways to read a head in halves on the beginning of a text."""
    kl, same, left = 0.0, 0, _COMPARED
    for row in text.rows:
        decoder.reset()
        decoder.read(row[:1].tolist())
        for halves, whole in both_ways(decoder, row[1 : 1 + left].tolist()):
            expected = log_softmax(whole)
            kl += float(np.sum(np.exp(expected) * (expected - log_softmax(halves)), dtype=np.float64))
            same += int(halves.argmax() == whole.argmax())
            left -= 1
        if not left:
            break
    count = _COMPARED - left
    return HeadChange(count, kl / max(1, count), same / max(1, count))


def rejection(change: HeadChange) -> SlmError | None:
    """Returns the error of a head in halves whose predictions change too much, or None."""
    if change.kl_nats <= MAX_KL_NATS:
        return None
    return SlmError(
        f"quality check failed: single-token steps from halves diverge from the whole head by {change.kl_nats:.4f} nats "
        f"(limit {MAX_KL_NATS:g}); nothing was written",
        "omit --head halves, or use another --calibration text",
    )


def quantize_halves(weight: Array, scheme: Scheme, mean: Array) -> dict[str, Array]:
    """Rounds each weight to the nearest of 256 integers, and splits these into halves.

    Args:
        weight: float32 (N, K); K is a multiple of the block size.
        scheme: The scheme of the table.
        mean: The mean input of the head (K,). The shift of a token is its mean error without the lower halves.

    Returns:
        The arrays of the graph's parameters, by name.
    """
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    parts = [_halves(weight[start : start + rows], scheme, mean) for start in range(0, len(weight), rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _halves(weight: Array, scheme: Scheme, mean: Array) -> dict[str, Array]:
    blocks = weight.reshape(len(weight), -1, scheme.block_size)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    flipped = high > -low
    largest, other = np.maximum(high, -low), np.minimum(high, -low)
    step = np.maximum(largest / np.float32(-_LOWEST), other / np.float32(_HIGHEST))
    step = np.where(flipped, -step, step).astype(np.float32)
    integers = np.divide(blocks, step[..., None], out=np.zeros_like(blocks), where=step[..., None] != 0)
    integers = np.clip(np.rint(integers), _LOWEST, _HIGHEST).astype(np.int16)
    upper = (integers + 8) >> 4
    lower = integers - (upper << 4)
    off = (lower * step[..., None]).reshape(len(weight), -1)
    return {
        UPPER: pack((upper + 8).astype(np.uint8), 4),
        LOWER: pack((lower + 8).astype(np.uint8), 4),
        SCALE: step * 16,
        SHIFT: off @ mean,
    }
