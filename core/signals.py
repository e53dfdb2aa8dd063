"""Signals that stop a process, put off over the few steps that must happen together."""

import signal
import threading
from types import FrameType
from typing import Any

# What the command line stops at; Windows knows no SIGHUP.
_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class PutOff:
    """Remembers signals that would raise something, from `hold` to `release`; nothing outside the main thread."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: list[int] = []

    def hold(self) -> None:
        """Begins to put them off."""
        if threading.current_thread() is not threading.main_thread():
            return  # the others get none
        try:
            for signum in _STOPPING:
                if callable(handler := signal.getsignal(signum)):
                    self._handlers[signum] = handler
                    signal.signal(signum, self._remember)
        except BaseException:  # one that came just before
            self.release()
            raise

    def release(self) -> None:
        """Puts the handlers back, and lets them have what came meanwhile."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        handlers, self._handlers = self._handlers, {}
        pending, self._pending = self._pending, []
        for signum in pending:
            handlers[signum](signum, None)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._pending.append(signum)
