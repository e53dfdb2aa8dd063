"""Operation of a server: time limits, clients that do not read, prefix caching, logs without text."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx2 as httpx
import openai
import pytest

from slm.serve.service import Limits

NAME = "random"
SECRET = "the fox is a secret"


def wait_until(true: Callable[[], bool], patience_s: float = 60) -> bool:
    until = time.monotonic() + patience_s
    while time.monotonic() < until and not true():
        time.sleep(0.02)
    return true()


def test_an_answer_is_cut_off_at_its_deadline(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=10_000, seconds=0.1))
    choice = running.client().completions.create(
        model=NAME, prompt="One", max_tokens=10_000, extra_body={"ignore_eos": True}
    )
    assert choice.choices[0].finish_reason == "length"
    # The context ends it too, where the machine is quick.
    assert set(running.service.engine.figures.done) <= {"deadline", "context"}


def test_what_only_waited_until_its_deadline_is_no_answer(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=10_000, seconds=0.5), slots=1)
    engine, body = running.service.engine, {"model": NAME, "prompt": "One", "max_tokens": 10_000, "ignore_eos": True}
    step = engine.scheduler.step

    def slow() -> Any:
        time.sleep(0.1)
        return step()

    engine.scheduler.step = slow
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: running.post("/v1/completions", body), range(2))
    cut, none = sorted((first, second), key=lambda response: response.status_code)
    assert cut.status_code == 200 and cut.json()["choices"][0]["finish_reason"] == "length"
    assert none.status_code == 503 and "0.5 seconds" in none.json()["error"]["message"]
    assert engine.figures.done == {"deadline": 2}


def test_an_end_that_is_to_be_ignored_is(serve: Callable[..., Any]) -> None:
    running = serve()
    client = running.client()
    bias: Any = {"2": 100}  # a token that ends texts
    ended = client.completions.create(model=NAME, prompt="One", max_tokens=5, temperature=0, logit_bias=bias)
    assert ended.usage.completion_tokens == 0 and ended.choices[0].finish_reason == "stop"
    on = client.completions.create(
        model=NAME, prompt="One", max_tokens=5, temperature=0, logit_bias=bias, extra_body={"ignore_eos": True}
    )
    assert on.usage.completion_tokens == 5 and on.choices[0].finish_reason == "length"


def test_what_is_known_of_a_prompt_is_told(serve: Callable[..., Any]) -> None:
    running = serve()
    ids = [5 + i % 300 for i in range(100)]
    usages = [
        running.client().completions.create(model=NAME, prompt=ids, max_tokens=2, temperature=0).usage for _ in range(2)
    ]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, 99]
    assert b"slm_reused_tokens_total 99.0" in running.service.metrics.text()


def test_a_client_that_does_not_read_holds_nobody_up(serve: Callable[..., Any]) -> None:
    """Its texts are generated, unread data waits in bounded memory, and after the time limit it is disconnected."""
    running = serve(Limits(new_tokens=10_000, patience_s=1), slots=4)
    host, port = running.url.removeprefix("http://").split(":")
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Hi."}],
        "stream": True,
        "n": 12,
        "ignore_eos": True,
    }
    sent = json.dumps(body | {"logprobs": True, "top_logprobs": 20, "max_tokens": 10_000}).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    slow.sendall(head + b"content-length: %d\r\n\r\n" % len(sent) + sent)
    slow.recv(100)  # it is being answered
    for _ in range(3):
        answer = running.client().completions.create(model=NAME, prompt="One", max_tokens=5, timeout=60)
        assert answer.choices[0].finish_reason in ("length", "stop")
    engine = running.service.engine
    assert wait_until(lambda: engine.figures.running == 0)
    assert engine.figures.done["context"] == 12  # all of its texts, to the end
    time.sleep(1.5)  # longer than the patience
    received = b""
    slow.settimeout(20)
    while more := slow.recv(1 << 20):
        received += more
    slow.close()
    assert len(received) > 1 << 16 and b"[DONE]" not in received  # it was cut off


@pytest.mark.parametrize("n", [1, 2])
def test_logs_say_nothing_of_the_text(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Neither prompts, completions and rejected input appear in the log, nor texts that a defect quotes."""
    from slm.serve import completions

    caplog.set_level("DEBUG")
    running = serve()
    client = running.client()
    long: Any = {"max_tokens": 16, "seed": 0, "extra_body": {"ignore_eos": True}}  # not ended by its first token
    text = client.completions.create(model=NAME, prompt=SECRET, n=n, **long).choices[0].text
    list(client.completions.create(model=NAME, prompt=SECRET, max_tokens=8, n=n, stream=True))
    running.post("/v1/completions", {"model": NAME, "prompt": SECRET, "n": SECRET})
    running.post("/v1/completions", {"model": NAME, "prompt": SECRET, SECRET: n})
    running.post("/v1/completions", {"model": SECRET, "prompt": SECRET})
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": SECRET}}}
    running.post("/v1/completions", {"model": NAME, "prompt": SECRET, "response_format": schema})

    def broken(request: Any, index: int) -> Any:
        raise RuntimeError(f"a defect with {SECRET}")

    monkeypatch.setattr(completions, "_sampling", broken)
    response = running.post("/v1/completions", {"model": NAME, "prompt": SECRET})
    assert response.status_code == 500 and SECRET not in response.text
    assert response.json()["error"]["type"] == "server_error"
    assert wait_until(lambda: '"status": 500' in caplog.text)  # a line comes when its answer is gone
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))]
    lines = [json.loads(record.getMessage()) for record in ours if record.name == "slm.serve"]
    assert [line["status"] for line in lines if "status" in line] == [200, 200, 400, 400, 404, 400, 500]
    assert all(line["path"] == "/v1/completions" and line["ms"] > 0 for line in lines if "status" in line)
    defects = [line for line in lines if "error" in line]
    assert len(defects) == 1 and defects[0]["error"] == "RuntimeError" and "completions.py" in str(defects[0]["at"])
    logged = "".join(f"{record.getMessage()}{record.exc_info}" for record in ours)
    assert SECRET not in logged and len(text) > 4 and text not in logged


