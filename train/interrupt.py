"""Ctrl-C and SIGTERM, held back until the run can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Remembers a signal until a safe point asks for it."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._previous: dict[int, Any] = {}

    def deliver(self) -> None:
        """Does what the pending signal would have done."""
        assert self.pending is not None
        handler = self._previous[self.pending]
        if callable(handler):
            handler(self.pending, None)
        raise SystemExit(128 + self.pending)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A second signal will not wait: what is on the disk is whole at any time.
        waited, self.pending = self.pending, signum
        if waited is not None:
            self.deliver()


@contextmanager
def held_back() -> Iterator[Interruption]:
    """Holds Ctrl-C and SIGTERM back within the block; a second one acts at once.

    Outside the main thread, which alone gets signals, and for a signal that is ignored nothing changes.
    """
    interruption = Interruption()
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if (previous := signal.getsignal(signum)) not in (signal.SIG_IGN, None):
                interruption._previous[signum] = previous
    try:
        for held in interruption._previous:
            signal.signal(held, interruption._handle)
        yield interruption
    finally:
        for held, previous in interruption._previous.items():
            signal.signal(held, previous)
