"""What generation and evaluation need of a backend. It needs neither onnxruntime nor torch.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Snapshot(Protocol):
    """A copy of what a decoder had read; it can be restored any number of times."""

    @property
    def length(self) -> int:
        """Tokens read."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""


class Reader(Protocol):
    """What generating one text needs of a backend (`slm.runtime.streaming.run`)."""

    def reset(self) -> None:
        """Forgets everything read."""

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the one that follows."""


class Scorer(Protocol):
    """What evaluation needs of a backend; both methods leave what was read alone."""

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T)."""

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns how likely the tokens of complete rows were, in bounded memory.

        Args:
            ids: Rows (B, T) of at most one token more than the context: the last one is predicted and not read.

        Returns:
            The natural logarithms of the probabilities of every row's tokens from the second on, given those before, float32
            (B, T - 1); and whether each was the likeliest, bool (B, T - 1).
        """


class Decoder(Reader, Scorer, Protocol):
    """A backend: it reads tokens, goes back, and scores."""

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    @property
    def vocab_size(self) -> int:
        """How many logits there are."""

    @property
    def length(self) -> int:
        """Tokens read since the last reset."""

    @property
    def description(self) -> str:
        """What runs where, in a few words."""

    @property
    def revocable(self) -> int:
        """How many tokens `read_each` may read next so that any number of them can be forgotten again."""

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) for what follows each of them."""

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens read; what is read next is as if it followed these directly.

        Raises:
            SlmError: When that cannot be, with the reason: sliding layers forget what is out of their windows.
        """

    def snapshot(self) -> Snapshot:
        """Returns a copy of what was read, sliding layers included."""

    def restore(self, snapshot: Any) -> None:
        """Forgets everything read and goes back to a snapshot, exactly; it can be used again.

        Raises:
            SlmError: When it is another model's.
        """


class DecoderAround:
    """The part of a wrapping decoder that it passes on to the decoder inside.

    Attributes:
        decoder: The one that computes.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.decoder.context

    @property
    def vocab_size(self) -> int:
        """How many logits there are."""
        return self.decoder.vocab_size

    @property
    def description(self) -> str:
        """What runs where, in a few words."""
        return self.decoder.description

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T), independent of what was read."""
        return self.decoder.logits(ids)

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns log-probabilities and whether each token was the likeliest; see `Scorer.score`."""
        return self.decoder.score(ids)


@dataclass(frozen=True)
class TextSnapshot:
    """A snapshot and the tokens that it is of, for a decoder that knows its text."""

    inner: Snapshot
    ids: NDArray[np.int32]

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.inner.length

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.inner.bytes + self.ids.nbytes


def log_probabilities(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Returns the log-probabilities of targets (B, T) by logits (B, T, V), summed in float64; and which are the largest."""
    largest = logits.max(axis=-1, keepdims=True)
    sums = np.exp(logits - largest).sum(axis=-1, dtype=np.float64)  # (B, T)
    of_targets = np.take_along_axis(logits, targets[..., None], axis=-1) - largest
    likely = of_targets[..., 0] - np.log(sums)
    return likely.astype(np.float32), logits.argmax(axis=-1) == targets