def test_a_line_says_when_who_and_how_much(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    running = serve()
    client = running.client()
    options: Any = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    client.completions.create(**options, n=2)
    list(client.completions.create(**options, stream=True))
    gone = iter(client.completions.create(**options | {"max_tokens": 60}, stream=True))
    next(gone)
    gone.close()  # type: ignore[attr-defined]  # a stream of the client's
    running.post("/v1/completions", options | {"model": "<script>", "extra_body": None})
    httpx.get(f"{running.url}/{'x' * 5000}\u2028%0a")
    assert wait_until(lambda: caplog.text.count('"ms"') == 5)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "slm.serve"]
    for line in lines:
        assert abs(datetime.fromisoformat(line["time"]).timestamp() - time.time()) < 60 and line["time"].endswith("Z")
        assert len(line["request"]) == 32 and len(line["path"]) <= 201
    by_status = {status: [line for line in lines if line["status"] == status] for status in (200, 400, 404)}
    whole, stream, cut = by_status[200]
    assert (whole["model"], whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reason"]) == (
        NAME, 3, 8, "length",
    )  # fmt: skip
    assert (stream["completion_tokens"], stream["finish_reason"]) == (4, "length")
    assert cut["completion_tokens"] <= 60 and set(cut["finish_reason"].split(",")) <= {"cancelled", "length"}
    assert all("model" not in line and "prompt_tokens" not in line for line in by_status[400] + by_status[404])


def test_a_defect_harms_nobody_else(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from slm.serve import completions

    running = serve()

    def broken(request: Any, index: int) -> Any:
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(openai.InternalServerError):
        patch.setattr(completions, "_sampling", broken)
        running.client().completions.create(model=NAME, prompt="x", max_tokens=1)
    assert running.client().completions.create(model=NAME, prompt="x", max_tokens=1).choices
