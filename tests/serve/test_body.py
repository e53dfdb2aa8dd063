"""Expensive bodies: each is rejected for its first error, in little time and memory, outside the event loop."""

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from slm.serve import completions
from slm.serve.body import MOST_CONTAINERS, parsed, read
from slm.serve.errors import Refused
from slm.serve.requests import ChatRequest, CompletionRequest
from slm.serve.service import Limits

MOST = 1 << 20
# The machine of the tests is shared: 5 to 20 ms alone.
SECONDS = 0.5
MEMORY = 50 << 20


def filled(before: str, item: str, after: str) -> str:
    """Returns a body of a megabyte that repeats an item."""
    times = (MOST - len(before) - len(after)) // (len(item) + 1)
    return before + ",".join([item] * times) + after


def keyed(before: str, item: Callable[[int], str], after: str) -> str:
    return before + ",".join(map(item, range(60_000))) + after


CHAT, TEXT = ChatRequest, CompletionRequest
BOMBS: dict[str, tuple[type[Any], str, str | None]] = {
    "prompt_objects": (TEXT, filled('{"prompt":[', "{}", "]}"), "prompt"),
    "prompt_lists": (TEXT, filled('{"prompt":[', "[]", "]}"), "prompt.0"),
    "prompt_negative": (TEXT, filled('{"prompt":[', "-1", "]}"), "prompt.0"),
    "prompt_floats": (TEXT, filled('{"prompt":[', "1.5", "]}"), "prompt.0"),
    "prompt_long": (TEXT, filled('{"prompt":[', "5", "]}"), "prompt"),
    "prompt_texts": (TEXT, filled('{"prompt":[', '"é"', "]}"), "prompt"),
    "prompt_late": (TEXT, filled('{"prompt":[', "5", ",-1]}"), "prompt"),
    "prompt_deep": (TEXT, filled('{"prompt":[', '{"":' * 90 + "0" + "}" * 90, "]}"), "prompt"),
    "messages": (CHAT, filled('{"messages":[', "{}", "]}"), "messages.0.role"),
    "messages_numbers": (CHAT, filled('{"messages":[', "1", "]}"), "messages.0"),
    "messages_roles": (CHAT, filled('{"messages":[', '{"role":"x"}', "]}"), "messages.0.role"),
    "messages_good": (CHAT, filled('{"messages":[', '{"role":"user","content":""}', "]}"), "messages"),
    "parts": (CHAT, filled('{"messages":[{"role":"user","content":[', "{}", "]}]}"), "messages.0.content.0.type"),
    "stops": (TEXT, filled('{"prompt":"a","stop":[', "1", "]}"), "stop"),
    "unknown": (TEXT, keyed('{"prompt":"a",', lambda i: f'"x{i}":1', "}"), "x0"),
    "biases": (TEXT, keyed('{"prompt":"a","logit_bias":{', lambda i: f'"x{i}":1', "}}"), "logit_bias"),
    "metadata": (TEXT, filled('{"prompt":"a","metadata":[', "[[]]", "]}"), "metadata"),
    "number": (TEXT, '{"prompt":"a","seed":' + "9" * (MOST - 100) + "}", None),
    "exponent": (TEXT, '{"prompt":"a","temperature":1e999999}', "temperature"),
    "nan": (TEXT, '{"prompt":"a","temperature":NaN}', None),
    "nested": (TEXT, '{"prompt":' + "[" * (MOST // 2 - 50) + "]" * (MOST // 2 - 50) + "}", None),
    "surrogates": (TEXT, '{"prompt":"' + "\\ud800" * (MOST // 6 - 20) + '"}', "prompt"),
    "cut_off": (TEXT, '{"prompt":[' + "{}," * 300_000, "prompt"),
}


def refusal(kind: type[Any], body: str) -> dict[str, Any]:
    with pytest.raises(Refused) as caught:
        parsed(body.encode(), kind)
    error: dict[str, Any] = caught.value.body["error"]
    return error


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_its_size(name: str) -> None:
    kind, body, param = BOMBS[name]
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        error = refusal(kind, body)
        seconds.append(time.thread_time() - began)
    assert error["param"] == param, error
    assert min(seconds) < SECONDS
    tracemalloc.start()
    try:
        refusal(kind, body)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_large_requests_that_are_good() -> None:
    """Negative control: characters within texts do not count, nor does a long text."""
    code = '{"a": [1, 2, "\\\\"], "b": {}}\n' * 8000
    request = parsed(json.dumps({"prompt": code}).encode(), TEXT)
    assert request.prompt == code and code.count("{") > MOST_CONTAINERS / 2
    words = "Once upon a time, " * 50_000
    assert parsed(json.dumps({"prompt": words}).encode(), TEXT).prompt == words
    ids = [262_143] * 100_000
    assert parsed(json.dumps({"prompt": ids}).encode(), TEXT).prompt == ids
    messages = [{"role": "user", "content": [{"type": "text", "text": "A long story. " * 10}]}] * 4000
    assert len(parsed(json.dumps({"messages": messages}).encode(), CHAT).messages) == 4000
    schema = {"enum": [f"value {i}" for i in range(10_000)]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert parsed(json.dumps({"prompt": "a", "response_format": form}).encode(), TEXT).response_format is not None
    assert parsed(('{"prompt":"a","temperature":1.' + "9" * (MOST - 100) + "}").encode(), TEXT).temperature == 2
    assert parsed(b'\xef\xbb\xbf{"prompt": "a"}', TEXT).prompt == "a"  # as PowerShell sends it


class Connection:
    """A request whose body has come."""

    def __init__(self, body: str, **headers: str) -> None:
        self._body, self.headers = body.encode(), headers

    async def body(self) -> bytes:
        return self._body


async def longest_stall(work: Callable[[], Any]) -> float:
    """Returns the longest time for which a task held the event loop, in seconds."""
    gaps, clock = [0.0], time.perf_counter

    async def beat() -> None:
        last = clock()
        while True:
            await asyncio.sleep(0.001)
            gaps.append(clock() - last)
            last = clock()

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    await work()
    await asyncio.sleep(0.01)
    beating.cancel()
    return max(gaps)


def test_the_event_loop_is_not_held() -> None:
    async def ask() -> None:
        for kind, body, _ in BOMBS.values():
            connection: Any = Connection(body)
            try:
                await read(connection, kind)
            except Refused:
                continue

    async def hold() -> None:
        time.sleep(0.6)

    gc.freeze()  # as the command does: a collection would go through all that other tests have loaded
    try:
        assert asyncio.run(longest_stall(ask)) < 0.25  # 20 ms on a machine of its own
    finally:
        gc.unfreeze()
    assert asyncio.run(longest_stall(hold)) > 0.5  # the negative control


def test_compressed_bodies_are_refused() -> None:
    connection: Any = Connection("{}", **{"content-encoding": "gzip"})
    with pytest.raises(Refused) as caught:
        asyncio.run(read(connection, TEXT))
    assert caught.value.status == 415


def test_a_text_that_fits_into_no_context_is_not_cut_into_tokens(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    story = "Once upon a time. " * 50_000
    assert running.post("/v1/completions", {"prompt": "One day"}).status_code == 200
    monkeypatch.setattr(running.service.model.tokenizer.__class__, "encode", lambda *given: 1 / 0)
    for path, body in (
        ("/v1/completions", {"prompt": story}),
        ("/v1/completions", {"prompt": ["One day", story]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": story}]}),
    ):
        response = running.post(path, body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a sentence of forty characters, or so . " * 25] * 16},
        {"prompt": "a", "n": 16, "stop": ["字" * 1000 + str(i) for i in range(16)]},
        {"prompt": "a", "n": 16, "logit_bias": {str(i): 1 for i in range(100)}},
    ],
)
def test_what_is_long_together_is_read_beside_the_event_loop(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    """Each text is short, but one request has many of them. A request that is short in total stays on the event loop."""
    running = serve(slots=16)
    on_loop: list[bool] = []
    for name in ("_encoded", "_submit"):

        def seen(*given: Any, function: Any) -> Any:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                on_loop.append(False)
            else:
                on_loop.append(True)
            return function(*given)

        monkeypatch.setattr(completions, name, partial(seen, function=getattr(completions, name)))
    response = running.post("/v1/completions", body | {"max_tokens": 1})
    assert response.status_code in (200, 400) and False in on_loop, response.text
    on_loop.clear()
    assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert on_loop == [True, True]


def test_stop_texts_are_read_once_for_all_answers(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    alone = [
        running.post("/v1/completions", {"prompt": "a", "seed": 3 + i, "stop": ["e"], "max_tokens": 40}).json()
        for i in range(4)
    ]
    read = running.service.engine._stops.cache_info().misses
    body = {"prompt": "a", "seed": 3, "n": 4, "stop": ["e", "never"], "max_tokens": 40}
    together = running.post("/v1/completions", body).json()
    assert running.service.engine._stops.cache_info().misses == read + 1
    # And none of them knows what another one has seen.
    texts = [each["choices"][0]["text"] for each in alone]
    assert [each["text"] for each in together["choices"]] == texts and len(set(texts)) > 1


def test_a_large_answer_is_whole(serve: Callable[..., Any]) -> None:
    running = serve(Limits(new_tokens=200))
    body = {"prompt": "One day", "n": 8, "max_tokens": 100, "ignore_eos": True, "logprobs": 20}
    response = running.post("/v1/completions", body)
    assert int(response.headers["content-length"]) == len(response.content) > 1 << 18
    assert [len(choice["logprobs"]["tokens"]) for choice in response.json()["choices"]] == [100] * 8
