"""Continuous batching: every text equals the text that its request gets alone, whichever texts join and leave."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Piece, Request, Result
from slm.runtime.sampling import Sampling
from slm.serve.engine import Engine
from slm.serve.queue import Full
from tests.runtime.texts import completed

GREEDY = Sampling(temperature=0)
PATIENCE_S = 60


class Listener:
    """Collects the events of a text."""

    def __init__(self) -> None:
        self.events: Queue[Piece | Result] = Queue()
        self.pieces: list[Piece] = []

    def __call__(self, event: Piece | Result) -> None:
        self.events.put(event)

    def done(self) -> Result:
        while True:
            event = self.events.get(timeout=PATIENCE_S)
            if isinstance(event, Result):
                return event
            self.pieces.append(event)

    def next(self) -> Piece:
        event = self.events.get(timeout=PATIENCE_S)
        assert isinstance(event, Piece)
        self.pieces.append(event)
        return event

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces if piece.token is not None]


@pytest.fixture
def start(shared_bundle: Bundle) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engine = Engine(OnnxDecoder(shared_bundle), Tokenizer.load(shared_bundle.path), **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def ask(
    engine: Engine, prompt: Sequence[int], deadline: float | None = None, **fields: Any
) -> tuple[Generation, Listener]:
    listener = Listener()
    request = Request(prompt, **{"sampling": GREEDY, "max_new_tokens": 12} | fields)
    return engine.submit(request, listener, deadline=deadline), listener


def alone(
    bundle: Bundle, prompt: Sequence[int], sampling: Sampling = GREEDY, new: int = 12, stop: Sequence[int] = ()
) -> list[int]:
    return completed(OnnxDecoder(bundle), prompt, sampling, new, stop).tokens


def prompts(bundle: Bundle, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(5, bundle.config.vocab_size, length).tolist() for length in lengths]


def test_texts_that_come_and_go_are_what_they_are_alone(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(slots=3, prefill_tokens=8)
    lengths = [5, 30, 1, 17, 9, 40, 3, 22]
    asked = prompts(shared_bundle, lengths)
    samplings = [GREEDY if i % 2 else Sampling(seed=i, temperature=0.9) for i in range(len(asked))]
    listeners = []
    for i, (prompt, sampling) in enumerate(zip(asked, samplings, strict=True)):
        listeners.append(ask(engine, prompt, sampling=sampling, max_new_tokens=6 + i)[1])
        time.sleep(0.002 * (i % 3))
    for i, (prompt, sampling, listener) in enumerate(zip(asked, samplings, listeners, strict=True)):
        done = listener.done()
        assert (done.stopped, done.prompt_tokens, len(done.tokens)) == ("length", len(prompt), 6 + i)
        assert listener.tokens == alone(shared_bundle, prompt, sampling, 6 + i)
    figures = engine.figures
    assert figures.asked == len(asked) and figures.done == {"length": len(asked)}
    assert figures.rows > figures.steps  # some were taken together


def test_a_long_prompt_does_not_hold_others_up(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    """While one prompt is read in pieces, the other text continues: each piece delays it by at most one token."""
    engine = start(slots=2, prefill_tokens=4, prefix_bytes=0)
    short, long = prompts(shared_bundle, [2, 48])
    _, first = ask(engine, short, max_new_tokens=40)
    first.next()
    order: list[str] = []
    batch = engine.scheduler.batch
    read, step = batch.read, batch.step

    def reading(*arguments: Any, **options: Any) -> Any:
        order.append("read")
        return read(*arguments, **options)

    def stepping(tokens: Any) -> Any:
        order.append("step")
        return step(tokens)

    batch.read, batch.step = reading, stepping  # type: ignore[method-assign]
    _, second = ask(engine, long, max_new_tokens=2)
    second.done()
    first.done()
    reads = [i for i, what in enumerate(order) if what == "read"]
    assert len(reads) >= 10  # 48 tokens, at most four at a time; the first may have gone before
    assert all(order[i + 1] == "step" for i in reads)
    assert first.tokens == alone(shared_bundle, short, new=40)


def test_short_prompts_are_read_between_the_same_steps(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    """Short prompts whose sum fits into one piece are read together and take their first step together."""
    engine = start(slots=5, prefill_tokens=10, prefix_bytes=0)
    order: list[int] = []
    step = engine.scheduler.batch.step

    def stepping(tokens: Any) -> Any:
        order.append(len(tokens))
        return step(tokens)

    hold, begun = threading.Event(), threading.Event()
    engine.scheduler.batch.step = stepping  # type: ignore[method-assign]
    first, *short = prompts(shared_bundle, [3, 4, 4, 4, 4])

    def held(event: Piece | Result) -> None:
        begun.set()
        hold.wait(PATIENCE_S)

    engine.submit(Request(first, GREEDY, 1), held)
    begun.wait(PATIENCE_S)
    listeners = [ask(engine, prompt, max_new_tokens=3)[1] for prompt in short]
    hold.set()
    for prompt, listener in zip(short, listeners, strict=True):
        listener.done()
        assert listener.tokens == alone(shared_bundle, prompt, new=3)
    assert order == [2, 4, 2]  # two prompts, a step of theirs; two more, a step of all; the last of the later two


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(
    start: Callable[..., Engine], shared_bundle: Bundle
) -> None:
    engine = start(slots=2, prefill_tokens=4, prefix_bytes=0)
    first, long, short = prompts(shared_bundle, [3, 60, 3])
    hold = threading.Event()
    engine.submit(Request(first, GREEDY, 1), lambda event: hold.wait(PATIENCE_S) and None)  # until the others are there
    order: list[str] = []
    listeners = []
    for name, prompt in (("long", long), ("short", short)):
        listener = Listener()

        def told(event: Piece | Result, name: str = name, listener: Listener = listener) -> None:
            order.append(name)
            listener(event)

        engine.submit(Request(prompt, GREEDY, 3), told)
        listeners.append((prompt, listener))
    hold.set()
    for prompt, listener in listeners:
        listener.done()
        assert listener.tokens == alone(shared_bundle, prompt, new=3)
    assert order == sorted(order, reverse=True)  # all of the short one first


def test_stop_tokens_stop_texts_and_contexts_end_a_text(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    (prompt,) = prompts(shared_bundle, [6])
    tokens = alone(shared_bundle, prompt)
    tokenizer = Tokenizer.load(shared_bundle.path)
    _, listener = ask(start(), prompt, stop_tokens=[tokens[4]])
    assert listener.done().stopped == "end" and listener.tokens == alone(shared_bundle, prompt, stop=[tokens[4]])
    text = tokenizer.decode(alone(shared_bundle, prompt, new=40))
    cut = next(text[i : i + 2] for i in range(3, len(text) - 2) if "�" not in text[i : i + 2])
    _, listener = ask(start(), prompt, stop=(cut,), max_new_tokens=40)
    assert listener.done().stopped == "stop"
    assert "".join(piece.text for piece in listener.pieces) == text[: text.index(cut)]
    context = shared_bundle.manifest.context
    _, listener = ask(start(), prompt, max_new_tokens=10 * context)
    done = listener.done()
    assert done.stopped == "context" and len(done.tokens) == context - len(prompt) + 1


def test_a_text_nobody_wants_any_more_frees_its_slot(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(slots=1)
    first, second = prompts(shared_bundle, [4, 5])
    text, listener = ask(engine, first, max_new_tokens=shared_bundle.manifest.context)
    listener.next()
    _, other = ask(engine, second)
    engine.cancel(text)
    assert listener.done().stopped == "cancelled"
    assert other.done().stopped == "length" and other.tokens == alone(shared_bundle, second)


def test_a_listener_that_fails_harms_nobody_else(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(slots=2)
    first, second = prompts(shared_bundle, [4, 5])

    def gone(event: Piece | Result) -> None:
        raise ConnectionResetError

    engine.submit(Request(first, GREEDY, 50), gone)
    _, other = ask(engine, second)
    assert other.done().stopped == "length" and other.tokens == alone(shared_bundle, second)
    assert engine.failed is None


def test_deadlines_end_those_that_wait_and_those_under_way(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(slots=1)
    first, second = prompts(shared_bundle, [4, 5])
    text, running = ask(engine, first, max_new_tokens=shared_bundle.manifest.context)
    running.next()
    _, waiting = ask(engine, second, deadline=time.monotonic())
    assert waiting.done().stopped == "deadline" and not waiting.pieces
    engine.cancel(text)
    _, late = ask(engine, first, max_new_tokens=shared_bundle.manifest.context, deadline=time.monotonic() + 0.02)
    assert late.done().stopped in ("deadline", "context")


def test_when_the_queue_is_full_more_are_refused(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(slots=1, queue=2)
    (prompt,) = prompts(shared_bundle, [4])
    hold = threading.Event()
    first = Listener()

    def slow(event: Piece | Result) -> None:
        first(event)
        hold.wait(PATIENCE_S)

    engine.submit(Request(prompt, GREEDY, 3), slow)
    first.next()  # under way, and held up
    others = [ask(engine, prompt)[1] for _ in range(2)]
    with pytest.raises(Full):
        ask(engine, prompt)
    assert engine.expected_wait_s() >= 1
    hold.set()
    for other in others:
        assert other.done().stopped == "length"
    assert engine.figures.refused == 1


def test_prompts_that_begin_alike_are_not_read_again(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start(prefill_tokens=32)
    length = min(90, shared_bundle.manifest.context - 20)
    beginning, end = prompts(shared_bundle, [length, 6])
    _, first = ask(engine, beginning)
    assert first.done().reused_tokens == 0
    for prompt, reused in (([*beginning, *end], length - 1), (beginning, length - 1), (beginning[: length // 2], 0)):
        _, listener = ask(engine, prompt)
        assert listener.done().reused_tokens == reused
        assert listener.tokens == alone(shared_bundle, prompt)
    assert engine.figures.reused_tokens == 2 * (length - 1) and engine.figures.cache_bytes > 0


def test_a_constraint_decides_what_may_come(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    class Only:
        """Allows three tokens of one kind, and no other token."""

        def __init__(self) -> None:
            self.left = 3

        def allowed(self) -> np.ndarray:
            return np.arange(shared_bundle.config.vocab_size) == 42 + self.left

        def accept(self, token: int) -> bool:
            self.left -= 1
            return not self.left

    (prompt,) = prompts(shared_bundle, [4])
    _, listener = ask(start(), prompt, constraint=Only())
    assert listener.done().stopped == "end" and listener.tokens == [45, 44, 43]


def test_what_will_not_do_is_refused_at_once(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    engine = start()
    for prompt, fields in (
        ([], {}),
        ([shared_bundle.config.vocab_size], {}),
        ([1] * shared_bundle.manifest.context, {}),
        ([1], {"max_new_tokens": 0}),
        ([1], {"logprobs": -1}),
        ([1], {"stop": ("",)}),
    ):
        with pytest.raises(SlmError):
            ask(engine, prompt, **fields)
    assert engine.figures.asked == 0


def test_closing_lets_texts_finish_or_cuts_them_off(start: Callable[..., Engine], shared_bundle: Bundle) -> None:
    (prompt,) = prompts(shared_bundle, [4])
    engine = start()
    _, listener = ask(engine, prompt)
    engine.close(grace_s=PATIENCE_S)
    assert listener.done().stopped == "length"
    with pytest.raises(SlmError, match="shutting down"):
        ask(engine, prompt)
    engine = start()
    _, listener = ask(engine, prompt, max_new_tokens=shared_bundle.manifest.context)
    listener.next()
    engine.close()
    assert listener.done().stopped in ("cancelled", "context")


def test_a_defect_is_told_to_everybody(
    start: Callable[..., Engine], shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    (prompt,) = prompts(shared_bundle, [4])

    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine.scheduler, "step", broken)
    _, listener = ask(engine, prompt)
    done = listener.done()
    assert done.stopped == "error" and done.error is not None and "broken" not in done.error
    with pytest.raises(SlmError, match=r"RuntimeError at test_engine.py:\d+"):
        ask(engine, prompt)


def hold_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes steps wait for an event, as if onnxruntime did not return."""
    go_on, step = threading.Event(), engine.scheduler.batch.step

    def held_up(tokens: Any) -> Any:
        assert go_on.wait(PATIENCE_S)
        return step(tokens)

    monkeypatch.setattr(engine.scheduler.batch, "step", held_up)
    return go_on


