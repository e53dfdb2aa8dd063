"""The HTTP server around the application: signals, shutdown within a bounded time, and connections."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn

from slm.core.signals import stopping
from slm.serve.app import make_app
from slm.serve.connections import ACCEPTED, Connection, Connections
from slm.serve.service import Service

# Seconds after the grace period until open requests are ended, until connections are closed, and until the process exits
# unconditionally.
_END_S = 0.5
_CLOSE_S = 2
_EXIT_S = 4.0
# Two Ctrl-C closer than this count as one, which a wrapper passed on twice.
_TWICE_S = 0.3
# Connections that the system queues until they are accepted.
_BACKLOG = 1024


class Server(uvicorn.Server):
    """Serves until a signal stops it.

    After the first signal, requests in progress continue for the grace period; unfinished ones then end with an error. A
    second Ctrl-C ends the process at once. A separate thread ends it a few seconds after the grace period, even if a step of
    the engine or the event loop does not return.

    Attributes:
        stopped_by: The signal that stopped it.
    """

    def __init__(
        self,
        service: Service,
        on_start: Callable[[], None] = lambda: None,
        connections: Connections | None = None,
        on_stop: Callable[[int], None] = lambda requests: None,
    ) -> None:
        """Prepares a server.

        Args:
            service: The served models and limits.
            on_start: Called once connections are accepted.
            connections: The limits of connections; None for the defaults.
            on_stop: Called when the server is stopped, with the number of requests in progress.
        """
        self._service, self._on_start, self._on_stop = service, on_start, on_stop
        self._connections = Connections() if connections is None else connections
        self._signals: socket.socket | None = None
        self.stopped_by: int | None = None
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=partial(Connection, connections=self._connections),  # type: ignore[arg-type]  # called like the class
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                log_level="error",
                proxy_headers=False,
                backlog=ACCEPTED,
                timeout_graceful_shutdown=math.ceil(service.grace_s) + _CLOSE_S,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal stops the server and all its work has ended."""
        try:
            super().run(sockets)
        finally:
            if self._signals is not None:
                self._signals.close()  # ends `_exit_in_time`

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)  # uvicorn also uses this number as the limit of connections accepted at once
        self._watch = asyncio.create_task(self._connections.watch())
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, waits for requests in progress, and ends those that exceed the grace period."""
        self._service.stop()
        self._on_stop(len(self._service.requests))
        ending = asyncio.get_running_loop().call_later(self._service.grace_s + _END_S, self._service.end_requests)
        await super().shutdown(sockets)
        ending.cancel()
        self._watch.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Makes signals stop the server; restores the previous handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours = stopping()
        before = {each: signal.signal(each, self.handle_exit) for each in ours}
        reading, self._signals = socket.socketpair()  # Windows can wait for sockets alone
        self._signals.setblocking(False)
        # The interpreter's C handler writes to it, even while the main thread cannot run Python code.
        wakeup = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_exit_in_time, args=(reading, ours, self._service.grace_s), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for each, handler in before.items():
                signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops the server at the first signal; `_exit_in_time` handles later ones."""
        if self.stopped_by is None:
            self.stopped_by = sig
        self.should_exit = True


def exit_now(number: int, message: bytes) -> NoReturn:
    """Ends the process immediately, with the exit code of a signal."""
    with contextlib.suppress(OSError):
        os.write(2, message)
    os._exit(128 + number)


def _exit_in_time(reading: socket.socket, signals: Sequence[int], grace_s: float) -> None:
    """Waits for signals; ends the process at a second Ctrl-C, or some time after the grace period.

    Args:
        reading: Receives the numbers of signals. After it is closed, there is nothing left to end.
        signals: The signals that stop the server.
        grace_s: How long requests may continue after the first signal, in seconds.
    """
    first: int | None = None
    until, again = math.inf, 0.0
    while True:
        left = until - time.monotonic()
        if left <= 0 and first is not None:
            exit_now(first, b"stopped: the server did not end in time\n")
        reading.settimeout(None if first is None else left)
        try:
            numbers = reading.recv(64)
        except TimeoutError:
            continue
        if not numbers:
            reading.close()
            return
        for number in numbers:
            now = time.monotonic()
            if number not in signals:
                continue
            if first is None:
                first, until, again = number, now + grace_s + _EXIT_S, now + _TWICE_S
            elif number == signal.SIGINT and now >= again:
                exit_now(number, b"stopped at once: answers under way were cut off\n")
