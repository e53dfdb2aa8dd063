"""Connections: fewer than the process may have files, and none that says nothing keeps its place for long.

A connection without a whole request is idle: new, between two requests, or with headers that come byte by byte. It is closed
when its time is up. Where another connection needs the place, the one is closed whose client has kept the server waiting
longest, for a request or for the rest of a body.
"""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from slm.core.machine import free_files
from slm.serve.refusals import Refused

# How long the headers of a request may take, from when its connection opens or the answer before it ended, in seconds; how long
# what was sent may wait to be read once a connection is closed; how often both are looked at.
HEADERS_S = 15.0
_LINGER_S = 10.0
_LOOK_S = 1.0
# Connections that one turn of the event loop accepts. Some turns pass before the oldest ones give up their files.
ACCEPTED = 16
# Files kept for those and for everything else, and how many connections are enough whatever the limit of files.
_RESERVED = 6 * ACCEPTED
_ENOUGH = 2000
_FEWEST = 4


class Connections:
    """The connections of a server.

    Attributes:
        most: How many there may be.
        headers_s: How long the headers of a request may take, in seconds.
    """

    def __init__(self, most: int | None = None, headers_s: float = HEADERS_S) -> None:
        """Takes a number of connections; by default what the limit of open files leaves room for."""
        room = min(_ENOUGH, free_files() - _RESERVED)
        self.most = max(_FEWEST, room if most is None else most)
        self.headers_s = headers_s
        self._open: dict[Connection, None] = {}

    def add(self, connection: "Connection") -> bool:
        """Takes a connection in, if need be in place of the one whose client has kept the server waiting longest.

        Returns:
            Whether it has a place.
        """
        if len(self._open) >= self.most:
            waiting = [each for each in self._open if each.idle or each.unfinished]
            if not waiting:
                return False
            # A new connection has said nothing yet: slow bodies must not keep their places at its expense.
            min(waiting, key=lambda each: each.since).abort()
        self._open[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """Forgets a connection that is closed."""
        self._open.pop(connection, None)

    async def watch(self) -> None:
        """Closes connections whose time is up, until it is cancelled."""
        while True:
            await asyncio.sleep(min(_LOOK_S, self.headers_s / 4))
            now = time.monotonic()
            for each in list(self._open):
                each.check(now)


class Connection(H11Protocol):
    """A connection whose headers have a deadline.

    Attributes:
        since: Since when a request, or the body of one, is waited for, in monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all = connections
        self._closing: float | None = None
        self.since = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def unfinished(self) -> bool:
        """Whether the body of the request has not come yet."""
        return self.cycle is not None and self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        """Takes a connection in, or answers that there are too many."""
        super().connection_made(transport)
        self.since = time.monotonic()
        if not self._all.add(self):
            transport.write(_response(503, "too many connections", "server_error"))
            self.abort(flush=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives up the place."""
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came in, unless the connection is being closed."""
        if not self.transport.is_closing():
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # the headers are complete: now the client has time for the body
                self.since = time.monotonic()

    def on_response_complete(self) -> None:
        """Starts the clock for the next request."""
        self.since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in OpenAI's envelope; closes where an answer is under way."""
        try:
            self.conn.send(h11.Response(status_code=400, headers=[("connection", "close")]))
            self.transport.write(_response(400, msg, "invalid_request_error"))
        except h11.LocalProtocolError:
            pass
        self.transport.close()

    def check(self, now: float) -> None:
        """Closes the connection when its time is up, given the monotonic time."""
        if self.transport.is_closing():  # what was sent waits for a client that may never read it
            self._closing = now if self._closing is None else self._closing
            if now - self._closing > _LINGER_S:
                self.transport.abort()
        elif self.idle and now - self.since > self._all.headers_s:
            self.abort()

    def abort(self, *, flush: bool = False) -> None:
        """Closes the connection; at once unless something is to be sent."""
        self._all.remove(self)
        if flush:
            self.transport.close()
        else:
            self.transport.abort()


def _response(status: int, message: str, kind: str) -> bytes:
    """Returns a whole response outside of any request."""
    body = json.dumps(Refused(status, message, kind).body).encode()
    reason = {400: b"Bad Request", 503: b"Service Unavailable"}[status]
    head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (status, reason, len(body)) + body
