"""Signals, deferred until the run can be saved: Ctrl-C and SIGTERM stop it; SIGUSR1 requests a checkpoint.

On Windows, Ctrl-Break stops it too; there is no SIGUSR1, and other programs cannot send SIGTERM.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
_CHECKPOINT = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Interruption:
    """The signals received since the last safe point.

    Attributes:
        pending: The signal that requests a stop; None if there is none.
        checkpoint_wanted: Whether a checkpoint was requested since the last one.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.checkpoint_wanted = False
        self._previous: dict[int, Any] = {}

    def deliver(self) -> None:
        """Acts on the pending signal; in a process that received none, acts as on SIGTERM."""
        signum = self.pending or signal.SIGTERM
        handler = self._previous.get(signum)
        if callable(handler):
            handler(signum, None)
        raise SystemExit(128 + signum)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        # A second signal acts at once: the files on the disk are consistent at any time.
        waited, self.pending = self.pending, signum
        if waited is not None:
            self.deliver()

    def _checkpoint(self, signum: int, frame: FrameType | None) -> None:
        self.checkpoint_wanted = True


@contextmanager
def held_back() -> Iterator[Interruption]:
    """Defers the signals within the block; a second request to stop acts at once.

    Changes nothing outside the main thread, which alone receives signals, or for a signal that is ignored.
    """
    interruption = Interruption()
    handlers = dict.fromkeys(_STOPPING, interruption._stop) | dict.fromkeys(_CHECKPOINT, interruption._checkpoint)
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
