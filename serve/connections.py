"""Limits the number of connections to the available file descriptors, and closes idle ones.

A connection without a complete request is idle: new, between two requests, or still sending headers. It is closed when its
time is up. If another connection needs its place earlier, the server closes the connection that has waited longest for its
client, for a request or for the rest of a body.
"""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from slm.core.processes import free_files
from slm.serve.errors import Refused

# In seconds: the limit for the headers of a request, from the start of the connection or the end of the last response; the
# limit for a client to read sent data after its connection is closed; and the interval of these checks.
HEADERS_S = 15.0
_LINGER_S = 10.0
_LOOK_S = 1.0
# Connections that one iteration of the event loop accepts. The oldest ones release their files a few iterations later.
ACCEPTED = 16
# Files reserved for those and for everything else, and a number of connections that suffices whatever the limit of files.
_RESERVED = 6 * ACCEPTED
_ENOUGH = 2000
_FEWEST = 4


class Connections:
    """The connections of a server.

    Attributes:
        most: The most connections.
        headers_s: The limit for the headers of a request, in seconds.
    """

    def __init__(self, most: int | None = None, headers_s: float = HEADERS_S) -> None:
        """Sets the limits. By default, `most` is what the limit of open files leaves room for."""
        room = min(_ENOUGH, free_files() - _RESERVED)
        self.most = max(_FEWEST, room if most is None else most)
        self.headers_s = headers_s
        self._open: dict[Connection, None] = {}

    def add(self, connection: "Connection") -> bool:
        """Adds a connection, if necessary by closing the one that has waited longest for its client.

        Returns:
            Whether the connection was accepted.
        """
        if len(self._open) >= self.most:
            waiting = [each for each in self._open if each.idle or each.unfinished]
            if not waiting:
                return False
            # New connections come first: slow bodies must not keep their places at the expense of a new client.
            min(waiting, key=lambda each: each.since).abort()
        self._open[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """Removes a closed connection."""
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
        since: The start of waiting for a request or its body, in monotonic seconds.
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
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def unfinished(self) -> bool:
        """Whether the body of the request is incomplete."""
        return self.cycle is not None and self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        """Registers the connection, or responds that there are too many."""
        super().connection_made(transport)
        self.since = time.monotonic()
        if not self._all.add(self):
            transport.write(_response(503, "too many connections", "server_error"))
            self.abort(flush=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Releases the place of the connection."""
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Processes received data, unless the connection is being closed."""
        if not self.transport.is_closing():
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # the headers are complete: the limit for the body starts
                self.since = time.monotonic()

    def on_response_complete(self) -> None:
        """Starts the limit for the next request."""
        self.since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Responds to invalid HTTP in OpenAI's envelope; only closes the connection if a response is in progress."""
        try:
            self.conn.send(h11.Response(status_code=400, headers=[("connection", "close")]))
            self.transport.write(_response(400, msg, "invalid_request_error"))
        except h11.LocalProtocolError:
            pass
        self.transport.close()

    def check(self, now: float) -> None:
        """Closes the connection if its time is up at the given monotonic time."""
        if self.transport.is_closing():  # sent data waits for a client that may never read it
            self._closing = now if self._closing is None else self._closing
            if now - self._closing > _LINGER_S:
                self.transport.abort()
        elif self.idle and now - self.since > self._all.headers_s:
            self.abort()

    def abort(self, *, flush: bool = False) -> None:
        """Closes the connection, immediately unless data is still to be sent."""
        self._all.remove(self)
        if flush:
            self.transport.close()
        else:
            self.transport.abort()


def _response(status: int, message: str, kind: str) -> bytes:
    """Returns a complete HTTP response outside any request."""
    body = json.dumps(Refused(status, message, kind).body).encode()
    reason = {400: b"Bad Request", 503: b"Service Unavailable"}[status]
    head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (status, reason, len(body)) + body
