"""The effect of quantization: two bundles read the same text, and their predictions are compared.

Dimensions: T positions, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.core.sample import stories_path, validation_path
from slm.core.text.tokens import TextSource
from slm.core.tokenizer import Tokenizer
from slm.export.graph.builder import Array
from slm.runtime.bench import read_and_write
from slm.runtime.decoder import OnnxDecoder, comparable_positions
from slm.runtime.logprobs import log_softmax
from slm.runtime.streaming import greedy

DEFAULT_TOKENS = 2048
# Long enough for a row to pass any window that is shorter, short enough for the logits of a row to stay small.
ROW_TOKENS = 256
PAST_THE_WINDOW = 64
_LIKELIEST = 5
_TOGETHER = 32
# Greedy texts: so many, after so long a beginning, so long.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 32, 32
_ROUNDS, _TIMED_TOKENS = 3, 16


@dataclass(frozen=True)
class Text:
    """Tokens to measure on: rows (rows, T), and where they came from."""

    name: str
    rows: Array


class Opened:
    """The source's decoder, opened when it is first needed, and again after it was closed to free memory."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._decoder: OnnxDecoder | None = None

    def __call__(self) -> OnnxDecoder:
        """Returns the decoder."""
        self._decoder = self._decoder or OnnxDecoder(self._bundle)
        return self._decoder

    def close(self) -> None:
        """Frees its memory."""
        self._decoder = None


@dataclass(frozen=True)
class Change:
    """Differences between two bundles, averaged over positions.

    Attributes:
        tokens: Positions compared.
        kl_nats: Kullback-Leibler divergence of the predictions after from those before.
        same_top1: Share of positions where the likeliest token is the same.
        same_top5: How many of the five likeliest tokens still are, as a share, on average.
        perplexity_before: exp of the mean loss on the text, before.
        perplexity_after: The same, after.
    """

    tokens: int
    kl_nats: float
    same_top1: float
    same_top5: float
    perplexity_before: float
    perplexity_after: float


def calibration_text(
    bundle: Bundle, path: Path | TextSource | None, tokens: int = DEFAULT_TOKENS, row_tokens: int | None = None
) -> Text:
    """Cuts a text for choosing settings; see `measuring_text`. It must not be the text that they are measured on.

    The default is the training stories that ship with slm.
    """
    name = "the training stories that ship with slm" if path is None else str(_source(path).path)
    return Text(name, _rows(bundle, _source(path or stories_path()), tokens, row_tokens))


def measuring_text(
    bundle: Bundle, path: Path | TextSource | None, tokens: int = DEFAULT_TOKENS, row_tokens: int | None = None
) -> Text:
    """Cuts a text into rows, each begun as the tokenizer begins a text.

    Args:
        bundle: Its tokenizer and sliding window are used.
        path: Text of any kind that slm reads; None takes the stories that ship with slm.
        tokens: The most tokens.
        row_tokens: The length of a row; by default long enough to pass the sliding window.

    Raises:
        SlmError: When the text cannot be read or has fewer than two tokens.
    """
    name = "the stories that ship with slm" if path is None else str(_source(path).path)
    return Text(name, _rows(bundle, _source(path or validation_path()), tokens, row_tokens))


def _source(text: Path | TextSource) -> TextSource:
    return text if isinstance(text, TextSource) else TextSource(text)


