"""The interface between generation or evaluation and a backend. Needs neither onnxruntime nor torch.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Snapshot(Protocol):
    """A copy of a decoder's state. It can be restored any number of times."""

    @property
    def length(self) -> int:
        """The number of tokens in the state."""

    @property
    def bytes(self) -> int:
        """Memory of the copy, in bytes."""


class Reader(Protocol):
    """The methods that generation needs from a backend (`slm.runtime.streaming.run`)."""

    def reset(self) -> None:
        """Forgets all tokens."""

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the next token."""


class Scorer(Protocol):
    """The methods that evaluation needs from a backend. Neither changes the decoder's state."""

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T)."""

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns the log-probabilities of the tokens in complete rows, in bounded memory.

        Args:
            ids: Rows (B, T) of at most context + 1 tokens: the last token is predicted and not read.

        Returns:
            Natural logarithms of the probability of each token from the second on, given the tokens before it, float32
            (B, T - 1); and whether each token was the most likely one, bool (B, T - 1).
        """


class Decoder(Reader, Scorer, Protocol):
    """A backend that reads tokens, rewinds and scores."""

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    @property
    def vocab_size(self) -> int:
        """The number of logits."""

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset."""

    @property
    def description(self) -> str:
        """A short description of the backend and its device."""

    @property
    def revocable(self) -> int:
        """The most tokens that `read_each` may read next so that all of them can be rewound."""

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`. The next token is read directly after these.

        Raises:
            SlmError: If the decoder cannot rewind that far: sliding layers drop what is outside their windows.
        """

    def snapshot(self) -> Snapshot:
        """Returns a copy of the state, including sliding layers."""

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot, exactly. The snapshot can be used again.

        Raises:
            SlmError: If the snapshot belongs to another model.
        """


class DecoderAround:
    """Base class of wrapping decoders: forwards what the wrapper does not change to the inner decoder.

    Attributes:
        decoder: The inner decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.decoder.context

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self.decoder.vocab_size

    @property
    def description(self) -> str:
        """A short description of the backend and its device."""
        return self.decoder.description

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T), independent of the state."""
        return self.decoder.logits(ids)

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns log-probabilities, and whether each token was the most likely one; see `Scorer.score`."""
        return self.decoder.score(ids)


@dataclass(frozen=True)
class TextSnapshot:
    """A snapshot with its tokens, for a decoder that keeps track of its text."""

    inner: Snapshot
    ids: NDArray[np.int32]

    @property
    def length(self) -> int:
        """The number of tokens in the state."""
        return self.inner.length

    @property
    def bytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self.inner.bytes + self.ids.nbytes


def log_probabilities(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Returns the log-probabilities of targets (B, T) under logits (B, T, V), and which targets have the largest logit.

    Sums are computed in float64.
    """
    largest = logits.max(axis=-1, keepdims=True)
    sums = np.exp(logits - largest).sum(axis=-1, dtype=np.float64)  # (B, T)
    of_targets = np.take_along_axis(logits, targets[..., None], axis=-1) - largest
    likely = of_targets[..., 0] - np.log(sums)
    return likely.astype(np.float32), logits.argmax(axis=-1) == targets
