"""Constraints beside the engine's thread: the tokens that may come next are found while the model computes, or later.

A schema can make that take many times as long as a step. Then its own text waits, and no other.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from typing import Protocol

import numpy as np

from slm.runtime.memory import Array


class Constraint(Protocol):
    """What a text must follow."""

    def allowed(self) -> Array:
        """Returns which tokens may come next, bool (V,)."""

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen; says whether the text is complete with it."""


class Guide:
    """A text's constraint.

    Attributes:
        logits: Of a text that waits for its mask.
    """

    def __init__(self, constraint: Constraint, threads: ThreadPoolExecutor) -> None:
        """Begins to find the tokens that may come first."""
        self._constraint, self._threads = constraint, threads
        self._next: Future[Array | None] = threads.submit(constraint.allowed)
        self.logits: Array | None = None

    def advance(self, token: int) -> None:
        """Takes the token that was chosen, and begins to find those that may come next."""
        self._next = self._threads.submit(self._after, token)

    def ready(self, patience_s: float = 0.0) -> bool:
        """Whether it is known what may come next; waits a little for it."""
        try:
            self._next.exception(patience_s)
        except NotReady:
            return False
        return True

    @property
    def complete(self) -> bool:
        """Whether the text is complete; once it is ready.

        Raises:
            SlmError: When the constraint cannot be followed further.
        """
        return self._next.result() is None

    def masked(self, logits: Array) -> Array:
        """Returns the logits (V,) of the tokens that may come next, others -inf; once it is ready, of an incomplete text.

        Raises:
            SlmError: When the constraint cannot be followed further.
        """
        allowed = self._next.result()
        assert allowed is not None
        return np.where(allowed, logits, np.float32(-np.inf))

    def _after(self, token: int) -> Array | None:
        return None if self._constraint.accept(token) else self._constraint.allowed()
