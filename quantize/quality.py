"""Measurement of the effect of quantization: comparison of two bundles' predictions on the same text.

Dimensions: T positions, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from slm.core.contract import FEW_TOKENS
from slm.core.progress import Progress
from slm.export.graph.builder import Array
from slm.quantize.results import Change, Divergence, Speeds
from slm.quantize.texts import TokenRows
from slm.runtime.bench import read_and_write
from slm.runtime.decoder import OnnxDecoder, comparable_positions
from slm.runtime.logprobs import log_softmax
from slm.runtime.streaming import greedy

_LIKELIEST = 5
_TOGETHER = 32
# Greedy comparison: the number of prompts, their length, and the number of generated tokens.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 32, 32
_ROUNDS, _TIMED_TOKENS = 3, 16


def measure(before: OnnxDecoder, after: OnnxDecoder, text: TokenRows, progress: Progress) -> Change:
    """Compares the predictions of two bundles at every position of a text.

    Args:
        before: The source bundle.
        after: The quantized bundle.
        text: The text that both read.
        progress: Advances with each row.
    """
    progress.start("compare predictions", text.rows.shape[0], "rows")
    sums = _Sums()
    step = max(1, comparable_positions(before.vocab_size) // 2)  # both bundles' logits are in memory
    if any(layer.dtype == "int8" for layer in after.bundle.manifest.cache):
        step = min(step, FEW_TOKENS)  # a longer step attends to its new keys and values before it rounds them
    for row in text.rows:
        before.reset()
        after.reset()
        for start in range(0, len(row), step):
            chunk, targets = row[None, start : start + step], row[start + 1 : start + step + 1]
            old, new = (log_softmax(decoder.step(chunk, keep=0)[0]) for decoder in (before, after))  # (T, V)
            sums.add(old, new, targets)
        progress.advance()
    progress.finish()
    positions, predicted = text.rows.size, text.rows[:, 1:].size
    return Change(
        tokens=positions,
        kl_nats=sums.divergence / positions,
        same_top1=sums.same / positions,
        same_top5=sums.same_five / positions,
        perplexity_before=float(np.exp(sums.loss_before / predicted)),
        perplexity_after=float(np.exp(sums.loss_after / predicted)),
    )


@dataclass
class _Sums:
    """Sums over positions."""

    divergence: float = 0.0
    same: float = 0.0
    same_five: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0

    def add(self, old: Array, new: Array, targets: Array) -> None:
        """Adds positions.

        Args:
            old: Log-probabilities of the source (T, V).
            new: Log-probabilities of the result (T, V). Both arrays are overwritten.
            targets: The next tokens of the text, (T,) or one fewer at the end of a row.
        """
        self.loss_before -= _of_targets(old, targets)
        self.loss_after -= _of_targets(new, targets)
        self.same += float((old.argmax(-1) == new.argmax(-1)).sum())
        self.same_five += _shared(_likeliest(old), _likeliest(new))
        self.divergence += _kl_in_place(old, new)


def kl_sum(before: Array, after: Array) -> float:
    """Returns the Kullback-Leibler divergence between two arrays of logits (T, V) in nats, summed over positions."""
    total = 0.0
    for start in range(0, len(before), _TOGETHER):  # a few positions at a time, to save memory
        old, new = (log_softmax(logits[start : start + _TOGETHER]) for logits in (before, after))
        total += _kl_in_place(old, new)
    return total


def _kl_in_place(old: Array, new: Array) -> float:
    """Returns the divergence of log-probabilities (T, V), summed over positions. Overwrites both arrays."""
    np.subtract(old, new, out=new)
    return float(np.einsum("tv,tv->", np.exp(old, out=old), new, dtype=np.float64))


def _of_targets(log_probabilities: Array, targets: Array) -> float:
    return float(np.take_along_axis(log_probabilities[: len(targets)], targets[:, None], axis=-1).sum())


def _likeliest(log_probabilities: Array) -> Array:
    """Returns the five most likely tokens of each position (T, 5), in any order; fewer if the vocabulary is smaller."""
    count = min(_LIKELIEST, log_probabilities.shape[-1])
    return np.argpartition(log_probabilities, -count, axis=-1)[:, -count:]


def _shared(before: Array, after: Array) -> float:
    """Returns the share of common tokens of each row, summed over rows."""
    return float((before[:, :, None] == after[:, None]).any(axis=-1).mean(axis=-1).sum())


def divergence(before: OnnxDecoder, after: OnnxDecoder, text: TokenRows) -> Divergence:
    """Continues prompts greedily with both bundles and counts the equal tokens.

    One bundle generates, and the other reads that text in one step: both generate the same tokens up to the first one that
    the reader would not choose.
    """
    prompt = min(_PROMPT_TOKENS, text.rows.shape[1], before.context // 2)
    new = min(_NEW_TOKENS, before.context - prompt)
    equal = []
    for row in text.rows[:_PROMPTS, :prompt]:
        written = greedy(after, row.tolist(), new).tokens
        before.reset()
        read = np.array([[*row, *written[:-1]]], np.int64)
        chosen = before.step(read, keep=0)[0, prompt - 1 :].argmax(axis=-1)  # (new,)
        equal.append(next((i for i, pair in enumerate(zip(chosen, written, strict=True)) if pair[0] != pair[1]), new))
    return Divergence(new, tuple(equal))


def speeds(before: OnnxDecoder, after: OnnxDecoder) -> Speeds:
    """Measures prefill and decode speed with each bundle in turn. Both must be warm: they must have run before."""
    prompt = min(_PROMPT_TOKENS * 4, before.context // 2)
    rates: list[list[tuple[float, float]]] = [[], []]
    for _ in range(_ROUNDS):
        for decoder, found in zip((before, after), rates, strict=True):
            read_s, written_s = read_and_write(decoder, prompt, _TIMED_TOKENS)
            found.append((prompt / read_s, (_TIMED_TOKENS - 1) / written_s))
    medians = [[float(np.median([pair[i] for pair in found])) for found in rates] for i in (0, 1)]
    return Speeds(prompt, (medians[1][0], medians[1][1]), (medians[0][0], medians[0][1]))
