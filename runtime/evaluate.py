"""How well a model predicts a text: loss, perplexity and bits per byte, the same for every backend; see docs/evaluation.md.

Dimensions: B rows, T positions.
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
from slm.core.tokenizer import END_OF_TEXT
from slm.core.windows import fixed_starts
from slm.runtime.backend import Decoder
from slm.runtime.model import Model
from slm.runtime.token_bytes import bytes_of_tokens

Protocol = Literal["documents", "windows"]
Array = NDArray[Any]

# Unless another is asked for: long enough for most documents, and a model's longest may be more than memory takes.
_DEFAULT_CONTEXT = 4096
# Tokens of the rows that are read together, padding included; and of those that are sorted by length to need little of it.
_BATCH_TOKENS = 2048
_POOL_TOKENS = 32 * _BATCH_TOKENS
# Tokens of a stream that windows are cut out of, four bytes each.
_MOST_TOKENS = 1 << 27


@dataclass(frozen=True)
class Row:
    """Ids (T,), of which the last `predicted` are measured, and the bytes of text that those stand for, where known."""

    ids: Array
    predicted: int
    bytes: int | None


@dataclass
class Measurement:
    """A model measured on text; complete once the evaluation returns it.

    Attributes:
        protocol: How the text was cut: "documents" or "windows".
        context: Tokens that a row holds before its last target.
        stride: Of documents longer than that, tokens that a further row predicts; None for windows.
        windows: How many were measured; None for documents.
        nats: The sum of -log p over all predicted tokens.
        tokens: How many were predicted, ends of text included.
        documents: How many the text had, of which the last may be measured in part; all of the stream's for windows.
        bytes: UTF-8 bytes of the predicted tokens; None where a tokenizer's cannot be counted exactly.
        end_of_text: The token predicted after a document, None where the model has none.
        end_of_text_tokens: How often it was predicted; these add to `nats` and `tokens`, and no bytes.
        end_of_text_nats: Their share of `nats`.
        seconds: Reading and predicting, tokenizing included.
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
        """Mean of -log p, nats a predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))  # a model that diverged does not overflow a float

    @property
    def bits_per_byte(self) -> float | None:
        """The nats as bits, by byte of text; None where the bytes are not known or there are none."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def tokens_s(self) -> float:
        """Tokens predicted a second."""
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
    """Measures every document by itself: begun as the tokenizer begins a text, every token and the end predicted once.

    Args:
        model: The model.
        documents: Texts; empty ones are left out.
        progress: Is told how many tokens are done.
        context: Tokens that are read at most; by default all that the model takes, up to 4,096.
        stride: What a further row of a longer document predicts, with at least context - stride tokens before it; by
            default half of the context.
        tokens: How many to predict at most. Where tokens have no bytes of their own, the document is finished.

    Raises:
        SlmError: When the context or stride do not fit, or there is nothing to predict.
    """
    context = _context(model.decoder, context)
    prefix = list(model.tokenizer.prefix_ids)
    stride = max(1, context // 2) if stride is None else stride
    room = context + 1 - max(1, len(prefix))  # what the first row predicts; a further one at most
    if not 1 <= stride <= room:
        raise SlmError(f"a stride of {stride:,} does not fit a context of {context:,}", f"--stride 1 to {max(1, room)}")
    measured = Measurement("documents", context, stride, end_of_text=end_of_text(model))
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
    """Measures as training does: windows of one stream of documents, end-of-text after each, evenly spread.

    Args:
        model: The model.
        documents: Texts; empty ones are left out.
        progress: Is told how many tokens are done.
        context: Tokens that a window reads, and predicts; by default all that the model takes, up to 4,096.
        windows: How many at most; by default as many as do not overlap.
        tokens: How many to predict at most, but for one window; in place of `windows`.

    Raises:
        SlmError: When the context does not fit, the text is shorter than a window, or no token ends a text.
    """
    context = _context(model.decoder, context)
    if tokens is not None:
        windows = max(1, tokens // context)
    end = end_of_text(model)
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


def end_of_text(model: Model) -> int | None:
    """Returns the token that ends a document: "<|endoftext|>" where there is one, else the first that ends a text."""
    token = model.tokenizer.token_id(END_OF_TEXT)
    return token if token is not None else next(iter(model.stop_token_ids), None)


def cut(prefix: Sequence[int], ids: Array, context: int, stride: int) -> Iterator[tuple[Array, int]]:
    """Cuts a document into rows that predict each of its tokens once, all but its first where nothing begins a text.

    Args:
        prefix: What begins every row.
        ids: The document and its end.
        context: Tokens of a row before its last.
        stride: Tokens that every row after the first predicts; the last one may predict fewer, with more before them.

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
    """Scores rows of any lengths, those of similar ones together; in the order given, see `Decoder.score`.

    Shorter rows are filled up on the right: no token sees what comes after it, so that changes nothing before.
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
        # Without bytes for each token the first row counts the whole document's, or none where its first token, whose
        # bytes are not known, is not predicted.
        whole = len(text.encode()) if prefix else None
        for number, (row, new) in enumerate(cut(prefix, ids, measured.context, measured.stride)):
            in_whole = whole if number == 0 or whole is None else 0
            yield Row(row, new, in_whole if sizes is None else int(sizes[row[-new:]].sum()))
        left -= predicted
        if left <= 0:
            return


def _bytes_by_token(model: Model, end: int | None) -> Array | None:
    """Returns the bytes of text behind each token, where that is certain; none behind an end, special token or not."""
    own = bytes_of_tokens(model.tokenizer)
    if own is None or end is None:
        return own
    own = np.pad(own, (0, max(0, end + 1 - len(own))))  # the model's end may be no token of the tokenizer's
    own[end] = 0
    return own


def _spelt(own: Array | None, body: Sequence[int], text: str) -> bool:
    """Whether the tokens' own bytes add up to the text's; not so where a vocabulary has no token for some byte."""
    return own is not None and int(own[np.array(body, np.int64)].sum()) == len(text.encode())


def _tokenized(model: Model, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yields documents that have tokens, with them.

    Raises:
        SlmError: When the tokenizer has tokens that the model does not.
    """
    literal = PieceEncoder(model.tokenizer)
    for texts in batches(documents):
        for text, ids in zip(texts, literal.encode_documents(texts), strict=True):
            if ids and max(ids) >= model.decoder.vocab_size:
                raise SlmError(
                    f"the text has a token of id {max(ids):,}, and the model {model.decoder.vocab_size:,} of them",
                    "the tokenizer.json is another model's, or the token stands for a picture",
                )
            if ids:
                yield text, ids


def _measure(
    decoder: Decoder, rows: Iterable[Row], measured: Measurement, progress: Progress, total: int | None
) -> None:
    """Scores rows, pool by pool, and adds up what they come to."""
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
        raise SlmError("there is no text to predict", "name text with --data")


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
