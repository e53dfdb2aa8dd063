"""Texts for calibration and measurement, as rows of tokens.

Dimensions: T positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.sample import stories_path, validation_path
from slm.core.text.tokens import TextSource
from slm.core.tokenizer import Tokenizer
from slm.export.graph.builder import Array

DEFAULT_TOKENS = 2048
# The default length of a row, and the tokens past the sliding window in a row for a larger window.
ROW_TOKENS = 256
PAST_THE_WINDOW = 64
# The name of the default calibration text.
DEFAULT_CALIBRATION = "the training stories that ship with slm"


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, int64 (rows, T), and the name of the text that they come from."""

    name: str
    rows: Array

    def first(self, rows: int, tokens: int) -> "TokenRows":
        """Returns at most that many rows, each cut to at most that many tokens."""
        return TokenRows(self.name, self.rows[:rows, :tokens])

    def after(self, rows: int) -> "TokenRows":
        """Returns the rows after the first ones."""
        return TokenRows(self.name, self.rows[rows:])


def calibration_text(
    bundle: Bundle, path: Path | TextSource | None, tokens: int = DEFAULT_TOKENS, row_tokens: int | None = None
) -> TokenRows:
    """Returns rows of a calibration text; see `measuring_text`. The held-out text of the measurement must be another one.

    The default is the training stories that ship with slm.
    """
    name = DEFAULT_CALIBRATION if path is None else str(_source(path).path)
    return TokenRows(name, _rows(bundle, _source(path or stories_path()), tokens, row_tokens))


def measuring_text(
    bundle: Bundle, path: Path | TextSource | None, tokens: int = DEFAULT_TOKENS, row_tokens: int | None = None
) -> TokenRows:
    """Cuts a text into rows of tokens. Each row starts with the tokenizer's prefix, such as `<bos>`.

    Args:
        bundle: The bundle, for its tokenizer and sliding window.
        path: A text in any format that slm reads. The default is the validation stories that ship with slm.
        tokens: The limit of the number of tokens.
        row_tokens: The length of a row. The default is longer than the sliding window.

    Raises:
        SlmError: If the text cannot be read or has fewer than two tokens.
    """
    name = "the stories that ship with slm" if path is None else str(_source(path).path)
    return TokenRows(name, _rows(bundle, _source(path or validation_path()), tokens, row_tokens))


def row_tokens_of(bundle: Bundle, row_tokens: int | None = None) -> int:
    """Returns the length of a row: as given, or longer than the sliding window."""
    return row_tokens or max(ROW_TOKENS, bundle.config.sliding_window + PAST_THE_WINDOW)


def rows_of_documents(
    bundle: Bundle, name: str, documents: Iterable[list[int]], tokens: int, row_tokens: int | None = None
) -> TokenRows:
    """Cuts documents in tokens, without the tokenizer's prefix, into rows; see `measuring_text`.

    Raises:
        SlmError: If there are fewer than two tokens.
    """
    return TokenRows(name, _cut(bundle, name, documents, tokens, row_tokens))


def filled_up(bundle: Bundle, name: str, documents: list[list[int]], tokens: int, row_tokens: int | None) -> TokenRows:
    """Returns rows of documents in tokens, followed by the default calibration text if the documents are too few.

    Args:
        bundle: The bundle, for its tokenizer and sliding window.
        name: The name of the documents.
        documents: The documents in tokens, without the tokenizer's prefix.
        tokens: The number of tokens of all rows.
        row_tokens: The length of a row. The default is longer than the sliding window.
    """
    if sum(map(len, documents)) >= max(tokens, row_tokens_of(bundle, row_tokens)):
        return rows_of_documents(bundle, name, documents, tokens, row_tokens)
    stories = TextSource(stories_path()).first_tokens(Tokenizer.load(bundle.path), tokens)
    name = f"{name} and, to fill up, {DEFAULT_CALIBRATION}"
    return rows_of_documents(bundle, name, chain(documents, stories), tokens, row_tokens)


def _source(text: Path | TextSource) -> TextSource:
    return text if isinstance(text, TextSource) else TextSource(text)


def _rows(bundle: Bundle, source: TextSource, tokens: int, row_tokens: int | None) -> Array:
    most = max(tokens, row_tokens_of(bundle, row_tokens))
    documents = source.first_tokens(Tokenizer.load(bundle.path), most)
    return _cut(bundle, str(source.path), documents, tokens, row_tokens)


def _cut(bundle: Bundle, name: str, documents: Iterable[list[int]], tokens: int, row_tokens: int | None) -> Array:
    tokenizer = Tokenizer.load(bundle.path)
    # Models like Gemma predict badly without the tokenizer's prefix.
    prefix = tokenizer.prefix_ids
    longest = row_tokens_of(bundle, row_tokens)
    ids: list[int] = []
    for document in documents:
        ids += [*prefix, *document] if ids else document
    length = min(bundle.manifest.context, longest, len(prefix) + len(ids))
    new = length - len(prefix)
    if length < 2 or new < 1:
        raise SlmError(f"{name} has too little text to measure on", "use at least a few sentences")
    count = max(1, min(tokens // length, len(ids) // new))
    starts = np.tile(np.array(prefix, np.int64), (count, 1))
    return np.concatenate([starts, np.array(ids[: count * new], np.int64).reshape(count, new)], axis=1)
