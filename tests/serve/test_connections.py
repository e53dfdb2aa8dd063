"""Idle and slow connections: other clients are still served, and file descriptors do not run out."""

import contextlib
import json
import logging
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.serve.connections import Connections
from slm.serve.log import JsonLines, Seldom
from slm.serve.service import Limits

NAME = "random"


def connect(running: Any, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    connection.sendall(sent)
    return connection


def health(running: Any) -> int:
    with urllib.request.urlopen(f"{running.url}/health", timeout=60) as answer:
        return int(answer.status)


def is_open(connection: socket.socket) -> bool:
    """Returns whether the other side has not closed the connection; drops received data."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


def wait_until_closed(connection: socket.socket, patience_s: float = 10) -> bool:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if not is_open(connection):
            return True
    return False


HALF_HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "
HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
)


def wait_for(places: Connections, count: int, *, unfinished: bool) -> None:
    """Waits until the server has so many connections, and has read the headers of their requests, if any."""
    until = time.monotonic() + 10
    while sum(each.unfinished or not unfinished for each in list(places._open)) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [b"", HALF_HEAD, HALF_BODY])
def test_the_oldest_makes_room(serve: Callable[..., Any], sent: bytes) -> None:
    places = Connections(6, headers_s=60)
    running = serve(connections=places)
    oldest = [connect(running, sent) for _ in range(6)]
    wait_for(places, 6, unfinished=sent is HALF_BODY)
    newest = [connect(running, sent) for _ in range(6)]
    assert all(wait_until_closed(each) for each in oldest)
    for _ in range(3):
        assert health(running) == 200
    assert sum(is_open(each) for each in newest) >= 3  # each of the others made room for a request


def test_slow_bodies_do_not_displace_new_connections(serve: Callable[..., Any]) -> None:
    """A new connection has had no time to send; connections with unfinished bodies are closed before it."""
    places = Connections(4, headers_s=60)
    running = serve(connections=places)
    bodies = [connect(running, HALF_BODY) for _ in range(4)]
    wait_for(places, 4, unfinished=True)
    new = connect(running)
    more = [connect(running, HALF_BODY) for _ in range(3)]
    assert all(wait_until_closed(each) for each in bodies)
    new.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert new.recv(12) == b"HTTP/1.1 200"
    assert all(is_open(each) for each in more)


def test_who_is_being_answered_keeps_the_place(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=10_000), connections=Connections(4, headers_s=60), slots=4)
    body = json.dumps(
        {"model": NAME, "prompt": "One", "stream": True, "max_tokens": 10_000, "ignore_eos": True}
    ).encode()
    engine = running.service.engine
    step = engine.scheduler.step

    def slow() -> Any:
        time.sleep(0.01)
        return step()

    engine.scheduler.step = slow
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    busy = [connect(running, head % len(body) + body) for _ in range(4)]
    assert all(each.recv(12) == b"HTTP/1.1 200" for each in busy)
    more = connect(running)
    more.settimeout(10)
    refused = more.recv(65536)
    assert refused.startswith(b"HTTP/1.1 503 ") and json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert all(is_open(each) for each in busy)
    for each in busy:
        each.close()


def test_headers_have_a_deadline(serve: Callable[..., Any]) -> None:
    """Single bytes do not extend the deadline, neither on a new connection nor after a response."""
    running = serve(connections=Connections(headers_s=0.6))
    silent, slow, kept = connect(running), connect(running, HALF_HEAD), connect(running)
    kept.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert kept.recv(12) == b"HTTP/1.1 200"
    until = time.monotonic() + 60
    while time.monotonic() < until and any(is_open(each) for each in (silent, slow, kept)):
        for each in (slow, kept):
            with contextlib.suppress(OSError):
                each.sendall(b"a")
        time.sleep(0.05)
    assert not any(is_open(each) for each in (silent, slow, kept))


def test_a_whole_body_has_a_deadline(serve: Callable[..., Any]) -> None:
    """Further pieces do not extend the deadline."""
    running = serve(Limits(patience_s=0.5, new_tokens=64), connections=Connections(headers_s=0.5))
    drip = connect(running, HALF_BODY)
    until, received, closed = time.monotonic() + 60, b"", False
    drip.settimeout(0.05)
    while time.monotonic() < until and not closed:
        try:
            drip.sendall(b" ")
            more = drip.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            more = b""
        closed = not more
        received += more
    assert received.startswith(b"HTTP/1.1 408 ") and json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert closed  # while the body still came


def test_bodies_together_have_a_limit(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=64, bodies_bytes=150_000, patience_s=20))
    head = HALF_BODY.replace(b"length: 90", b"length: 100000")
    first = connect(running, head + b" " * 90_000)
    until = time.monotonic() + 10
    while running.service.bodies_bytes < 90_000 and time.monotonic() < until:
        time.sleep(0.01)
    second = connect(running, head + b" " * 90_000)
    received = second.recv(65536)
    assert received.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in received.lower()
    first.close()
    second.close()
    while running.service.bodies_bytes and time.monotonic() < until:
        time.sleep(0.01)
    assert running.service.bodies_bytes == 0
    assert running.post("/v1/completions", {"model": NAME, "prompt": "One", "max_tokens": 1}).status_code == 200


def test_headers_have_a_size_and_a_body_one_length(serve: Callable[..., Any]) -> None:
    running = serve()

    def answer(head: bytes) -> bytes:
        connection = connect(running, head)
        received = b""
        with contextlib.suppress(ConnectionError):  # closed before everything that was sent had been read
            while more := connection.recv(65536):
                received += more
        return received

    host = b"host: localhost\r\nconnection: close\r\n"
    assert answer(b"GET /health HTTP/1.1\r\n" + host + b"x: " + b"a" * 15_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert b" 431 " in answer(b"GET /health HTTP/1.1\r\n" + host + b"x: " + b"a" * 40_000 + b"\r\n\r\n")[:20]
    assert b" 431 " in answer(b"GET /health?" + b"a" * 40_000 + b" HTTP/1.1\r\n" + host + b"\r\n")[:20]
    kept = b"host: localhost\r\n"
    both = b"POST /v1/completions HTTP/1.1\r\n" + kept + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
    received = answer(both + b"0\r\n\r\nGET /metrics HTTP/1.1\r\n" + kept + b"\r\n")
    assert b" 400 " in received[:20] and b"connection: close" in received and b"slm_" not in received


def test_what_is_no_http_is_answered_in_the_envelope(serve: Callable[..., Any]) -> None:
    running = serve()
    connection = connect(running, b"\x16\x03\x01 nonsense\r\n\r\n")
    received = b""
    while more := connection.recv(65536):
        received += more
    assert received.startswith(b"HTTP/1.1 400 ") and json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"]


def test_idle_connections_do_not_use_up_the_files(shared_bundle: Bundle, tmp_path: Path) -> None:
    """A process with a limit of 160 files and 300 connections logs no traceback for each connection."""
    limit = 160
    command = [sys.executable, "-m", "slm", "serve", str(shared_bundle.path), "--port", "0", "--name", "m"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stderr=log, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        )
    try:
        said = ""
        until = time.monotonic() + 60
        while "/v1\n" not in said and time.monotonic() < until:
            time.sleep(0.05)
            said = (tmp_path / "log").read_text()
        port = int(said.rpartition(":")[2].partition("/")[0])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(300)]
        for _ in range(5):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
                assert answer.status == 200
        assert len(list(Path(f"/proc/{server.pid}/fd").iterdir())) < limit
        for each in idle:
            each.close()
    finally:
        server.terminate()
        server.wait(30)
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text and len(log_text) < 10_000


def test_what_a_library_repeats_is_logged_once_in_a_while() -> None:
    """As asyncio does of each accept() that fails for want of files, with a traceback."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, logger = Lines(), logging.Logger("asyncio")
    handler.setFormatter(JsonLines())
    handler.addFilter(Seldom())
    logger.addHandler(handler)
    for _ in range(1000):
        try:
            raise OSError(24, "Too many open files, said the fox")
        except OSError as error:
            logger.error("socket.accept() out of system resource\nsocket: <x>", exc_info=error)
    logger.error("something else")
    first, second = map(json.loads, lines)
    assert first["message"] == "socket.accept() out of system resource" and first["error"] == "OSError"
    assert first["time"].endswith("Z") and second["message"] == "something else" and "fox" not in lines[0]