def _rows(bundle: Bundle, source: TextSource, tokens: int, row_tokens: int | None) -> Array:
    tokenizer = Tokenizer.load(bundle.path)
    # What the tokenizer puts before a text: models like Gemma make little of one that begins without it.
    prefix = tokenizer.prefix_ids
    longest = row_tokens or max(ROW_TOKENS, bundle.config.sliding_window + PAST_THE_WINDOW)
    ids: list[int] = []
    for document in source.first_tokens(tokenizer, max(tokens, longest)):
        ids += [*prefix, *document] if ids else document
    length = min(bundle.manifest.context, longest, len(prefix) + len(ids))
    new = length - len(prefix)
    if length < 2 or new < 1:
        raise SlmError(f"too little text to measure on: {source.path}", "give at least a few sentences")
    count = max(1, min(tokens // length, len(ids) // new))
    starts = np.tile(np.array(prefix, np.int64), (count, 1))
    return np.concatenate([starts, np.array(ids[: count * new], np.int64).reshape(count, new)], axis=1)


def measure(before: OnnxDecoder, after: OnnxDecoder, text: Text, progress: Progress) -> Change:
    """Reads the text with two bundles and compares their predictions at every position.

    Args:
        before: The source bundle.
        after: The quantized bundle.
        text: The text that both read.
        progress: Advances with each row.
    """
    progress.start("compare predictions", text.rows.shape[0], "rows")
    sums = _Sums()
    step = max(1, comparable_positions(before.vocab_size) // 2)  # of two bundles
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
        """Adds positions: log-probabilities before and after (T, V), and the tokens that came."""
        self.loss_before -= _of_targets(old, targets)
        self.loss_after -= _of_targets(new, targets)
        self.same += float((old.argmax(-1) == new.argmax(-1)).sum())
        self.same_five += _shared(_likeliest(old), _likeliest(new))
        self.divergence += _kl_in_place(old, new)


def kl_sum(before: Array, after: Array) -> float:
    """Returns the Kullback-Leibler divergence of predictions from others, nats, by logits (T, V), summed over positions."""
    total = 0.0
    for start in range(0, len(before), _TOGETHER):  # few positions at a time: memory
        old, new = (log_softmax(logits[start : start + _TOGETHER]) for logits in (before, after))
        total += _kl_in_place(old, new)
    return total


def _kl_in_place(old: Array, new: Array) -> float:
    """Returns the divergence of log-probabilities (T, V), summed over positions; both arrays are used up."""
    np.subtract(old, new, out=new)
    return float(np.einsum("tv,tv->", np.exp(old, out=old), new, dtype=np.float64))


def _of_targets(log_probabilities: Array, targets: Array) -> float:
    return float(np.take_along_axis(log_probabilities[: len(targets)], targets[:, None], axis=-1).sum())


def _likeliest(log_probabilities: Array) -> Array:
    """Returns the five likeliest tokens (T, 5) of each position, in any order; all where there are fewer."""
    count = min(_LIKELIEST, log_probabilities.shape[-1])
    return np.argpartition(log_probabilities, -count, axis=-1)[:, -count:]


def _shared(before: Array, after: Array) -> float:
    """Returns the share of each row that both have, summed over rows."""
    return float((before[:, :, None] == after[:, None]).any(axis=-1).mean(axis=-1).sum())


@dataclass(frozen=True)
class Divergence:
    """How long greedy texts of two bundles are equal.

    Attributes:
        tokens: Length of the texts.
        equal: Tokens until the first that differs, of each prompt.
    """

    tokens: int
    equal: tuple[int, ...]


def divergence(before: OnnxDecoder, after: OnnxDecoder, text: Text) -> Divergence:
    """Continues the beginnings of some rows greedily.

    One bundle generates, and the other reads the text at once: up to the first token that it would not have chosen, both
    generate the same.
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


@dataclass(frozen=True)
class Speeds:
    """Tokens a second of two bundles, medians of rounds in which they take turns.

    Attributes:
        prompt: Tokens of the prompt.
        decode: Decoding speed of the source and of the quantized bundle.
        prefill: Prefill speed of both.
    """

    prompt: int
    decode: tuple[float, float]
    prefill: tuple[float, float]

    @property
    def decode_ratio(self) -> float:
        """The speed of the quantized bundle over that of the source."""
        return self.decode[1] / self.decode[0]

    @property
    def prefill_ratio(self) -> float:
        """The speed of the quantized bundle over that of the source."""
        return self.prefill[1] / self.prefill[0]


def speeds(before: OnnxDecoder, after: OnnxDecoder) -> Speeds:
    """Times prefill and decoding with each bundle in turn; both must have run before, so that neither is cold."""
    prompt = min(_PROMPT_TOKENS * 4, before.context // 2)
    rates: list[list[tuple[float, float]]] = [[], []]
    for _ in range(_ROUNDS):
        for decoder, found in zip((before, after), rates, strict=True):
            read_s, written_s = read_and_write(decoder, prompt, _TIMED_TOKENS)
            found.append((prompt / read_s, (_TIMED_TOKENS - 1) / written_s))
    medians = [[float(np.median([pair[i] for pair in found])) for found in rates] for i in (0, 1)]
    return Speeds(prompt, (medians[1][0], medians[1][1]), (medians[0][0], medians[0][1]))
