"""Applies constraints in other threads: the allowed next tokens are computed while the model runs, or later.

For some schemas this takes many times as long as a step. Then only the constrained text waits.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotReady
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Constraint(Protocol):
    """A grammar or schema that a text must follow."""

    def allowed(self) -> Array:
        """Returns the tokens that may come next, bool (V,)."""

    def accept(self, token: int) -> bool:
        """Consumes the chosen token. Returns whether the text is complete with it."""


class Later:
    """A constraint that is made when its text begins: of many texts, few are generated at a time."""

    def __init__(self, make: Callable[[], Constraint]) -> None:
        self._make = make
        self._made: Constraint | None = None

    def allowed(self) -> Array:
        """Returns the tokens that may come next, bool (V,)."""
        if self._made is None:
            self._made = self._make()
        return self._made.allowed()

    def accept(self, token: int) -> bool:
        """Consumes the chosen token. Returns whether the text is complete with it."""
        assert self._made is not None
        return self._made.accept(token)


class Guide:
    """Applies a constraint to one text."""

    def __init__(self, constraint: Constraint, threads: Executor | None = None) -> None:
        """Starts to compute the allowed first tokens.

        Args:
            constraint: The grammar or schema of the text.
            threads: Computes the allowed tokens; None computes them in the calling thread.
        """
        self._constraint, self._threads = constraint, threads or _Inline()
        self._next: Future[Array | None] = self._threads.submit(constraint.allowed)

    def advance(self, token: int) -> None:
        """Consumes the chosen token, and starts to compute the allowed next tokens."""
        self._next = self._threads.submit(self._after, token)

    def ready(self, patience_s: float = 0.0) -> bool:
        """Returns whether the allowed next tokens are known. Waits up to `patience_s` seconds for them."""
        try:
            self._next.exception(patience_s)
        except NotReady:
            return False
        return True

    @property
    def complete(self) -> bool:
        """Whether the text is complete. Valid once `ready`.

        Raises:
            SlmError: If the constraint cannot continue.
        """
        return self._next.result() is None

    def masked(self, logits: Array) -> Array:
        """Returns the logits (V,) with -inf for every token that is not allowed. Valid once `ready`, before `complete`.

        Raises:
            SlmError: If the constraint cannot continue.
        """
        allowed = self._next.result()
        assert allowed is not None
        return np.where(allowed, logits, np.float32(-np.inf))

    def _after(self, token: int) -> Array | None:
        return None if self._constraint.accept(token) else self._constraint.allowed()


class _Inline(Executor):
    """An executor that runs each call immediately, in the calling thread."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Returns a completed future."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # the future raises the exception when its result is read
            future.set_exception(error)
        return future
