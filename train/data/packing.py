"""Rows of whole documents: best-fit packing (arXiv:2404.10830) of a token stream.

A document's inputs begin with the end-of-text token before it, its targets end with its own, so that every token of the text
is a target once in a pass. Only documents longer than a row are cut. Documents of a row do not attend to each other, and the
positions that are left at a row's end count in no loss.

Dimensions: R rows, P pieces (documents, or parts of one that is longer than a row), B rows of a batch, T positions of a row.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm.train.data.tokens import TokenIds
from slm.train.loss import IGNORED

# Ids of the stream that are searched for the ends of documents at once.
_PART = 1 << 24


class Packing:
    """The documents of a stream in rows. They follow from the stream and the length of a row alone.

    Attributes:
        context: T.
        rows: R.
        tokens: Targets of a pass: all tokens of the stream.
        cut: Documents longer than a row.
    """

    def __init__(self, ids: TokenIds, context: int) -> None:
        """Packs the documents.

        Args:
            ids: The stream; end-of-text follows every document.
            context: T.
        """
        self._ids, self.context, self.tokens = ids, context, len(ids)
        self._end = int(ids[len(ids) - 1 : len(ids)][0])
        lengths = np.diff(self._ends(), prepend=-1)  # of documents with their end-of-text
        starts, sizes = _pieces(lengths, context)
        self.cut = int((lengths > context).sum())
        row_of = best_fit(sizes, context)
        order = np.argsort(row_of, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]  # (P,) by row
        self.rows = int(row_of.max()) + 1
        self._first = np.searchsorted(row_of[order], np.arange(self.rows + 1))  # the first piece of each row, (R + 1,)
        self._filled = np.add.reduceat(self._sizes, self._first[:-1])  # (R,)

    @property
    def positions(self) -> int:
        """Positions of a pass, with those that are left at the ends of rows."""
        return self.rows * self.context

    @property
    def about(self) -> str:
        """A phrase about the rows."""
        cut = f"; {self.cut:,} documents are longer than a row and are cut" if self.cut else "; no document is cut"
        padding = 1 - self.tokens / self.positions
        return f"{self.rows:,} rows of {self.context:,} positions, {padding:.1%} of them padding{cut}"

    def drawn(self, seed: int, first: int, count: int) -> NDArray[np.int64]:
        """Returns the rows with the numbers `first` to `first + count` of a run; each pass has an order of its own (count,)."""
        numbers = np.arange(first, first + count)
        rows = np.empty(count, np.int64)
        for epoch in range(first // self.rows, (first + count - 1) // self.rows + 1):
            mine = numbers // self.rows == epoch
            rows[mine] = self._order(seed, epoch)[0][numbers[mine] % self.rows]
        return rows

    def targets_in(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the number of targets in each of some rows."""
        return self._filled[rows]

    def targets_before(self, seed: int, drawn: int) -> int:
        """Returns the number of targets in the first `drawn` rows of a run."""
        epochs, rest = divmod(drawn, self.rows)
        part = int(self._order(seed, epochs)[1][rest - 1]) if rest else 0
        return epochs * self.tokens + part

    def gather(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs, targets and the number of each position's document in its row, int64 (B, T) each."""
        shape = len(rows), self.context
        inputs = np.full(shape, self._end, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        segments = np.zeros(shape, np.int64)
        for line, row in enumerate(rows):
            at = 0
            for number, piece in enumerate(range(self._first[row], self._first[row + 1])):
                start, size = int(self._starts[piece]), int(self._sizes[piece])
                place = slice(at, at + size)
                ids = self._ids[max(0, start - 1) : start + size]
                targets[line, place] = ids[-size:]
                # The first document has no token before it.
                inputs[line, at + size - len(ids) + 1 : at + size] = ids[:-1]
                segments[line, place] = number
                at += size
            segments[line, at:] = self._first[row + 1] - self._first[row]
        tensors = [torch.from_numpy(array) for array in (inputs, targets, segments)]
        if device.type == "cuda":
            tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
        return tensors[0], tensors[1], tensors[2]

    def _ends(self) -> NDArray[np.int64]:
        """Returns the position of every end-of-text token."""
        parts = range(0, len(self._ids), _PART)
        return np.concatenate([np.flatnonzero(self._ids[at : at + _PART] == self._end) + at for at in parts])

    def _order(self, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _order(self, seed, epoch)


@lru_cache(maxsize=1)  # for all that ask about the rows of one run
def pack(ids: TokenIds, context: int) -> Packing:
    """Returns the packing of a stream."""
    return Packing(ids, context)


def best_fit(sizes: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Returns the row of each piece: the longest come first, and each goes into the fullest row that has space for it.

    Args:
        sizes: Tokens of each piece (P,), at most `context`.
        context: Positions of a row.
    """
    row_of = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(context)]  # by the space that is left
    spaces = 0  # bit n is set if there is a row with space for exactly n
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        large_enough = spaces >> size
        if large_enough:
            space = size + (large_enough & -large_enough).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            row, space, rows = rows, context, rows + 1
        if space > size:
            open_rows[space - size].append(row)
            spaces |= 1 << (space - size)
        row_of[piece] = row
    return row_of


def _pieces(lengths: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns start and size of each piece: a document, or parts of `context` tokens and the rest of one that is longer."""
    parts = -(-lengths // context)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # of a piece in its document
    offsets = number * context
    starts = np.repeat(np.cumsum(lengths) - lengths, parts) + offsets
    return starts, np.minimum(context, np.repeat(lengths, parts) - offsets)


@lru_cache(maxsize=2)  # a micro-step spans at most two epochs, and the next one needs the same two
def _order(packing: Packing, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the order of an epoch's rows, and the number of targets up to and including each of them."""
    order = np.random.default_rng([seed, epoch]).permutation(packing.rows)
    return order, np.cumsum(packing.targets_in(order))
