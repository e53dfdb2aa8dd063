"""Access: keys, Host names and origins, whatever else a request contains."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from slm.serve.access import Access, origin_of
from slm.serve.middleware import Guard
from slm.web.hosts import Hosts, hosts_of

NAME = "random"
KEY = "a-key-of-some-length"
LOCAL = hosts_of("127.0.0.1", (), keys=False)
BODY = json.dumps({"model": NAME, "prompt": "One", "max_tokens": 1}).encode()


def ask(
    running: Any, *headers: bytes, line: bytes = b"POST /v1/completions HTTP/1.1", body: bytes = BODY
) -> tuple[int, bytes]:
    """Sends a request exactly as given; returns its status and all received bytes."""
    head = b"\r\n".join([line, *headers, b"connection: close", b"content-length: %d" % len(body), b"", b""])
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(head + body)
        received = b""
        while more := connection.recv(65536):
            received += more
    return int(received.split()[1]), received


JSON = b"content-type: application/json"
HOST = b"host: localhost"


def test_a_key_is_needed_whatever_the_request_says(serve: Callable[..., Any]) -> None:
    running = serve(keys=(KEY,))
    good = b"authorization: Bearer " + KEY.encode()
    for host in (b"localhost", b"a?", b"a/b?", b"a#", b"a@b", b"x/health", b"x/health?", b"[", b"a:b:c", b""):
        status, _ = ask(running, b"host: " + host, JSON)
        assert status in (400, 401), host
    for target in (
        b"/v1/completions", b"//v1/completions", b"/V1/completions", b"/v1//completions", b"/v1/completions/",
        b"/%76%31/completions", b"/v1%2fcompletions", b"/./v1/completions", b"/health/../v1/completions",
        b"/health%2f..%2fv1/completions", b"/health?/v1", b"http://x/v1/completions", b"v1/completions", b"/v1/models",
        b"/health/", b"/%68ealth", b"/docs/../v1/completions", b"/nothing", b"*",
    ):  # fmt: skip
        for method in (b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"get"):
            status, received = ask(running, HOST, JSON, line=method + b" " + target + b" HTTP/1.1")
            public = target == b"/health?/v1"  # /health with a query, and no more than that
            assert status in ((200, 405) if public else (400, 401)), (method, target, received)
            assert b"choices" not in received
    assert ask(running, HOST, b"x-original-url: /health", b"x-forwarded-host: a?", JSON)[0] == 401
    assert (
        ask(running, HOST, b"upgrade: websocket", b"connection: upgrade", b"sec-websocket-version: 13", JSON)[0] == 401
    )
    assert ask(running, HOST, JSON, good)[0] == 200
    assert ask(running, b"host: a?", JSON, good)[0] == 200
    for public in (b"/health", b"/ready", b"/metrics", b"/openapi.json", b"/"):
        assert ask(running, HOST, line=b"GET " + public + b" HTTP/1.1", body=b"")[0] == 200


def test_one_authorization_header_with_the_whole_key(serve: Callable[..., Any]) -> None:
    running = serve(keys=(KEY, "ключ-kénÿ-pass"))
    good = b"Bearer " + KEY.encode()
    for right in (
        good, b"bearer " + KEY.encode(), b"BEARER  " + KEY.encode() + b" ", "Bearer ключ-kénÿ-pass".encode(),
    ):  # fmt: skip
        assert ask(running, HOST, JSON, b"authorization: " + right)[0] == 200, right
    for wrong in (
        KEY.encode(), b"Basic " + KEY.encode(), good[:-1], good + b"x", good + b"," + good, b"Bearer", b"Bearer ",
        b"Bearer Bearer " + KEY.encode(), good.upper(), b"Bearer\t" + KEY.encode(), b"",
    ):  # fmt: skip
        assert ask(running, HOST, JSON, b"authorization: " + wrong)[0] == 401, wrong
    for pair in ((good, b"Bearer wrong"), (b"Bearer wrong", good), (good, good)):
        assert ask(running, HOST, JSON, *(b"authorization: " + each for each in pair))[0] == 401


def test_a_key_in_latin_1_is_the_same_key() -> None:
    access = Access(["kénÿ-of-some-length"])
    for code in ("latin-1", "utf-8"):
        given = "Bearer kénÿ-of-some-length".encode(code)
        assert access.refusal({"path": "/v1/models", "headers": [(b"authorization", given)]}) is None
    assert access.refusal({"path": "/v1/models", "headers": [(b"authorization", b"Bearer k")]}) is not None


@pytest.mark.parametrize("keys", [[""], ["\udc80"]])
def test_keys_that_nobody_can_send_open_nothing(keys: list[str]) -> None:
    access = Access(keys)
    for header in ([], [(b"authorization", b"Bearer ")], [(b"authorization", b"Bearer")]):
        assert access.refusal({"path": "/v1/models", "headers": header}) is not None


def test_a_mounted_application_hides_no_path() -> None:
    access = Access([KEY], public=["/health"])
    for root, path, public in (
        ("", "/health", True), ("/api", "/api/health", True), ("/api", "/apihealth", False), ("/v1", "/v1/models", False),
        ("/api", "/health", True), ("", "/api/health", False),
    ):  # fmt: skip
        refusal = access.refusal({"path": path, "root_path": root, "headers": []})
        assert (refusal is None) == public, (root, path)


def test_a_local_server_without_keys_answers_to_local_names(serve: Callable[..., Any]) -> None:
    running = serve(hosts=LOCAL)
    for host in (b"localhost", b"LocalHost:8000", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:8000"):
        assert ask(running, b"host: " + host, JSON)[0] == 200, host
    for host in (
        b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.evil.example", b"localhost@evil.example",
        b"evil.example/localhost", b"169.254.169.254", b"localhost:8000:evil", b"", b"[::1", b"127.0.0.1#",
    ):  # fmt: skip
        status, received = ask(running, b"host: " + host, JSON)
        assert status == 421 and b'"code": "host_not_allowed"' in received, host
        assert ask(running, b"host: " + host, line=b"GET / HTTP/1.1", body=b"")[0] == 421  # the page tells of the model


def test_which_names_a_server_answers_to() -> None:
    assert LOCAL is not None and not LOCAL.any_address
    assert hosts_of("127.0.0.1", (), keys=True) is None and hosts_of("0.0.0.0", (), keys=False) is None
    named = hosts_of("0.0.0.0", ["SLM.example"], keys=True)
    assert named is not None
    accepted = ["slm.example:80", "10.0.0.7:8000", "[fd00::7]", "localhost"]  # probes ask by address
    assert all(map(named.accept, accepted)) and not named.accept("other.example")
    bound = hosts_of("127.0.0.2", (), keys=False, host="my-box")
    assert (
        bound is not None
        and bound.accept("127.0.0.2:8000")
        and bound.accept("My-Box:1")
        and not bound.accept("127.0.0.3")
    )
    assert hosts_of("::ffff:127.0.0.1", (), keys=False) is not None
    six = hosts_of("::1", (), keys=False)
    assert six is not None and six.accept("[::1]:8000")


def test_pages_elsewhere_cannot_use_a_server_without_keys(serve: Callable[..., Any]) -> None:
    """A form or `fetch(…, {mode: "no-cors"})` sends text/plain without a preflight: only the origin identifies it."""
    running = serve(hosts=LOCAL)
    plain = b"content-type: text/plain"
    for origin in (
        b"https://evil.example", b"null", b"http://localhost", b"http://localhost.evil:8000", b"file://", b"localhost:8000",
    ):  # fmt: skip
        for kind in (plain, JSON, b"accept: */*"):
            status, received = ask(running, b"host: localhost:8000", b"origin: " + origin, kind)
            assert status == 403 and b"--cors-origin" in received, origin
    for origin in (
        b"http://localhost:8000",
        b"https://LOCALHOST:8000",
    ):  # the page of this server, a proxy with TLS before it
        assert ask(running, b"host: localhost:8000", b"origin: " + origin, JSON)[0] == 200
    assert ask(running, b"host: localhost", b"origin: http://localhost:80", JSON)[0] == 200
    assert ask(running, b"host: localhost", b"origin: http://localhost", b"origin: http://evil", JSON)[0] == 403


def test_origins_that_are_allowed(serve: Callable[..., Any]) -> None:
    origin = b"https://app.example"
    running = serve(keys=(KEY,), origins=("https://app.example",))
    ask_first = [HOST, b"origin: " + origin, b"access-control-request-method: POST"]
    names = b"access-control-request-headers: authorization,content-type,x-stainless-os"
    status, received = ask(running, *ask_first, names, line=b"OPTIONS /v1/chat/completions HTTP/1.1", body=b"")
    assert status == 204 and b"access-control-allow-origin: https://app.example\r\n" in received
    assert b"authorization,content-type,x-stainless-os" in received and received.count(b"allow-origin") == 1
    status, received = ask(running, HOST, b"origin: " + origin, b"authorization: Bearer " + KEY.encode(), JSON)
    assert status == 200 and b"access-control-allow-origin: https://app.example\r\n" in received
    status, received = ask(running, HOST, b"origin: " + origin, JSON)  # what is refused can be read as well
    assert status == 401 and b"access-control-allow-origin" in received
    other = b"origin: https://other.example"
    status, received = ask(running, HOST, other, ask_first[2], line=b"OPTIONS /v1/models HTTP/1.1", body=b"")
    assert status == 401 and b"access-control" not in received
    assert b"access-control" not in ask(running, HOST, other, b"authorization: Bearer " + KEY.encode(), JSON)[1]
    every = serve(origins=("*",))
    assert b"access-control-allow-origin: *\r\n" in ask(every, HOST, other, JSON)[1]


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://App.Example/", "https://app.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("*", "*"),
        ("null", "null"),
        ("app.example", None),
        ("https://app.example/page", None),
        ("https://user@app.example", None),
        ("https://app.example:x", None),
        ("https://app.example?x", None),
        ("https://", None),
        ("", None),
    ],
)
def test_origins_are_spelt_as_browsers_spell_them(text: str, origin: str | None) -> None:
    assert origin_of(text) == origin


def test_no_host_header_is_no_browser() -> None:
    access = Access(hosts=Hosts({"localhost"}))
    assert access.refusal({"path": "/v1/models", "headers": []}) is None
    twice = [(b"host", b"localhost"), (b"host", b"evil.example")]
    refused = access.refusal({"path": "/v1/models", "headers": twice})
    assert refused is not None and refused.status == 421


def test_websockets_are_refused_before_they_are_accepted() -> None:
    """Holds for any server around the application: `slm serve` itself never offers WebSocket."""
    reached, sent = [], []

    async def application(*_: Any) -> None:
        reached.append(1)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    service: Any = None
    guard = Guard(application, service, Access())
    asyncio.run(guard({"type": "websocket", "path": "/v1/completions", "headers": []}, receive, send))
    assert sent == ["websocket.close"] and not reached
