"""Frequent tokens, whose rows of a 4-bit table are stored in 8 bits as well (`slm.export.graph.frequent`).

Dimensions: N tokens of the vocabulary, K input channels, T positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Progress
from slm.export.graph.blocks import FREQUENT_IDS, FREQUENT_QUANTIZED, FREQUENT_SCALE, QUANTIZED, SCALE
from slm.export.graph.builder import Array
from slm.quantize.blocks import quantize_nearest
from slm.quantize.instrumented import head_inputs
from slm.quantize.linears import Linear
from slm.quantize.texts import TokenRows

# The numbers of rows to choose from are the powers of two between these shares of the vocabulary, and at most the limit: a
# lookup compares each token with all frequent ones.
_FEWEST_SHARE, _MOST_SHARE, _MOST = 1 / 256, 1 / 4, 1 << 13
# Without a search, the share of other tokens, in the text and in its predictions, that is small enough.
_SMALL_ENOUGH = 0.03
# The number of positions whose predictions are computed, and how many at a time.
_POSITIONS, _TOGETHER = 512, 64


@dataclass(frozen=True)
class FrequentTokens:
    """The tokens of a text and of a model's predictions, by frequency.

    Attributes:
        ids: The most frequent tokens, the first one first, int64.
        others: The share of all other tokens if the first ones count as frequent, by their number. It is measured on rows on
            which the tokens were not ranked.
    """

    ids: Array
    others: Mapping[int, float]

    @property
    def enough(self) -> int:
        """The smallest number of tokens with a small share of others; the largest if none is small enough."""
        return next((count for count, share in self.others.items() if share <= _SMALL_ENOUGH), max(self.others))


def frequent_tokens(source: Bundle, weight: Array, head: Linear, text: TokenRows, progress: Progress) -> FrequentTokens:
    """Ranks tokens by their count in a text and by their mean probability in the model's predictions, which weigh the same.

    A row of a tied table is read by the lookups of its token, and by the head for its probability.

    Args:
        source: A fused float32 bundle.
        weight: The weight of its head, (N, K).
        head: The head.
        text: The text.
        progress: Advances with each row.
    """
    rows = text.rows
    if len(rows) == 1:
        rows = rows[:, : rows.size // 2 * 2].reshape(2, -1)
    shares = np.zeros((2, head.outputs))
    step = max(1, rows.size // _POSITIONS)
    progress.start("find frequent tokens", len(rows), "rows")
    for number, hidden in enumerate(head_inputs(source, rows, head.path)):
        shares[number % 2] += _probabilities(hidden[number % step :: step], weight)
        progress.advance()
    progress.finish()
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
    for part, share in enumerate(shares):
        seen = rows[part::2]
        share += np.bincount(seen.ravel(), minlength=head.outputs) / seen.size
    shares /= 2
    ranked = [_ranked(share) for share in shares]
    others = {
        count: 1 - float(np.mean([shares[part][ranked[1 - part][:count]].sum() for part in (0, 1)]))
        for count in _counts(head.outputs)
    }
    return FrequentTokens(_ranked(shares.sum(axis=0))[: max(others)], others)


def frequent_rows(weight: Array, ids: Array, scheme: Scheme) -> dict[str, Array]:
    """Returns the arrays of the 8-bit rows, by name of the graph's parameter.

    Args:
        weight: The table, float32 (N, K).
        ids: The frequent tokens, the first one first.
        scheme: The scheme of the table.
    """
    chosen = np.sort(ids[: scheme.frequent])
    rows = quantize_nearest(weight[chosen], scheme.of_frequent)
    return {FREQUENT_IDS: chosen, FREQUENT_QUANTIZED: rows[QUANTIZED], FREQUENT_SCALE: rows[SCALE]}


def _counts(vocab_size: int) -> list[int]:
    """Returns the numbers of frequent tokens to choose from, in ascending order."""
    least, most = max(1, int(vocab_size * _FEWEST_SHARE)), min(_MOST, int(vocab_size * _MOST_SHARE))
    powers = (1 << exponent for exponent in range(vocab_size.bit_length()))
    return [count for count in powers if least <= count <= most] or [1]


def _ranked(share: Array) -> Array:
    return np.argsort(-share, kind="stable")


def _probabilities(hidden: Array, weight: Array) -> Array:
    """Returns the sum (N,) of the predicted probabilities over hidden states (T, K)."""
    total = np.zeros(len(weight))
    for start in range(0, len(hidden), _TOGETHER):
        logits = hidden[start : start + _TOGETHER] @ weight.T
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        total += logits.sum(axis=0)
    return total
