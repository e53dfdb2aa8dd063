"""Shutdown: requests finish if they can, others end with an error, and the process ends in a bounded time."""

import asyncio
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.serve.service import Limits
from tests.forks import Forks, Started, forks
from tests.waiting import wait_for

NAME = "random"

# `slm serve` with steps that take a given time. A step waits as onnxruntime computes: without the interpreter's lock.
SLOW = """
import time
from slm.runtime.batch import Batch
step = Batch.step
def slow(batch, tokens):
    time.sleep(float(sys.argv[1]))
    return step(batch, tokens)
Batch.step = slow
main(["serve", *sys.argv[2:]])
"""
# And with an event loop that does not come back.
BLOCKED = """
import time
from slm.serve import app
def block(*_):
    print("blocked", file=sys.stderr, flush=True)
    time.sleep(1e6)
app.prompts_of = block
main(["serve", *sys.argv[2:]])
"""
# Started with nohup.
IGNORING = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SLOW
# Without onnxruntime, which has a thread.
IMPORTS = """
import fastapi, llguidance, numpy, prometheus_client, rich.progress, tokenizers, uvicorn
import slm.cli.commands.serve
from slm.cli.main import main
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, started: Started) -> None:
        self.started = started
        wait_for(lambda: "/v1\n" in self.said or not started.running)
        self.port = int(self.said.split("listening on http://127.0.0.1:")[1].partition("/")[0])

    @property
    def said(self) -> str:
        return self.started.err

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def complete(self, **fields: Any) -> tuple[int, bytes]:
        return self.ask(
            "/v1/completions", {"model": NAME, "prompt": "One", "max_tokens": 200, "ignore_eos": True, **fields}
        )

    def wait_for_requests(self, number: int) -> None:
        """Waits until so many completions were accepted."""
        wait_for(lambda: f"slm_requests_total {number}.0\n" in self.ask("/metrics")[1].decode())

    def send(self, number: signal.Signals) -> None:
        os.kill(self.started.pid, number)

    def ends(self) -> int:
        """Returns the exit code."""
        return self.started.wait(60).returncode


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts programs in a process that has imported the server."""
    with forks(IMPORTS, tmp_path_factory.mktemp("servers")) as starts:
        yield starts


@pytest.fixture
def start(shared_bundle: Bundle, ready: Forks) -> Iterator[Callable[..., Process]]:
    started: list[Started] = []

    def make(step_s: float, *options: str, program: str = SLOW) -> Process:
        arguments = (str(step_s), str(shared_bundle.path), "--port", "0", "--name", NAME, *options)
        started.append(ready.start(program, *arguments))
        return Process(started[-1])

    yield make
    for each in started:
        if not each.ended:
            os.kill(each.pid, signal.SIGKILL)
            each.wait()


def test_a_stuck_step_shows_and_the_process_ends_all_the_same(start: Callable[..., Process]) -> None:
    server = start(1e6, "--step-timeout", "1", "--grace", "1")
    assert server.ask("/health")[0] == server.ask("/ready")[0] == 200
    with ThreadPoolExecutor(3) as pool:
        whole, stream, waiting = pool.map(lambda fields: server.complete(**fields), ({}, {"stream": True}, {"n": 12}))
    assert whole[0] == waiting[0] == 503 and "stuck" in json.loads(whole[1])["error"]["message"]
    assert stream[0] == 200 and "stuck" in json.loads(stream[1].split(b"data: ")[-1])["error"]["message"]
    for path in ("/health", "/ready"):
        status, body = server.ask(path)
        assert status == 503 and "stuck" in json.loads(body)["status"]
    status, body = server.complete()  # nothing is put behind a stuck step
    assert status == 503 and "stuck" in json.loads(body)["error"]["message"]
    server.send(signal.SIGTERM)
    assert server.ends() == 128 + signal.SIGTERM and "Traceback" not in server.said


def test_deadlines_fire_while_a_step_is_stuck(start: Callable[..., Process]) -> None:
    server = start(1e6, "--timeout", "1", "--step-timeout", "60", "--slots", "1", "--grace", "1")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: server.complete(), range(2)))
    # The first has its first token, which the prompt gives; the second never had a slot. A stuck step would end both.
    assert sorted(status for status, _ in found) == [200, 503]
    assert server.ask("/health")[0] == 200  # a minute is what was asked for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_answers_that_take_too_long_end_with_an_error(start: Callable[..., Process], number: signal.Signals) -> None:
    """In the envelope for whole responses, as an event in streams; includes queued requests and a half-sent body."""
    server = start(0.05, "--grace", "1", "--slots", "2")
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.complete, stream=bool(i % 2)) for i in range(5)]
        quick = pool.submit(server.complete, max_tokens=3)
        half = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        half.putrequest("POST", "/v1/completions")
        half.putheader("content-length", "100")
        half.putheader("expect", "100-continue")
        half.endheaders()
        assert select.select([half.sock], [], [], 60)[0]  # the server reads the body
        half.send(b"{")
        server.wait_for_requests(6)
        server.send(number)
        code = server.ends()
        answers = [each.result() for each in asked]
        quick.result()
    assert code == 128 + number
    for index, (status, body) in enumerate(answers):
        assert status == (200 if index % 2 else 503)
        error = json.loads(body.split(b"data: ")[-1])["error"]
        assert error["type"] == "server_error" and "shutting down" in error["message"]
    answer = half.getresponse()
    assert answer.status == 503 and "shutting down" in json.load(answer)["error"]["message"]
    assert "Traceback" not in server.said and "Internal Server Error" not in server.said
    lines = [json.loads(line) for line in server.said.splitlines() if line.startswith("{")]
    assert {line["status"] for line in lines} <= {200, 503} and server.said.endswith("stopped\n")


