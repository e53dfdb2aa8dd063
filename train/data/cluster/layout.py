"""The division of work: parts of a text, and shards of the parts' tokens. It does not depend on the machines."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.train.data.sources import FileRange

# Text of a part: some seconds of work.
PART_BYTES = 32 << 20
# A part in the middle of a file skips the beginning of the file, so a file is divided into few parts.
MOST_PER_FILE = 16


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a split.

    Attributes:
        split: "train" or "validation".
        number: Number within the split, from 0.
        ranges: The documents.
    """

    split: str
    number: int
    ranges: tuple[FileRange, ...]

    @property
    def name(self) -> str:
        """The name of the part."""
        return f"{self.split}-{self.number:05}"

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(each.documents for each in self.ranges)


def parts_of(split: str, ranges: Iterable[FileRange]) -> list[Part]:
    """Divides a split into parts of about the same size."""
    parts: list[Part] = []
    gathered: list[FileRange] = []
    size = 0
    for piece in chain.from_iterable(map(_pieces, ranges)):
        if gathered and size + piece.bytes > PART_BYTES:
            parts.append(Part(split, len(parts), tuple(gathered)))
            gathered, size = [], 0
        gathered.append(piece)
        size += piece.bytes
    if gathered:
        parts.append(Part(split, len(parts), tuple(gathered)))
    return parts


def _pieces(whole: FileRange) -> Iterator[FileRange]:
    number = max(1, min(MOST_PER_FILE, whole.documents, -(-whole.bytes // PART_BYTES)))
    for index in range(number):
        start, stop = (whole.documents * place // number for place in (index, index + 1))
        yield FileRange(whole.source, whole.first + start, stop - start, whole.bytes // number)


@dataclass(frozen=True)
class Slice:
    """Consecutive documents of one part that go into one shard: places in its ids, in tokens, and in its text, in bytes.

    Attributes:
        part: Name of the part.
        tokens: Start and end.
        text: Start and end.
        documents: Number of documents.
    """

    part: str
    tokens: tuple[int, int]
    text: tuple[int, int]
    documents: int

    def to_json(self) -> list[Any]:
        """Returns the fields as JSON has them."""
        return [self.part, *self.tokens, *self.text, self.documents]


def shards_of(
    parts: Iterable[tuple[str, NDArray[np.uint64], NDArray[np.uint64]]], shard_tokens: int
) -> Iterator[list[Slice]]:
    """Yields the slices of each shard; a shard ends with the document that reaches the number of tokens.

    Args:
        parts: In order, the name of each part and, for every document in it, the tokens and the bytes with its zero byte.
        shard_tokens: The number of tokens.
    """
    shard: list[Slice] = []
    filled = 0
    for name, tokens, sizes in parts:
        token_ends, text_ends = np.cumsum(tokens, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)
        first = 0
        while first < len(tokens):
            before = int(token_ends[first - 1]) if first else 0
            # The first document with which the shard is full.
            full = int(np.searchsorted(token_ends, before + shard_tokens - filled))
            stop = min(full + 1, len(tokens))
            text = (int(text_ends[first - 1]) if first else 0, int(text_ends[stop - 1]))
            shard.append(Slice(name, (before, int(token_ends[stop - 1])), text, stop - first))
            filled += int(token_ends[stop - 1]) - before
            if full < len(tokens):
                yield shard
                shard, filled = [], 0
            first = stop
    if shard:
        yield shard


def packed(kept: Sequence[bool]) -> bytes:
    """Returns one bit per document."""
    return np.packbits(np.array(kept, np.bool_)).tobytes()


def unpacked(bits: bytes, documents: int) -> NDArray[np.bool_]:
    """Returns whether each document is kept."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=documents).astype(np.bool_)
