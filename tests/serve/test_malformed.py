"""Invalid requests get a 400 in OpenAI's envelope and affect no other client: cases that a generator would not find."""

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from slm.core.errors import SlmError
from slm.serve.service import Limits

NAME = "random"
# One for all: to make a client takes longer than to answer.
CLIENT = httpx.Client(timeout=60)
COMPLETION = {"model": NAME, "prompt": "The fox", "max_tokens": 2}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
# One value of each JSON type, and numbers that are none or too large.
IMPOSSIBLE = ("NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[[]]")
VALUES = ("null", "true", "0", "-1", "1.5", '"x"', "[]", "{}", '{"x": 1}', *IMPOSSIBLE)
FIELDS = {
    "/v1/completions": (
        *COMPLETION, "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "presence_penalty",
        "frequency_penalty", "logit_bias", "response_format", "top_k", "min_p", "typical_p", "repetition_penalty",
        "ignore_eos", "logprobs", "echo",
    ),
    "/v1/chat/completions": (*CHAT, "max_completion_tokens", "logprobs", "top_logprobs", "n", "stop", "response_format"),
}  # fmt: skip


def post(running: Any, path: str, body: bytes | str) -> httpx.Response:
    content = body.encode() if isinstance(body, str) else body
    return CLIENT.post(running.url + path, content=content, headers={"content-type": "application/json"})


def with_field(body: dict[str, Any], name: str, value: str) -> str:
    """Returns a body in which a field is spelt so."""
    rest = {key: each for key, each in body.items() if key != name}
    return f"{json.dumps(rest)[:-1]}, {json.dumps(name)}: {value}}}"


def in_envelope(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return error.keys() == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 1000


def alive(running: Any) -> bool:
    return post(running, "/v1/completions", json.dumps(COMPLETION | {"temperature": 0})).status_code == 200


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_with_a_value_of_every_type(running: Any, path: str) -> None:
    body = CHAT if "chat" in path else COMPLETION
    seen: dict[int, int] = {}
    for name in FIELDS[path]:
        for value in VALUES:
            response = post(running, path, with_field(body, name, value))
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            wanted = (200, 400, 404) if name == "model" else (200, 400)
            assert response.status_code in wanted, (name, value[:20], response.text)
            assert response.status_code == 200 or in_envelope(response), (name, value[:20])
            if value in IMPOSSIBLE:
                assert response.status_code == 400, (name, value[:20])
    assert seen[400] > 2 * seen[200] > 0
    assert alive(running)


def test_bodies_that_are_no_json(running: Any) -> None:
    for body in (
        b"",
        b"{",
        b"null",
        b'"x"',
        b"[]",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        json.dumps(COMPLETION | {"\ud800": 1}).encode(),
        json.dumps(COMPLETION | {"x" * 100_000: 1}).encode(),
    ):
        response = post(running, "/v1/completions", body)
        assert response.status_code == 400 and in_envelope(response), body[:40]
    not_a_number = schema_of({"minimum": float("nan")})
    assert "not JSON" in post(running, "/v1/completions", not_a_number).json()["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = httpx.post(f"{running.url}/v1/completions", content=b"{}", headers={"content-type": kind})
        assert response.status_code == 400 and in_envelope(response)
    assert alive(running)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["x", "\udc00y"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [10**400]}, "prompt.0"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": "word " * 100}, "prompt"),
        ({"logit_bias": {"320": 1}}, None),
        ({"logit_bias": {"1": -101}}, "logit_bias.1"),
        ({"stop": ["a"] * 5000}, "stop"),
        ({"n": 16, "prompt": ["a", "b"]}, "n"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_that_will_not_do_is_named(
    serve: Callable[..., Any], change: dict[str, Any], param: str | None
) -> None:
    running = serve(Limits(new_tokens=64, prompt_tokens=40))
    response = post(running, "/v1/completions", json.dumps(COMPLETION | change))
    assert response.status_code == 400 and in_envelope(response)
    assert response.json()["error"]["param"] == param


def schema_of(schema: Any) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps(COMPLETION | {"response_format": form})


NESTED: dict[str, Any] = {"type": "string"}
for _ in range(300):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:1/x.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "(" * 200 + "a" + ")*" * 200},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "integer", "minimum": 10**400},
        {"type": "number", "multipleOf": 0},
        {"type": "array", "minItems": -1},
        {"not": {}},
        {"enum": ["\ud800"]},
        NESTED,
        {"properties": {f"p{i}": {} for i in range(20_000)}, "required": [f"p{i}" for i in range(20_000)]},
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(5000)]},
    ],
    ids=lambda schema: str(schema)[:30],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(running: Any, schema: Any) -> None:
    response = post(running, "/v1/completions", schema_of(schema))
    assert response.status_code == 400 and in_envelope(response)
    assert response.json()["error"]["param"] == "response_format"
    assert alive(running)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"properties": {"next": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "string", "pattern": "^(a|b)*a(a|b){25}$"},
        {"type": "string", "minLength": 10**9},
        {"enum": [f"v{i}" for i in range(5000)]},
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(1000)]},
    ],
    ids=lambda schema: str(schema)[:30],
)
def test_a_large_schema_is_kept_to_or_refused(running: Any, schema: Any) -> None:
    assert post(running, "/v1/completions", schema_of(schema)).status_code in (200, 400)
    assert alive(running)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_fails_on_the_way_ends_its_own_answer_alone(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    from slm.runtime.constraint import GrammarConstraint

    accept = GrammarConstraint.accept

    def failing(self: GrammarConstraint, token: int) -> bool:
        accept(self, token)
        raise SlmError("the schema is not supported: too much")

    running = serve()
    monkeypatch.setattr(GrammarConstraint, "accept", failing)
    body = json.loads(schema_of({"type": "string"})) | {"stream": stream}
    response = post(running, "/v1/completions", json.dumps(body))
    if stream:
        last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["message"].endswith("too much")
    else:
        assert response.status_code == 400 and in_envelope(response)
    assert alive(running) and running.service.engine.figures.done == {"error": 1, "length": 1}


def test_methods_and_paths_that_are_none(running: Any) -> None:
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("HEAD", "/v1/completions", 405),
        ("GET", "/nothing", 404),
        ("GET", "/health/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/models/a%2Fb", 404),
        ("GET", "/v1/models/%ff%00", 404),
    ):
        response = httpx.request(method, running.url + path)
        assert response.status_code == status
        assert method == "HEAD" or in_envelope(response)
        assert (status == 405) == ("allow" in response.headers)


