"""Child processes whose limits the parent watches, because the system does not enforce them."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from slm.core import bounded, template
from slm.core.bounded import BoundedProcess, Limits
from slm.core.errors import SlmError
from tests.core.test_template import BAD, CONVERSATION

# Without a timer of processor time and `resource`, as on Windows; macOS lacks the limit of memory alone.
WITHOUT = {
    # The standard library is imported first: since Python 3.13, parts of it import modules that only a real Windows has.
    "windows": "import shutil, signal, subprocess, sys\n"
    "del signal.setitimer; sys.modules['resource'] = None; sys.platform = 'win32'\n",
    "macos": "import sys; sys.platform = 'darwin'; import resource; set = resource.setrlimit\n"
    "def setrlimit(what, limits):\n    if what == resource.RLIMIT_AS: raise ValueError('current limit exceeds maximum limit')\n"
    "    set(what, limits)\nresource.setrlimit = setrlimit\n",
}
WORK = "from slm.core.template_worker import work; work()"
# Answers a message with what `eval` returns for it.
ECHO = """
import os, sys, time, json
from slm.core.bounded import hello, receive, send
hello({enforced})
kept = []
while (message := receive()) is not None:
    send(json.dumps(eval(message)).encode())
"""


@pytest.fixture(params=WITHOUT)
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Templates are rendered in processes of another system."""
    name = str(request.param)

    def start() -> BoundedProcess:
        return BoundedProcess(WITHOUT[name] + WORK, template._MAX_REPLY_BYTES, 60)

    template._PROCESSES.close()
    monkeypatch.setattr(template, "_start", start)
    monkeypatch.setattr(template, "MAX_SECONDS", 0.4)
    yield name
    template._PROCESSES.close()


@pytest.fixture
def started() -> Iterator[Callable[..., BoundedProcess]]:
    processes = []

    def start(enforced: list[str] | None = None) -> BoundedProcess:
        processes.append(BoundedProcess(ECHO.format(enforced=enforced or []), 1 << 20, 60))
        return processes[-1]

    yield start
    for each in processes:
        each.end()


def asked(process: BoundedProcess, question: str, limits: Limits) -> Any:
    process.send(question.encode(), limits)
    return json.loads(process.receive(limits))


# One for each way to take too much: loops, a call into C, a text, a list, many objects, compilation, recursion.
COSTLY = (
    "loops that never end",
    "a text repeated",
    "a list repeated",
    "a number without end",
    "a text doubled",
    "a text formatted",
    "a list of itself, printed",
    "a list cut up, while compiling",
    "lists kept",
    "a call of itself",
)


@pytest.mark.parametrize("name", COSTLY)
def test_templates_that_cost_too_much_are_refused_on_every_system(elsewhere: str, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(SlmError, match="chat template"):
        template.render(BAD[name], CONVERSATION, {})
    assert time.monotonic() - started < template._MAX_WAIT_SECONDS + 2
    assert template.render("{{ messages[1].content }}", CONVERSATION, {}) == " What is <b>?\n"


def test_which_limits_are_left_to_the_parent(elsewhere: str) -> None:
    template.render("x", CONVERSATION, {})
    (process,) = template._PROCESSES._all
    assert process._enforced == ([] if elsewhere == "windows" else ["time"])


def test_a_process_that_grows_is_ended_before_it_is_large(
    started: Callable[..., BoundedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, limits, seen, used = started(), Limits(30, None, 200 << 20), [0.0], BoundedProcess._used

    def noted(self: BoundedProcess) -> tuple[float, float] | None:
        found = used(self)
        seen.append(found[1] if found else 0.0)
        return found

    monkeypatch.setattr(BoundedProcess, "_used", noted)
    assert asked(process, "kept.append(bytearray(1 << 20)) or len(kept)", limits) == 1
    with pytest.raises(OSError, match="has ended") as caught:
        asked(process, "[kept.append(bytearray(b'x') * (4 << 20)) or time.sleep(0.005) for _ in range(1000)]", limits)
    assert not isinstance(caught.value, TimeoutError) and not process.alive()
    assert 200 << 20 < max(seen) < 400 << 20


def test_memory_can_count_from_what_a_process_has(started: Callable[..., BoundedProcess]) -> None:
    process = started()
    assert (
        asked(process, "kept.append(bytearray(b'x') * (150 << 20)) or time.sleep(0.1)", Limits(30, None, 400 << 20))
        is None
    )
    more = Limits(30, None, 60 << 20, more=True)
    assert asked(process, "kept.append(bytearray(b'x') * (20 << 20)) or time.sleep(0.1)", more) is None
    with pytest.raises(OSError, match="has ended"):
        asked(process, "kept.append(bytearray(b'x') * (150 << 20)) or time.sleep(5)", more)


def test_processor_time_counts_for_each_message(started: Callable[..., BoundedProcess]) -> None:
    burn = "[None for end in [time.process_time() + {}] for _ in iter(lambda: time.process_time() < end, False)] and 7"
    process, limits = started(), Limits(30, 0.5)
    for _ in range(3):
        assert asked(process, burn.format(0.25), limits) == 7
    assert asked(process, "time.sleep(0.8)", limits) is None  # which takes no processor time
    with pytest.raises(OSError, match="has ended"):
        asked(process, burn.format(20), limits)


def test_time_on_the_clock(started: Callable[..., BoundedProcess]) -> None:
    for enforced in ([], ["time", "memory"]):
        process = started(enforced)
        assert asked(process, "3", Limits(0.5, 5, 1 << 30)) == 3
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            asked(process, "time.sleep(60)", Limits(0.3, 5, 1 << 30))
        assert time.monotonic() - begun < 10 and not process.alive()


def test_a_process_that_reads_nothing(started: Callable[..., BoundedProcess]) -> None:
    process = started()
    process.send(b"time.sleep(60)", Limits(30))
    with pytest.raises(TimeoutError):
        process.send(b" " * (4 << 20), Limits(0.3))


def test_what_the_system_enforces_is_not_watched(
    started: Callable[..., BoundedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil is not asked: a request costs no more than its message."""
    process = started(["time", "memory"])
    monkeypatch.setattr(BoundedProcess, "_used", lambda self: pytest.fail("it was watched"))
    assert asked(process, "time.sleep(0.1) or 5", Limits(30, 5, 1)) == 5


def test_a_process_that_cannot_be_watched_is_not_trusted(
    started: Callable[..., BoundedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = started()

    def denied(*_: object) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "memory_info", denied)
    with pytest.raises(OSError, match="has ended"):
        asked(process, "time.sleep(60)", Limits(30, 5, 1 << 30))


def test_a_long_answer_and_an_end(started: Callable[..., BoundedProcess]) -> None:
    with pytest.raises(OSError, match="too long"):
        asked(started(), "'x' * (2 << 20)", Limits(30))
    with pytest.raises(OSError, match="has ended"):
        asked(started(), "os._exit(3)", Limits(30))
    with pytest.raises(OSError, match=r"does not answer|has ended"):
        BoundedProcess("from slm.core.bounded import send; send(b'[]')", 1 << 20, 60)
    with pytest.raises(TimeoutError):
        BoundedProcess("import time; time.sleep(60)", 1 << 20, 0.3)


def test_threads_of_watchers_end_with_their_processes(started: Callable[..., BoundedProcess]) -> None:
    process = started()
    asked(process, "1", Limits(30))
    thread = process._thread
    assert thread is not None and thread.is_alive()
    process.end()
    thread.join(5)
    assert not thread.is_alive()
    assert bounded._LOOK_S <= 0.02
