"""The server of the page: which Host names it answers to, and connections that say nothing."""

import http.client
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.runtime import shipped
from slm.web.server import SiteServer
from slm.web.site import local_site
from tests.serving import running

Start = Callable[..., SiteServer]


@pytest.fixture
def start() -> Iterator[Start]:
    site = local_site(Bundle.open(shipped.model_path()), "stories")
    with ExitStack() as stack:

        def make(host: str = "127.0.0.1", most: int | None = None, **options: Any) -> SiteServer:
            server = SiteServer(site, host, 0, **options)
            server.most = most or server.most
            return stack.enter_context(running(server))

        yield make


def get(server: SiteServer, *hosts: bytes, path: bytes = b"/") -> int:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        head = b"".join(b"Host: " + host + b"\r\n" for host in hosts)
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
        return int(connection.makefile("rb").readline().split()[1])


def is_closed(connection: socket.socket, patience_s: float) -> bool:
    connection.settimeout(patience_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_only_local_names_are_answered(start: Start) -> None:
    server = start(hosts=["named.example"])
    for host in (b"localhost", b"127.0.0.1:8080", b"[::1]:1", b"Named.Example:8080"):
        assert get(server, host) == 200, host
    for host in (b"evil.example", b"localhost.evil.example:8080", b"", b"localhost@evil.example"):
        assert get(server, host) == get(server, host, path=b"/model/config.json") == 421, host
    assert get(server, b"localhost", b"evil.example") == 421
    assert get(start(host="0.0.0.0"), b"other.example") == 200  # others may reach it by names of which it does not know


def test_the_oldest_connection_makes_room(start: Start) -> None:
    server = start(most=4, headers_s=60)
    idle = []
    for _ in range(8):
        idle.append(socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10))
        time.sleep(0.02)
    for _ in range(3):
        assert get(server, b"localhost") == 200
    assert all(is_closed(each, 5) for each in idle[:4]) and not is_closed(idle[-1], 0.2)
    for each in idle:
        each.close()


def test_headers_have_a_deadline(start: Start) -> None:
    server = start(headers_s=0.5)
    silent, slow = (socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) for _ in range(2))
    slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
    until = time.monotonic() + 10
    while time.monotonic() < until and not (is_closed(silent, 0.05) and is_closed(slow, 0.05)):
        try:
            slow.sendall(b"a")
        except OSError:
            break
    assert is_closed(silent, 5) and is_closed(slow, 5) and time.monotonic() < until
    client = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    for _ in range(3):  # who goes on asking stays connected
        client.request("GET", "/style.css")
        assert client.getresponse().read() == server.site.read("style.css")
        time.sleep(0.3)
    client.close()