def test_a_step_that_does_not_return_is_noticed(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client receives an error and nothing after it; once the step returns, the engine continues."""
    engine = start(slots=1, step_timeout_s=0.4)
    go_on = hold_up(engine, monkeypatch)
    (_, running), (_, waiting) = ask(engine, [5, 6, 7]), ask(engine, [8, 9])
    for listener in (running, waiting):
        done = listener.done()
        assert done.stopped == "stalled" and done.error is not None and "stuck" in done.error
        assert 0.3 < done.took_s < 5
    assert engine.stalled is not None and engine.unavailable == engine.stalled
    with pytest.raises(SlmError, match="stuck"):
        ask(engine, [5])
    assert engine.figures.done == {"stalled": 2}
    go_on.set()
    until = time.monotonic() + PATIENCE_S
    while engine.unavailable and time.monotonic() < until:
        time.sleep(0.01)
    _, after = ask(engine, [5, 6, 7])
    assert after.done().stopped == "length" and len(after.tokens) == 12
    assert running.events.empty() and engine.scheduler.free == 1  # its slot is free again


def test_a_slow_prompt_of_many_pieces_is_not_stuck(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit holds for one piece, not for a whole prompt."""
    engine = start(step_timeout_s=0.5, prefill_tokens=16)
    read = engine.scheduler.batch.read

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.15)
        return read(*arguments, **options)

    monkeypatch.setattr(engine.scheduler.batch, "read", slow)
    _, listener = ask(engine, [5 + i % 300 for i in range(120)], max_new_tokens=2)
    done = listener.done()
    assert done.stopped == "length" and done.took_s > 1


def test_deadlines_hold_while_a_step_does_not_return(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(slots=1, step_timeout_s=PATIENCE_S)
    go_on = hold_up(engine, monkeypatch)
    _, running = ask(engine, [5, 6, 7], deadline=time.monotonic() + 0.5)
    _, waiting = ask(engine, [8, 9], deadline=time.monotonic() + 0.5)
    _, patient = ask(engine, [8, 9])
    for listener in (running, waiting):
        assert listener.done().stopped == "deadline"
    assert engine.unavailable is None and patient.events.empty()
    go_on.set()
    assert patient.done().stopped == "length"


def test_closing_ends_texts_though_a_step_does_not_return(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(slots=1, step_timeout_s=PATIENCE_S)
    go_on = hold_up(engine, monkeypatch)
    listeners = [ask(engine, [5, 6, 7])[1] for _ in range(3)]
    began = time.monotonic()
    assert engine.close(0.2) is False and time.monotonic() - began < 5
    assert [listener.done().stopped for listener in listeners] == ["cancelled"] * 3
    go_on.set()
    assert engine.close() is True
