"""Expensive schemas: each is rejected, or slows down only its own completion."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from slm.core import child
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime import schema_check
from slm.runtime.constraint import Busy, GrammarConstraint, Grammars
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Request, Result
from slm.runtime.sampling import Sampling
from slm.runtime.schema_check import MAX_SECONDS
from slm.serve.engine import Engine

STEP: dict[str, Any] = {
    "title": "Step",
    "type": "object",
    "properties": {"explanation": {"title": "Explanation", "type": "string"}, "output": {"type": "string"}},
    "required": ["explanation", "output"],
    "additionalProperties": False,
}
# What pydantic makes of ordinary models, and what people write.
ORDINARY: dict[str, Any] = {
    "pydantic": {
        "$defs": {"Step": STEP, "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"}},
        "type": "object",
        "properties": {
            "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
            "color": {"$ref": "#/$defs/Color"},
            "size": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
            "when": {"format": "date-time", "type": "string"},
            "scores": {"additionalProperties": {"type": "number"}, "type": "object"},
        },
        "required": ["steps", "color", "when", "scores"],
        "additionalProperties": False,
    },
    "enum": {"enum": [f"choice {i} of many" for i in range(1000)]},
    "optional": {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(60)}},
    "tree": {
        "$defs": {"node": {"type": "object", "properties": {"next": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
        "$ref": "#/$defs/node",
    },
    "patterns": {
        "type": "object",
        "properties": {
            "phone": {"type": "string", "pattern": "^\\+?[0-9]{7,15}$"},
            "email": {"type": "string", "format": "email"},
            "id": {"type": "string", "format": "uuid"},
        },
        "patternProperties": {"^x-[a-z]+$": {"type": "string"}},
    },
}  # fmt: skip
NESTED: list[Any] = []
for _ in range(150):
    NESTED = [NESTED]
EXPENSIVE: dict[str, Any] = {
    "optional characters": {"type": "string", "pattern": "^" + ".?" * 10_000 + "$"},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": m} for m in (7, 11, 13, 17, 19, 23)]},
    "pairs of patterns": {"patternProperties": {f"^a{{{i}}}b$": {"type": "string"} for i in range(1, 300)}},
    "products": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(40)]},
    "ref to itself": {"$ref": "#"},
    "long": {"enum": ["x" * 70_000]},
    "deep": {"items": {"items": {"items": {"const": NESTED}}}},
    "look-ahead": {"type": "string", "pattern": "^(?=.*a)(?=.*b).*$"},
    "infinite": {"type": "number", "maximum": float("inf")},
}


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, 320, (0, 2))
    yield made
    made.close()


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schemas_are_followed(grammars: Grammars, name: str) -> None:
    first, second = grammars.json(ORDINARY[name], 2)
    for constraint in (first, second):
        allowed = constraint.allowed()
        assert allowed.shape == (320,) and 0 < allowed.sum() < 100
    assert grammars.json(None)[0].allowed().any()


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_schemas_are_refused(grammars: Grammars, name: str) -> None:
    grammars.json({"type": "boolean"})  # the process that tries them has started
    used = time.process_time()
    with pytest.raises(SlmError, match="not supported"):
        grammars.json(EXPENSIVE[name])
    # Of this process; the other one may take its limit.
    assert time.process_time() - used < MAX_SECONDS
    with pytest.raises(SlmError, match="not supported"):
        grammars.json(EXPENSIVE[name])
    assert grammars.json({"type": "boolean"})[0].allowed().any()


def test_a_process_that_was_killed_is_started_again(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, 320, (0, 2))
    grammars.json({"type": "boolean"})
    checker = grammars._checker
    assert checker is not None
    checker.kill()
    checker.wait()
    assert grammars.json({"type": "integer"})[0].allowed().any()
    second = grammars._checker
    grammars.close()
    assert second is not None and second.poll() is not None and checker.poll() is not None


def test_a_process_that_does_not_start_is_not_the_schemas_fault(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same schema is compiled once the process can start again."""
    grammars, popen = Grammars(tokenizer, 320, (0, 2)), child.popen

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    for broken in (fail, lambda *_, **options: popen("raise SystemExit", **options)):
        monkeypatch.setattr(child, "popen", broken)
        with pytest.raises(Busy, match="has ended"):
            grammars.json({"type": "integer"})
    monkeypatch.setattr(child, "popen", popen)
    assert grammars.json({"type": "integer"})[0].allowed().any()
    grammars.close()
    with pytest.raises((Busy, RuntimeError)):
        grammars.json({"type": "string"})


