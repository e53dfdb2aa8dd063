"""Measures how well a model predicts a text: loss, perplexity and bits per byte. See docs/evaluation.md.

The measurement is the same for every backend. Dimensions: B rows, T positions.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.core.text.cuts import PieceEncoder
from slm.core.text.documents import batches
from slm.core.windows import fixed_starts
from slm.runtime.answers import end_of_text
from slm.runtime.backend import Decoder
from slm.runtime.model import Model
from slm.runtime.token_bytes import bytes_of_tokens

Protocol = Literal["documents", "windows"]
Array = NDArray[Any]

# The default context: long enough for most documents; a model's longest context may need more memory than there is.
_DEFAULT_CONTEXT = 4096
# Tokens, padding included, of rows that are read together; and tokens of rows that are sorted by length to reduce padding.
_BATCH_TOKENS = 2048
_POOL_TOKENS = 32 * _BATCH_TOKENS
# The most tokens of the stream that windows are cut out of, four bytes each.
_MOST_TOKENS = 1 << 27


@dataclass(frozen=True)
class Row:
    """Ids (T,), of which the last `predicted` are measured, and the UTF-8 bytes of these, if known."""

    ids: Array
    predicted: int
    bytes: int | None


@dataclass
class Measurement:
    """The measurement of a model on a text; complete when the evaluation returns it.

    Attributes:
        protocol: How the text was cut: "documents" or "windows".
        context: Tokens that a row holds before its last target.
        stride: Tokens that each further row of a longer document predicts; None for windows.
        windows: The number of measured windows; None for documents.
        nats: The sum of -log p over all predicted tokens.
        tokens: Predicted tokens, including end-of-text tokens.
        documents: Documents of the text, of which the last may be measured partially; for windows, all documents of the
            stream.
        bytes: UTF-8 bytes of the predicted tokens; None if the tokenizer does not allow an exact count.
        end_of_text: The token predicted after a document; None if the model has none.
        end_of_text_tokens: How often it was predicted. These predictions count in `nats` and `tokens`, and have no bytes.
        end_of_text_nats: Their share of `nats`.
        seconds: Duration, including tokenizing.
    """

    protocol: Protocol
    context: int
    stride: int | None = None
    windows: int | None = None
    nats: float = 0.0
    tokens: int = 0
    documents: int = 0
    bytes: int | None = 0
    end_of_text: int | None = None
    end_of_text_tokens: int = 0
    end_of_text_nats: float = 0.0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # avoids float overflow for a model that diverged

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text; None if the number of bytes is unknown or 0."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def tokens_s(self) -> float:
        """Predicted tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def evaluate_documents(
    model: Model,
    documents: Iterable[str],
    progress: Progress,
    *,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
) -> Measurement:
    """Measures every document separately: begun as the tokenizer begins a text, every token and the end predicted once.

    Args:
        model: The model.
        documents: Texts; empty ones are skipped.
        progress: Receives the number of predicted tokens.
        context: The most tokens that a row reads; by default the model's context, up to 4,096.
        stride: Tokens that each further row of a longer document predicts, with at least context - stride tokens before
            them; by default half of the context.
        tokens: The most tokens to predict. If tokens have no bytes of their own, the last document is measured completely.

    Raises:
        SlmError: If the context or stride is out of range, or there is nothing to predict.
    """
    context = _context(model.decoder, context)
    prefix = list(model.tokenizer.prefix_ids)
    stride = max(1, context // 2) if stride is None else stride
    room = (
        context + 1 - max(1, len(prefix))
    )  # the number of predictions of the first row; a further row has at most this many
    if not 1 <= stride <= room:
        raise SlmError(f"a stride of {stride:,} does not fit a context of {context:,}", f"--stride 1 to {max(1, room)}")
    measured = Measurement("documents", context, stride, end_of_text=end_of_text(model.tokenizer, model.stop_token_ids))
    started = time.perf_counter()
    rows = _documents(model, documents, measured, prefix, tokens)
    _measure(model.decoder, rows, measured, progress, tokens)
    measured.seconds = time.perf_counter() - started
    return measured


def evaluate_windows(
    model: Model,
    documents: Iterable[str],
    progress: Progress,
    *,
    context: int | None = None,
    windows: int | None = None,
    tokens: int | None = None,
) -> Measurement:
    """Measures like training: evenly spread windows of one stream of documents, with end-of-text after each document.

    Args:
        model: The model.
        documents: Texts; empty ones are skipped.
        progress: Receives the number of predicted tokens.
        context: Tokens that a window reads, and predicts; by default the model's context, up to 4,096.
        windows: The most windows; by default as many as fit without overlap.
        tokens: The most tokens to predict, but at least one window; an alternative to `windows`.

    Raises:
        SlmError: If the context is out of range, the text is shorter than a window, or the model has no end-of-text token.
    """
    context = _context(model.decoder, context)
    if tokens is not None:
        windows = max(1, tokens // context)
    end = end_of_text(model.tokenizer, model.stop_token_ids)
    if end is None:
        raise SlmError("the windows protocol puts an end-of-text token after documents, and the model has none")
    measured = Measurement("windows", context, end_of_text=end)
    started = time.perf_counter()
    pieces: list[Array] = []
    count = 0
    own = _bytes_by_token(model, end)
    for text, ids in _tokenized(model, documents):
        pieces.append(np.array([*ids, end], np.int32))
        count += len(pieces[-1])
        if count > _MOST_TOKENS:
            raise SlmError(
                f"the text has more than {_MOST_TOKENS:,} tokens, and windows are cut out of all of them in memory",
                "--protocol documents reads text of any length",
            )
        measured.documents += 1
        own = own if _spelt(own, ids, text) else None
    stream = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    starts = fixed_starts(len(stream), len(stream) if windows is None else windows, context)
    if not len(starts):
        raise SlmError(f"{len(stream):,} tokens of text are too few for a window of {context:,}", "a shorter --context")
    measured.windows = len(starts)
    cuts = (stream[start : start + context + 1] for start in starts)
    rows = (Row(ids, context, None if own is None else int(own[ids[1:]].sum())) for ids in cuts)
    _measure(model.decoder, rows, measured, progress, len(starts) * context)
    measured.seconds = time.perf_counter() - started
    return measured


def cut(prefix: Sequence[int], ids: Array, context: int, stride: int) -> Iterator[tuple[Array, int]]:
    """Cuts a document into rows that predict each token once. The first token has no prediction without a prefix.

    Args:
        prefix: Tokens at the beginning of every row.
        ids: The document and its end-of-text token.
        context: Tokens of a row before its last target.
        stride: Tokens that every row after the first predicts. The last row may predict fewer, with more tokens before
            them.

    Yields:
        Ids of at most context + 1 tokens, and how many of the last ones are predicted for the first time.
    """
    start = np.array(prefix, ids.dtype)
    room = context + 1 - len(start)
    yield np.concatenate([start, ids[:room]]), min(room, len(ids)) - (not prefix)
    for done in range(room, len(ids), stride):
        new = min(stride, len(ids) - done)
        yield np.concatenate([start, ids[done + new - room : done + new]]), new


def score(decoder: Decoder, rows: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Scores rows of any lengths, grouped by length. Results are in the order of the rows; see `Scorer.score`.

    Shorter rows are padded on the right. Attention is causal, so padding does not change the tokens before it.
    """
    scored: list[tuple[Array, Array]] = [(np.zeros(0, np.float32), np.zeros(0, np.bool_))] * len(rows)
    by_length = sorted((i for i in range(len(rows)) if len(rows[i]) > 1), key=lambda i: -len(rows[i]))
    while by_length:
        longest = len(rows[by_length[0]])
        count = max(1, _BATCH_TOKENS // longest)
        batch, by_length = by_length[:count], by_length[count:]
        ids = np.zeros((len(batch), longest), np.int64)
        for filled, i in zip(ids, batch, strict=True):
            filled[: len(rows[i])] = rows[i]
        likely, likeliest = decoder.score(ids)
        for j, i in enumerate(batch):
            predicted = len(rows[i]) - 1
            scored[i] = likely[j, :predicted], likeliest[j, :predicted]
    return scored


def _documents(
    model: Model, documents: Iterable[str], measured: Measurement, prefix: list[int], limit: int | None
) -> Iterator[Row]:
    """Yields the rows of documents until enough tokens are predicted."""
    assert measured.stride is not None
    own = _bytes_by_token(model, measured.end_of_text)
    left = math.inf if limit is None else limit
    end = [] if measured.end_of_text is None else [measured.end_of_text]
    for text, body in _tokenized(model, documents):
        ids = np.array([*body, *end], np.int64)
        predicted = len(ids) - (not prefix)
        if predicted < 1:
            continue
        measured.documents += 1
        sizes = own if _spelt(own, body, text) else None
        if sizes is not None and predicted > left:
            predicted = int(left)
            ids = ids[: predicted + (not prefix)]
        # Without bytes per token, the first row counts the bytes of the whole document. It counts none if the document's
        # first token, whose bytes are unknown, is not predicted.
        whole = len(text.encode()) if prefix else None
        for number, (row, new) in enumerate(cut(prefix, ids, measured.context, measured.stride)):
            in_whole = whole if number == 0 or whole is None else 0
            yield Row(row, new, in_whole if sizes is None else int(sizes[row[-new:]].sum()))
        left -= predicted
        if left <= 0:
            return


def _bytes_by_token(model: Model, end: int | None) -> Array | None:
    """Returns the bytes of text of each token where they are certain. End-of-text tokens have none."""
    own = bytes_of_tokens(model.tokenizer)
    if own is None or end is None:
        return own
    own = np.pad(own, (0, max(0, end + 1 - len(own))))  # the model's end-of-text token may be missing in the tokenizer
    own[end] = 0
    return own


def _spelt(own: Array | None, body: Sequence[int], text: str) -> bool:
    """Returns whether the tokens' bytes add up to the text's. They do not if the vocabulary lacks a token for some byte."""
    return own is not None and int(own[np.array(body, np.int64)].sum()) == len(text.encode())


def _tokenized(model: Model, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yields documents that have tokens, with their tokens.

    Raises:
        SlmError: If the tokenizer has tokens that the model lacks.
    """
    literal = PieceEncoder(model.tokenizer)
    for texts in batches(documents):
        for text, ids in zip(texts, literal.encode_documents(texts), strict=True):
            if ids and max(ids) >= model.decoder.vocab_size:
                raise SlmError(
                    f"the text has token id {max(ids):,}, and the model's vocabulary has {model.decoder.vocab_size:,} tokens",
                    "tokenizer.json may belong to another model, or the token may represent an image",
                )
            if ids:
                yield text, ids


def _measure(
    decoder: Decoder, rows: Iterable[Row], measured: Measurement, progress: Progress, total: int | None
) -> None:
    """Scores rows, pool by pool, and adds up the results."""
    progress.start("evaluating", total, "tokens")
    try:
        for pool in _pools(rows):
            for row, (likely, _) in zip(pool, score(decoder, [row.ids for row in pool]), strict=True):
                nats = -likely[len(likely) - row.predicted :].astype(np.float64)
                ends = row.ids[len(row.ids) - row.predicted :] == measured.end_of_text
                measured.nats += float(nats.sum())
                measured.tokens += row.predicted
                measured.end_of_text_tokens += int(ends.sum())
                measured.end_of_text_nats += float(nats[ends].sum())
                if measured.bytes is not None:
                    measured.bytes = None if row.bytes is None else measured.bytes + row.bytes
                progress.advance(row.predicted, loss=f"{measured.loss:.4f}")
    finally:
        progress.finish()
    if not measured.tokens:
        raise SlmError("there is no text to predict", "pass text with --data")


def _pools(rows: Iterable[Row]) -> Iterator[list[Row]]:
    pool: list[Row] = []
    size = 0
    for row in rows:
        pool.append(row)
        size += len(row.ids)
        if size >= _POOL_TOKENS:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def _context(decoder: Decoder, wanted: int | None) -> int:
    if wanted is None:
        return min(decoder.context, _DEFAULT_CONTEXT)
    if not 2 <= wanted <= decoder.context:
        raise SlmError(f"the model takes {decoder.context:,} tokens, not {wanted:,}", "choose another --context")
    return wanted
