"""A small HTTP server for the files of a site, which serves files by their exact names only."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from slm.core import systems
from slm.core.processes import free_files
from slm.web.hosts import hosts_of, is_loopback
from slm.web.ranges import UnsatisfiableError, content_range, requested
from slm.web.site import HEADERS, Site, content_type, entity_tag

# Timeouts in seconds: for a client to read a piece of a file, and for the headers of a request, from when its connection opens
# or the previous file was sent. Then the size of a piece in bytes.
_TIMEOUT_S = 30
HEADERS_S = 15.0
_PIECE = 1 << 20
_TRY_AGAIN_S = 0.05
# Maximum connections, each of which has a thread: enough for browsers, and leaves file descriptors for everything else.
_ENOUGH = 256
_FEWEST = 4
_RESERVED = 64


@dataclass
class _Connection:
    """A connection, and the time since which it has waited for a request; None while it is answering one."""

    socket: socket.socket
    idle_since: float | None


class SiteServer(ThreadingHTTPServer):
    """Serves a site until it is stopped, with a thread per connection."""

    daemon_threads = True
    # On other systems it permits a restart within a minute; on Windows, two servers at one port.
    allow_reuse_address = not systems.WINDOWS

    def __init__(
        self, site: Site, host: str, port: int, hosts: Collection[str] = (), headers_s: float = HEADERS_S
    ) -> None:
        """Opens the socket.

        Args:
            site: The site.
            host: Address to listen on.
            port: The port; 0 chooses a free one.
            hosts: Host names to accept besides those of this machine. If there are none and other machines can reach the
                address, all names are accepted.
            headers_s: Timeout for the headers of a request, in seconds.

        Raises:
            OSError: When the address is in use or does not belong to this machine.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.site = site
        self.tags = {name: entity_tag(entry) for name, entry in site.entries.items()}
        self.most = max(_FEWEST, min(_ENOUGH, free_files() - _RESERVED))
        self._headers_s = headers_s
        self._open: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)
        self.hosts = hosts_of(str(self.server_address[0]), hosts, keys=False, host=host)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        """The URL of the page."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection; if there are no file descriptors left, waits a moment instead of retrying at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_TRY_AGAIN_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Registers a connection, and closes the one that has been idle longest if there are too many."""
        with self._lock:
            if len(self._open) >= self.most:
                idle = [each for each in self._open.values() if each.idle_since is not None]
                if not idle:
                    return False
                _end(min(idle, key=lambda each: each.idle_since or 0.0))
            self._open[request] = _Connection(request, time.monotonic())
        return True

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Closes connections whose headers are overdue; called twice a second."""
        super().service_actions()
        now = time.monotonic()
        with self._lock:
            for each in self._open.values():
                if each.idle_since is not None and now - each.idle_since > self._headers_s:
                    _end(each)

    def busy(self, request: Any, busy: bool) -> None:
        """Records whether a connection is answering a request."""
        with self._lock:
            if request in self._open:
                self._open[request].idle_since = None if busy else time.monotonic()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of clients that have disconnected or do not read."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _end(connection: _Connection) -> None:
    """Shuts down a connection; its thread then reads its end and closes it."""
    connection.idle_since = None
    with contextlib.suppress(OSError):  # the client has closed it
        connection.socket.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "slm"
    sys_version = ""
    timeout = _TIMEOUT_S
    server: SiteServer

    def do_GET(self) -> None:
        """Sends a file with its headers."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Sends the headers of a file."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        self.server.busy(self.connection, True)
        try:
            self._answer_one(body)
        finally:
            self.server.busy(self.connection, False)

    def _answer_one(self, body: bool) -> None:
        hosts = self.headers.get_all("Host", [])
        allowed = self.server.hosts
        if allowed is not None and hosts and not (len(hosts) == 1 and allowed.accept(hosts[0])):
            text = b"this server does not answer to that Host name; slm web --allow-host NAME allows one\n"
            self._begin(HTTPStatus.MISDIRECTED_REQUEST, "text/plain; charset=utf-8", len(text))
            self.wfile.write(text if body else b"")
            return
        name = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
        site = self.server.site
        if name not in site.files:
            self._begin(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", len(b"not here\n"))
            self.wfile.write(b"not here\n" if body else b"")
            return
        tag = self.server.tags.get(name)
        if tag is not None and self.headers.get("If-None-Match") == tag:
            self._begin(HTTPStatus.NOT_MODIFIED, content_type(name), None, tag)
            return
        size = site.length(name)
        given = self.headers.get("Range") if body else None  # HEAD has no ranges
        try:
            found = requested(given, self.headers.get("If-Range"), tag, size)
        except UnsatisfiableError:
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            self._begin(status, content_type(name), 0, tag, content_range(None, size))
            return
        start, end = found or (0, size)
        status = HTTPStatus.PARTIAL_CONTENT if found else HTTPStatus.OK
        self._begin(status, content_type(name), end - start, tag, content_range(found, size) if found else None)
        if body:
            for piece in site.pieces(name, start, end, _PIECE):
                self.wfile.write(piece)

    def _begin(
        self, status: HTTPStatus, kind: str, length: int | None, tag: str | None = None, bytes_of: str | None = None
    ) -> None:
        self.send_response(status)
        for header, value in HEADERS.items():
            self.send_header(header, value)
        self.send_header("Content-Type", kind)
        if tag is not None:
            self.send_header("ETag", tag)
        if status < HTTPStatus.BAD_REQUEST:
            self.send_header("Accept-Ranges", "bytes")
        if bytes_of is not None:
            self.send_header("Content-Range", bytes_of)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""
