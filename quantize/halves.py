"""Rounding of a tied table that is stored in halves (`slm.export.graph.halves`).

Dimensions: N output channels, K input channels, T positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Progress
from slm.export.graph.blocks import LOWER, SCALE, SHIFT, UPPER, pack
from slm.export.graph.builder import Array
from slm.quantize.lab import head_inputs
from slm.quantize.linears import Linear
from slm.quantize.quality import Text
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.head import both_ways
from slm.runtime.logprobs import log_softmax

Head = Literal["whole", "halves"]

# The limit of the mean KL divergence of single-token steps from the whole head, in nats, and the positions that are compared.
MAX_KL_NATS, _COMPARED = 0.001, 256
# The integers of a block, in steps of the lower halves. The largest weight lies at the lowest one.
_LOWEST, _HIGHEST = -136, 119
_CHUNK_VALUES = 1 << 22


def check_halves(source: Bundle) -> None:
    """Checks that a bundle's table can be stored in halves.

    Raises:
        SlmError: If the bundle is not a fused one for the CPU, or has an untied head.
    """
    if (source.manifest.target, source.manifest.device) != ("fused", "cpu"):
        raise SlmError(
            f"--head halves supports fused bundles for the CPU only, and {source.path} is not one", "omit --head halves"
        )
    if not source.config.tie_word_embeddings:
        raise SlmError(f"--head halves needs a tied head, and {source.path} has an untied one", "omit --head halves")


def mean_hidden(source: Bundle, text: Text, progress: Progress) -> Array:
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


@dataclass(frozen=True)
class HeadChange:
    """The predictions of single-token steps from halves, compared with those of the whole head.

    Attributes:
        tokens: The number of compared positions.
        kl_nats: The mean KL divergence from the whole head, in nats.
        same_top1: The share of positions with the same most likely token.
    """

    tokens: int
    kl_nats: float
    same_top1: float


def compare_ways(decoder: OnnxDecoder, text: Text) -> HeadChange:
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


def refuses(change: HeadChange) -> str | None:
    """Returns the reason for rejecting a head in halves, or None."""
    if change.kl_nats <= MAX_KL_NATS:
        return None
    return (
        f"single-token steps from halves diverge from the whole head by {change.kl_nats:.4f} nats (limit {MAX_KL_NATS:g})"
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


def placeholders(linear: Linear, scheme: Scheme) -> Mapping[str, Array]:
    """Returns arrays of zeros in the shapes of a table's arrays, for measuring the size of a file."""
    blocks = linear.inputs // scheme.block_size
    packed = (linear.outputs, blocks, scheme.block_size // 2)
    return {
        UPPER: np.zeros(packed, np.uint8),
        LOWER: np.zeros(packed, np.uint8),
        SCALE: np.zeros((linear.outputs, blocks), np.float32),
        SHIFT: np.zeros(linear.outputs, np.float32),
    }
