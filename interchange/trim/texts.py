"""Counts the tokens of texts, and compares the pieces of two tokenizers on them. Texts are read once for each pass.

The two tokenizers are compared by the hashes of their results: only texts that differ are encoded by both.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.core.text.cuts import PieceEncoder, pieces
from slm.core.text.documents import batches
from slm.core.tokenizer import Tokenizer

# Longer documents are counted in parts of about this many characters, so that memory does not grow with their length.
_PART_CHARACTERS = 64 << 10
# The bytes of the held-out texts that the models are compared on.
_SAMPLE_BYTES = 8 << 10

Array = NDArray[Any]
Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Texts:
    """Texts that can be read several times.

    Attributes:
        read: Returns the documents, in the same order at each call.
        about: Their origin, in one line.
        count: Number of documents, if known.
    """

    read: Documents
    about: str
    count: int | None = None


@dataclass
class Counted:
    """The tokens of texts.

    Attributes:
        counts: Number of each id.
        bytes: UTF-8 bytes of the texts.
        parts: Number of texts; a long document counts as several.
        sha256: Hash of the texts.
        hashes: A hash of the ids of each text.
        sample: The first texts, of about 8 KiB together.
    """

    counts: Array
    bytes: int = 0
    parts: int = 0
    sha256: str = ""
    hashes: "array[int]" = field(default_factory=lambda: array("q"))
    sample: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.counts.sum())


@dataclass
class Compared:
    """Texts in both tokenizers.

    Attributes:
        tokens: Number of tokens after trimming.
        changed: Number of the original tokens that others replace.
        parts_changed: Number of texts with other pieces.
        covered: Share of the original tokens that stay in the vocabulary.
    """

    tokens: int
    changed: int
    parts_changed: int
    covered: float


def count_tokens(texts: Texts, tokenizer: Tokenizer, rows: int, progress: Progress, name: str) -> Counted:
    """Returns how often each token occurs; special tokens that a text spells are counted as plain characters.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        rows: Number of rows of the embedding.
        progress: Receives the number of documents.
        name: What is counted, for the progress.

    Raises:
        SlmError: If the text is empty or cannot be read, or if a token has no row in the embedding.
    """
    found = Counted(np.zeros(rows, np.int64))
    hashed, sampled = hashlib.sha256(), 0
    for part, ids in _encoded(texts, tokenizer, progress, name):
        encoded = part.encode()
        if len(ids) and ids.max() >= rows:
            raise SlmError(
                f"the text has token id {ids.max():,}, and the embedding has {rows:,} rows",
                "tokenizer.json may belong to another model, or the token may represent an image",
            )
        hashed.update(len(encoded).to_bytes(8, "little") + encoded)
        found.counts += np.bincount(ids, minlength=rows)
        found.bytes += len(encoded)
        found.parts += 1
        found.hashes.append(hash(ids.tobytes()))
        if sampled < _SAMPLE_BYTES:
            found.sample.append(part if len(encoded) <= _SAMPLE_BYTES else part[:_SAMPLE_BYTES])
            sampled += len(found.sample[-1].encode())
    found.sha256 = hashed.hexdigest()
    if not found.tokens:
        raise SlmError(f"no text in {texts.about}", "check that it is the right file")
    return found


def compare_pieces(
    texts: Texts, counted: Counted, before: Tokenizer, after: Tokenizer, kept: Array, progress: Progress, name: str
) -> Compared:
    """Compares the pieces of every text; those of a text whose tokens all stay must be the same.

    Args:
        texts: The texts, which must not have changed since they were counted.
        counted: Their tokens.
        before: The original tokenizer.
        after: The trimmed tokenizer.
        kept: The original id of each new one.
        progress: Receives the number of documents.
        name: What is compared, for the progress.

    Raises:
        SlmError: If the pieces of a text differ although all of its tokens stay, or the texts have changed.
    """
    stays = np.zeros(len(counted.counts), np.bool_)
    stays[kept] = True
    tokens = changed = parts_changed = number = 0
    original = PieceEncoder(before)
    for part, ids in _encoded(texts, after, progress, name):
        if number >= len(counted.hashes):
            raise _changed(texts)
        tokens += len(ids)
        old = kept[ids]
        if hash(old.tobytes()) != counted.hashes[number]:
            wanted = np.array(original.encode(part), np.int64)
            if hash(wanted.tobytes()) != counted.hashes[number]:
                raise _changed(texts)
            if stays[wanted].all():
                raise SlmError(
                    f"the trimmed tokenizer splits a text differently although all of its tokens stay: {part[:60]!r}",
                    "nothing was written; please report this tokenizer",
                )
            parts_changed += 1
            gone = np.bincount(wanted, minlength=len(stays)) - np.bincount(old, minlength=len(stays))
            changed += int(gone.clip(min=0).sum())
        number += 1
    if number != len(counted.hashes):
        raise _changed(texts)
    return Compared(tokens, changed, parts_changed, float(counted.counts[stays].sum()) / counted.tokens)


def _changed(texts: Texts) -> SlmError:
    return SlmError(f"{texts.about}: the text changed while it was read", "run the command again")


def _encoded(texts: Texts, tokenizer: Tokenizer, progress: Progress, name: str) -> Iterator[tuple[str, Array]]:
    """Yields each text with its ids."""
    literal = PieceEncoder(tokenizer)

    def parts() -> Iterator[str]:
        for document in texts.read():
            yield from pieces(str(document), _PART_CHARACTERS)
            progress.advance()

    progress.start(name, texts.count, "documents")
    try:
        for batch in batches(parts()):
            for part, ids in zip(batch, literal.encode_documents(batch), strict=True):
                yield part, np.array(ids, np.int64)
    finally:
        progress.finish()