def test_a_path_that_does_not_exist_is_named(running: Any) -> None:
    """The response has OpenAI's code; a redirect would contain the Host header."""
    response = httpx.post(f"{running.url}/v1/embeddings", headers={"host": "elsewhere.example"})
    error = response.json()["error"]
    assert error["code"] == "unknown_url" and "/v1/embeddings" in error["message"] and "/docs" in error["message"]
    response = httpx.get(f"{running.url}/docs/", headers={"host": "elsewhere.example"})
    assert response.status_code == 404 and "location" not in response.headers


def test_probes_may_ask_for_headers_alone(running: Any) -> None:
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/models"):
        response, whole = httpx.head(running.url + path), httpx.get(running.url + path)
        assert response.status_code == 200 and response.content == b"", path
        assert response.headers["content-type"] == whole.headers["content-type"]
    # The connection is still in step after it.
    head = b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert raw(running, head).count(b"HTTP/1.1 200") == 2


def raw(running: Any, sent: bytes) -> bytes:
    """Sends bytes and returns what comes until the other side closes."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while more := connection.recv(65536):
                received += more
        except ConnectionError:  # it has answered and closed before everything was sent
            pass
        return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"


def test_a_body_is_counted_whatever_it_says_of_itself(serve: Callable[..., Any]) -> None:
    running = serve(Limits(body_bytes=100_000, new_tokens=64))
    body = json.dumps(COMPLETION).encode()
    chunked = HEAD + b"transfer-encoding: chunked\r\n"
    assert b" 200 " in raw(running, chunked + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)).splitlines()[0]
    large = b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (200_000, b" " * 200_000)
    assert b" 413 " in raw(running, chunked + large).splitlines()[0]
    for length in (b"100001", b"9" * 19):
        assert b" 413 " in raw(running, HEAD + b"content-length: %s\r\n\r\n" % length).splitlines()[0]
    assert alive(running)


def test_a_body_that_does_not_come_is_not_waited_for(serve: Callable[..., Any]) -> None:
    running = serve(Limits(patience_s=0.3, new_tokens=64))
    assert b" 408 " in raw(running, HEAD + b"content-length: 10\r\n\r\n{").splitlines()[0]
