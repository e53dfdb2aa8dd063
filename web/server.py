"""A small server of a site's files: what it does not know by its exact name is not there."""

import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from slm.web.site import HEADERS, Site, content_type

# Of a request's headers, how long each may let the server wait.
_TIMEOUT_S = 30


class SiteServer(ThreadingHTTPServer):
    """Serves a site until it is stopped; every connection has a thread."""

    daemon_threads = True

    def __init__(self, site: Site, host: str, port: int) -> None:
        """Listens; port 0 takes a free one.

        Raises:
            OSError: When the address is taken or not this machine's.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.site = site
        self.tags = {name: f'"{entry.sha256[:32]}"' for name, entry in site.entries.items()}
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that have gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "slm"
    sys_version = ""
    timeout = _TIMEOUT_S
    server: SiteServer

    def do_GET(self) -> None:
        """Sends a file."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Says what a file is."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
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
        content = site.read(name)
        self._begin(HTTPStatus.OK, content_type(name), len(content), tag)
        if body:
            self.wfile.write(content)

    def _begin(self, status: HTTPStatus, kind: str, length: int | None, tag: str | None = None) -> None:
        self.send_response(status)
        for header, value in HEADERS.items():
            self.send_header(header, value)
        self.send_header("Content-Type", kind)
        if tag is not None:
            self.send_header("ETag", tag)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of requests."""