def test_a_schema_that_waits_for_something_is_given_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process may wait for a thread that it does not have, which uses no processor time."""
    made = schema_check.tokenizer_of({"tokenizer": tokenizer.backend.to_str(), "size": 320, "stops": [0, 2]})
    monkeypatch.setattr(schema_check, "_MOST_WAITING_S", 0.2)
    monkeypatch.setattr(schema_check, "grammar_of", lambda schema: time.sleep(60))
    assert "takes more than" in (schema_check._tried("{}", made) or "")
    monkeypatch.setattr(schema_check, "grammar_of", lambda schema: 1 / 0)
    monkeypatch.setattr(schema_check, "_MOST_WAITING_S", 20.0)
    assert "ZeroDivisionError" in (schema_check._tried("{}", made) or "")


def test_so_many_may_wait(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, free, compiled = Grammars(tokenizer, 320, (0, 2)), threading.Event(), Grammars._compiled

    def slow(self: Grammars, schema: str) -> Any:
        free.wait(60)
        return compiled(self, schema)

    monkeypatch.setattr(Grammars, "_compiled", slow)
    waiting = [grammars.submit({"type": "boolean"}) for _ in range(16)]
    with pytest.raises(Busy):
        grammars.submit({"type": "boolean"})
    assert waiting.pop().cancel()  # a client that has gone makes room
    waiting.append(grammars.submit({"type": "boolean"}))
    free.set()
    assert all(future.result(60) for future in waiting)
    assert grammars.json({"type": "boolean"})
    grammars.close()


class Burning:
    """A matcher that takes the processor's time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def compute_bitmask(self) -> bytes:
        until = time.thread_time() + self._seconds
        while time.thread_time() < until:
            pass
        return b"\xff" * 40

    def consume_token(self, token: int) -> bool:
        return True

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, None), (0.04, 8), (0.5, 0)])
def test_masks_have_a_budget(seconds: float, steps: int | None) -> None:
    matcher: Any = Burning(seconds)
    constraint, done = GrammarConstraint(matcher, 320), 0
    try:
        for _ in range(100):
            constraint.allowed()
            constraint.accept(5)
            done += 1
    except SlmError as error:
        assert "too long" in error.message
    assert done == 100 if steps is None else done <= steps


class Slow:
    """A constraint that allows every token, each after a while."""

    def __init__(self, seconds: float, tokens: int | None = None, fails: bool = False) -> None:
        self._seconds, self._left, self._fails = seconds, tokens, fails

    def allowed(self) -> Any:
        time.sleep(self._seconds)
        return np.ones(320, bool)

    def accept(self, token: int) -> bool:
        if self._fails:
            raise SlmError("too much")
        if self._left is not None:
            self._left -= 1
        return self._left == 0


class Heard:
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._done = threading.Event()
        self.end: Result | None = None

    def __call__(self, event: Any) -> None:
        if isinstance(event, Result):
            self.end = event
            self._done.set()
        elif event.token is not None:
            self.times.append(time.monotonic())
            self.tokens.append(event.token)

    def reason(self) -> str:
        assert self._done.wait(60) and self.end is not None
        return self.end.stopped


@pytest.fixture
def engine(shared_bundle: Bundle) -> Iterator[Engine]:
    made = Engine(OnnxDecoder(shared_bundle), Tokenizer.load(shared_bundle.path), slots=4)
    yield made
    made.close()


def asked(engine: Engine, new: int, constraint: Any = None) -> Heard:
    heard = Heard()
    engine.submit(Request((5, 6, 7), Sampling(temperature=0), new, constraint=constraint), heard)
    return heard


def test_a_slow_constraint_holds_nobody_else_up(engine: Engine) -> None:
    alone = asked(engine, 60)
    assert alone.reason() == "length"
    slow = asked(engine, 4, Slow(0.4))
    beside = asked(engine, 60)
    assert beside.reason() == "length" and beside.tokens == alone.tokens
    assert len(slow.times) <= 1  # 60 tokens took less than two masks
    assert slow.reason() == "length" and slow.tokens == alone.tokens[:4]  # late, and the same


def test_how_constrained_texts_end(engine: Engine) -> None:
    for seconds in (0.0, 0.05):
        complete = asked(engine, 10, Slow(seconds, tokens=3))
        last = asked(engine, 3, Slow(seconds, tokens=3))  # complete with the last token that it may have
        failed = asked(engine, 10, Slow(seconds, fails=True))
        assert (complete.reason(), len(complete.tokens)) == ("end", 3)
        assert (last.reason(), len(last.tokens)) == ("end", 3)
        assert failed.reason() == "error" and failed.end is not None and failed.end.error == "too much"
    full = asked(engine, 1000, Slow(0.0))
    assert full.reason() == "context"


def test_answers_come_before_schemas(tokenizer: Tokenizer) -> None:
    """The process that checks schemas has a low priority."""
    grammars = Grammars(tokenizer, 320, (0, 2))
    grammars.json({"type": "boolean"})
    assert grammars._checker is not None
    assert os.getpriority(os.PRIO_PROCESS, grammars._checker.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    grammars.close()


def test_the_server_refuses_and_goes_on(serve: Callable[..., Any]) -> None:
    running = serve()
    for schema, status in ((EXPENSIVE["multiples"], 400), (ORDINARY["pydantic"], 200)):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"prompt": "a", "max_tokens": 4, "response_format": form}
        response = running.post("/v1/completions", body)
        assert response.status_code == status
        if status == 400:
            assert response.json()["error"]["param"] == "response_format"
