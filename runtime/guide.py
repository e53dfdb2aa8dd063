"""Constraints beside the thread that decodes: the tokens that may come next are found while the model computes, or later.

A schema can make that take many times as long as a step. Then its own text waits, and no other.
"""

from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotReady
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Constraint(Protocol):
    """What a text must follow."""

    def allowed(self) -> Array:
        """Returns which tokens may come next, bool (V,)."""

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen. Returns whether the text is complete with it."""


class Guide:
    """Applies a constraint to one text."""

    def __init__(self, constraint: Constraint, threads: Executor | None = None) -> None:
        """Begins to find the tokens that may come first.

        Args:
            constraint: What the text must follow.
            threads: Where allowed tokens are computed; None computes them in the calling thread.
        """
        self._constraint, self._threads = constraint, threads or _Inline()
        self._next: Future[Array | None] = self._threads.submit(constraint.allowed)

    def advance(self, token: int) -> None:
        """Takes the token that was chosen, and begins to find those that may come next."""
        self._next = self._threads.submit(self._after, token)

    def ready(self, patience_s: float = 0.0) -> bool:
        """Returns whether the next tokens are known; waits up to `patience_s` seconds for them."""
        try:
            self._next.exception(patience_s)
        except NotReady:
            return False
        return True

    @property
    def complete(self) -> bool:
        """Whether the text is complete. Valid once `ready`.

        Raises:
            SlmError: When the constraint cannot be followed further.
        """
        return self._next.result() is None

    def masked(self, logits: Array) -> Array:
        """Returns the logits (V,) with every token that is not allowed at -inf. Valid once `ready`, before `complete`.

        Raises:
            SlmError: When the constraint cannot be followed further.
        """
        allowed = self._next.result()
        assert allowed is not None
        return np.where(allowed, logits, np.float32(-np.inf))

    def _after(self, token: int) -> Array | None:
        return None if self._constraint.accept(token) else self._constraint.allowed()


class _Inline(Executor):
    """Runs each call at once, in the calling thread."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Returns a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # a future raises it where its result is read
            future.set_exception(error)
        return future
