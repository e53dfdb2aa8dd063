"""The signals that stop a command, and their deferral until a few steps that belong together have finished."""

import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP: a terminal was closed. Windows has SIGBREAK instead, for that and for Ctrl-Break.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))


def stopping() -> tuple[signal.Signals, ...]:
    """Returns the signals that stop this command: all of `STOPPING` but those that it ignores, as nohup makes it."""
    return tuple(each for each in STOPPING if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN)


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
            for signum in STOPPING:
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
