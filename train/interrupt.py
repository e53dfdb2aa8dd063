"""Signals, held back until the run can be saved: Ctrl-C and SIGTERM stop it, SIGUSR1 asks for a checkpoint and goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Remembers signals until a safe point asks for them.

    Attributes:
        pending: The one that asks to stop; None while there is none.
        checkpoint_wanted: Whether a checkpoint was asked for since the last one.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.checkpoint_wanted = False
        self._previous: dict[int, Any] = {}

    def deliver(self) -> None:
        """Does what the pending signal would have done; in a process that got none, what SIGTERM would have."""
        signum = self.pending or signal.SIGTERM
        handler = self._previous.get(signum)
        if callable(handler):
            handler(signum, None)
        raise SystemExit(128 + signum)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        # A second signal will not wait: what is on the disk is whole at any time.
        waited, self.pending = self.pending, signum
        if waited is not None:
            self.deliver()

    def _checkpoint(self, signum: int, frame: FrameType | None) -> None:
        self.checkpoint_wanted = True


@contextmanager
def held_back() -> Iterator[Interruption]:
    """Holds the signals back within the block; a second one that stops acts at once.

    Outside the main thread, which alone gets signals, and for a signal that is ignored nothing changes.
    """
    interruption = Interruption()
    handlers = dict.fromkeys(_STOPPING, interruption._stop) | {signal.SIGUSR1: interruption._checkpoint}
    if threading.current_thread() is threading.main_thread():
        for signum in handlers:
            if (previous := signal.getsignal(signum)) not in (signal.SIG_IGN, None):
                interruption._previous[signum] = previous
    try:
        for held in interruption._previous:
            signal.signal(held, handlers[signal.Signals(held)])
        yield interruption
    finally:
        for held, previous in interruption._previous.items():
            signal.signal(held, previous)
