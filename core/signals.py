"""Deferred signals: SIGINT, SIGTERM and SIGHUP wait until a few steps that belong together have finished."""

import signal
import threading
from types import FrameType
from typing import Any

# The signals that end the command line. Windows has no SIGHUP.
_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class PutOff:
    """Defers the handlers of these signals from `hold` to `release`; does nothing outside the main thread."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: list[int] = []

    def hold(self) -> None:
        """Starts to defer signals."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python runs signal handlers in the main thread only
        try:
            for signum in _STOPPING:
                if callable(handler := signal.getsignal(signum)):
                    self._handlers[signum] = handler
                    signal.signal(signum, self._remember)
        except BaseException:  # a signal that arrived before its handler was replaced
            self.release()
            raise

    def release(self) -> None:
        """Restores the handlers and calls them for the signals that arrived in the meantime."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        handlers, self._handlers = self._handlers, {}
        pending, self._pending = self._pending, []
        for signum in pending:
            handlers[signum](signum, None)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._pending.append(signum)