def test_answers_that_can_be_finished_are(start: Callable[..., Process]) -> None:
    server = start(0.02, "--grace", "90")
    with ThreadPoolExecutor(2) as pool:
        whole, stream = (pool.submit(server.complete, max_tokens=60, stream=each) for each in (False, True))
        server.wait_for_requests(2)
        server.send(signal.SIGTERM)
        code = server.ends()
        status, body = whole.result()
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 60
        assert stream.result()[1].endswith(b"data: [DONE]\n\n")
    assert code == 128 + signal.SIGTERM  # before the grace period ends, for which `ends` would not wait
    assert "\nstopping: 2 requests have up to 90 s to finish; press Ctrl-C again to end immediately\n" in server.said


def cut_off(server: Process) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        server.complete()


def test_an_event_loop_that_is_held_up_ends_too(start: Callable[..., Process]) -> None:
    server = start(0.0, "--grace", "1", program=BLOCKED)
    thread = threading.Thread(target=cut_off, args=(server,))
    thread.start()
    wait_for(lambda: "blocked\n" in server.said)
    server.send(signal.SIGTERM)
    code = server.ends()
    assert code == 128 + signal.SIGTERM and server.said.endswith("did not end in time\n")
    thread.join(10)


def test_a_second_ctrl_c_ends_at_once(start: Callable[..., Process]) -> None:
    server = start(0.1, "--grace", "90")
    thread = threading.Thread(target=cut_off, args=(server,))
    thread.start()
    server.wait_for_requests(1)
    server.send(signal.SIGINT)
    time.sleep(0.1)
    server.send(signal.SIGINT)  # a wrapper passed the first one on
    time.sleep(1)
    assert server.started.running
    server.send(signal.SIGINT)
    code = server.ends()
    assert code == 130 and "Traceback" not in server.said
    thread.join(10)


def test_a_closed_terminal_does_not_end_what_nohup_started(start: Callable[..., Process]) -> None:
    server = start(0.0, program=IGNORING)
    server.send(signal.SIGHUP)
    time.sleep(0.5)
    assert server.ask("/ready")[0] == 200


def test_a_request_that_waits_for_something_else_ends_too(serve: Callable[..., Any], monkeypatch: Any) -> None:
    """For example a thread that processes its text: the client receives an error in any case."""
    from slm.serve import app

    asked_for, released = threading.Event(), threading.Event()

    async def stuck(*_: Any) -> Any:
        asked_for.set()
        await asyncio.to_thread(released.wait, 20)

    monkeypatch.setattr(app, "prompts_of", stuck)
    running = serve(grace_s=0.2)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, "/v1/completions", {"model": NAME, "prompt": "One"})
        assert asked_for.wait(60)
        running.ask_to_stop()
        response = asked.result(timeout=60)
    released.set()
    assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]


def test_a_stream_that_nobody_ends_is_ended(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the engine does not end its texts, the server ends their requests."""
    running = serve(Limits(new_tokens=10_000), grace_s=0.3)
    service, engine = running.service, running.service.engine
    monkeypatch.setattr(service, "stop", lambda: setattr(service, "stopping", True))
    step = engine.scheduler.step

    def slow() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(engine.scheduler, "step", slow)
    body = {"model": NAME, "prompt": "One", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, "/v1/completions", body)
        wait_for(lambda: engine.figures.new_tokens > 5)
        running.ask_to_stop()
        response = asked.result(timeout=60)
    *pieces, last = response.text.removesuffix("\n\n").split("\n\n")
    assert response.status_code == 200 and len(pieces) > 3
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_closed_standard_streams(shared_bundle: Bundle) -> None:
    """Neither sockets nor files get their descriptors."""
    program = (
        "import os, sys\n"
        "for number in range(3): os.close(number)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'slm', 'serve', {str(shared_bundle.path)!r}, '--port', "
        "sys.argv[1], '--name', 'm'])\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", program, str(port)])
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        assert [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)] == [os.devnull] * 3  # noqa: PTH115
    finally:
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM


def test_requests_are_refused_while_answers_under_way_go_on(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=10_000), grace_s=20)
    engine = running.service.engine
    running.service.stop()
    assert running.post("/v1/completions", {"model": NAME, "prompt": "One"}).status_code == 503
    assert engine.unavailable == "the server is shutting down"
