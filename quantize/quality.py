"""What quantization changed: two bundles read the same text, and their predictions are compared.

Dimensions: T positions, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.core.sample import validation_path
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.export.graph.builder import Array
from slm.runtime.decoder import OnnxDecoder, comparable_positions

DEFAULT_TOKENS = 4096
# Long enough for a row to pass any window that is shorter, short enough for the logits of a row to stay small.
ROW_TOKENS = 256
PAST_THE_WINDOW = 64


@dataclass(frozen=True)
class Text:
    """Tokens to measure on: rows (rows, T), and where they came from."""

    name: str
    rows: Array


@dataclass(frozen=True)
class Change:
    """What changed, averaged over positions.

    Attributes:
        tokens: Positions compared.
        kl_nats: Kullback-Leibler divergence of the predictions after from those before.
        same_top1: Share of positions where the likeliest token is the same.
        perplexity_before: exp of the mean loss on the text, before.
        perplexity_after: The same, after.
    """

    tokens: int
    kl_nats: float
    same_top1: float
    perplexity_before: float
    perplexity_after: float


def measuring_text(bundle: Bundle, path: Path | None, tokens: int = DEFAULT_TOKENS) -> Text:
    """Cuts a text into rows that pass the sliding window, each begun as the tokenizer begins a text.

    Args:
        bundle: Whose tokenizer and window count.
        path: UTF-8 text, documents separated by "<|endoftext|>" or not; None takes the stories that ship with slm.
        tokens: How many tokens to use at most.

    Raises:
        SlmError: When the text cannot be read or has fewer than two tokens.
    """
    file = path or validation_path()
    tokenizer = Tokenizer.load(bundle.path)
    documents = [text.strip() for text in read_text(file, "measuring text").split(END_OF_TEXT)]
    # What the tokenizer puts before a text: models like Gemma make little of one that begins without it.
    prefix = tokenizer.encode("")
    ids = [t for document in tokenizer.encode_documents([d for d in documents if d]) for t in (*prefix, *document)]
    ids = ids[len(prefix) :]
    longest = max(ROW_TOKENS, bundle.config.sliding_window + PAST_THE_WINDOW)
    length = min(bundle.manifest.context, longest, len(prefix) + len(ids))
    new = length - len(prefix)
    if length < 2 or new < 1:
        raise SlmError(f"too little text to measure on: {file}", "give at least a few sentences")
    count = max(1, min(tokens // length, len(ids) // new))
    starts = np.tile(np.array(prefix, np.int64), (count, 1))
    rows = np.concatenate([starts, np.array(ids[: count * new], np.int64).reshape(count, new)], axis=1)
    return Text("the stories that ship with slm" if path is None else str(path), rows)


def measure(before: Bundle, after: Bundle, text: Text, progress: Progress) -> Change:
    """Reads the text with both bundles and compares what they expect at every position."""
    decoders = [OnnxDecoder(bundle) for bundle in (before, after)]
    progress.start("compare predictions", text.rows.shape[0], "rows")
    divergence = same = 0.0
    losses = np.zeros(2)
    step = comparable_positions(before.config.vocab_size)
    for row in text.rows:
        for decoder in decoders:
            decoder.reset()
        for start in range(0, len(row), step):
            chunk = row[None, start : start + step]
            old, new = (_log_softmax(decoder.step(chunk, keep=0)[0]) for decoder in decoders)  # (T, V)
            divergence += float((np.exp(old) * (old - new)).sum(dtype=np.float64))
            same += float((old.argmax(-1) == new.argmax(-1)).sum())
            targets = row[start + 1 : start + step + 1, None]
            losses -= [float(np.take_along_axis(p[: len(targets)], targets, axis=-1).sum()) for p in (old, new)]
        progress.advance()
    progress.finish()
    positions, predicted = text.rows.size, text.rows[:, 1:].size
    perplexity = np.exp(losses / predicted)
    return Change(positions, divergence / positions, same / positions, float(perplexity[0]), float(perplexity[1]))


def _log_softmax(logits: Array) -> Array:
    """Returns log-probabilities in float32, summed in float64: a sixth of the time, the same divergence within 1e-4."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits
