"""Several models as one decoder: each reads the same tokens, and their predictions are averaged.

Dimensions: B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.runtime.backend import Decoder, Snapshot, log_probabilities
from slm.runtime.logprobs import log_softmax

Average = Literal["mean", "geometric"]

Array = NDArray[Any]


@dataclass(frozen=True)
class EnsembleSnapshot:
    """A snapshot of each model."""

    inner: tuple[Snapshot, ...]

    @property
    def length(self) -> int:
        """The number of tokens in the state."""
        return self.inner[0].length

    @property
    def bytes(self) -> int:
        """Memory of the copies, in bytes."""
        return sum(each.bytes for each in self.inner)


class EnsembleDecoder:
    """A decoder whose logits are the logarithms of averaged probabilities.

    Attributes:
        decoders: The models, which share a vocabulary. Nothing else may use them at the same time.
        average: "mean" averages probabilities; "geometric" averages their logarithms, so that one model can exclude a token.
    """

    def __init__(self, decoders: Sequence[Decoder], average: Average = "mean") -> None:
        sizes = {decoder.vocab_size for decoder in decoders}
        if len(sizes) != 1:
            raise SlmError(
                f"the models have vocabularies of {', '.join(f'{size:,}' for size in sorted(sizes))} tokens",
                "the models of an ensemble share one tokenizer",
            )
        self.decoders, self.average = tuple(decoders), average

    @property
    def context(self) -> int:
        """The longest sequence, in tokens: the minimum over all models."""
        return min(decoder.context for decoder in self.decoders)

    @property
    def vocab_size(self) -> int:
        """The number of logits."""
        return self.decoders[0].vocab_size

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset."""
        return self.decoders[0].length

    @property
    def description(self) -> str:
        """A short description of the backends and their devices."""
        return f"{self.average} of {len(self.decoders)}: {'; '.join(decoder.description for decoder in self.decoders)}"

    def reset(self) -> None:
        """Forgets all tokens."""
        for decoder in self.decoders:
            decoder.reset()

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the next token."""
        return self._together("read", ids)

    @property
    def revocable(self) -> int:
        """The most tokens that `read_each` may read next so that all of them can be rewound."""
        return min(self.context - self.length, *(decoder.revocable for decoder in self.decoders))

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        return self._together("read_each", ids)

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`; see `Decoder.rewind`."""
        before = self.snapshot()
        try:
            for decoder in self.decoders:
                decoder.rewind(length)
        except SlmError:  # if one model cannot rewind, all models keep their state
            self.restore(before)
            raise

    def snapshot(self) -> EnsembleSnapshot:
        """Returns a copy of the state of every model."""
        return EnsembleSnapshot(tuple(decoder.snapshot() for decoder in self.decoders))

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot; see `Decoder.restore`."""
        if not isinstance(snapshot, EnsembleSnapshot) or len(snapshot.inner) != len(self.decoders):
            raise SlmError("the snapshot is not of this ensemble", "read the text with it")
        for decoder, each in zip(self.decoders, snapshot.inner, strict=True):
            decoder.restore(each)

    def logits(self, ids: Array) -> Array:
        """Returns the logits float32 (B, T, V) at every position of complete rows (B, T), independent of the state."""
        return self._averaged([decoder.logits(ids) for decoder in self.decoders])

    def score(self, ids: Array) -> tuple[Array, Array]:
        """Returns log-probabilities, and whether each token was the most likely one; see `Scorer.score`."""
        found = [log_probabilities(self.logits(row[None, :-1]), row[None, 1:]) for row in ids]
        likely, likeliest = zip(*found, strict=True)
        return np.concatenate(likely), np.concatenate(likeliest)

    def _together(self, what: Literal["read", "read_each"], ids: Sequence[int]) -> Array:
        """Runs the same call on every model. If one fails, resets all of them, because their states may differ."""
        try:
            return self._averaged([getattr(decoder, what)(ids) for decoder in self.decoders])
        except BaseException:
            self.reset()
            raise

    def _averaged(self, logits: Sequence[Array]) -> Array:
        logs = [log_softmax(each) for each in logits]
        if self.average == "geometric":
            mean: Array = np.asarray(np.mean(logs, axis=0, dtype=np.float32))
            return mean
        total = logs[0]
        for each in logs[1:]:
            total = np.logaddexp(total, each)
        averaged: Array = total - np.float32(np.log(len(logs)))
        return averaged
