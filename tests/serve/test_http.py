"""The HTTP API, called by OpenAI's client and by hand-written requests."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import pytest

import slm
from slm.core.chat import chat_ids
from slm.core.manifest import Bundle
from slm.runtime.model import Model
from slm.runtime.sampling import Sampling
from slm.runtime.scheduler import Events
from slm.serve.service import Limits
from tests.runtime.texts import completed

NAME = "random"


def alone(bundle: Bundle, ids: list[int], new: int, **sampling: Any) -> str:
    model: Model = slm.load(bundle.path)
    return model.tokenizer.decode(completed(model.decoder, ids, Sampling(**sampling), new, model.stop_token_ids).tokens)


GREEDY = {"temperature": 0.0, "max_tokens": 12}


def test_completions_are_what_generating_gives(serve: Callable[..., Any], shared_bundle: Bundle) -> None:
    running = serve()
    client = running.client()
    ids = slm.load(shared_bundle.path).tokenizer.encode("The fox")
    wanted = alone(shared_bundle, ids, 12, temperature=0)
    answer = client.completions.create(model=NAME, prompt="The fox", **GREEDY)
    assert answer.choices[0].text == wanted and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    by_ids = client.completions.create(model=NAME, prompt=[ids, ids[:1]], **GREEDY)
    assert by_ids.choices[0].text == wanted and len(by_ids.choices) == 2
    seeded = client.completions.create(model=NAME, prompt="The fox", max_tokens=12, seed=5, temperature=0.9, n=2)
    for index, choice in enumerate(seeded.choices):
        sampling = {"temperature": 0.9, "seed": 5 + index, "top_p": 1.0, "top_k": 0}
        assert choice.text == alone(shared_bundle, ids, 12, **sampling)
    again = client.completions.create(model=NAME, prompt="The fox", max_tokens=12, seed=5, temperature=0.9, n=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in seeded.choices]


def test_chats_are_asked_in_the_turns_that_were_trained(running: Any, shared_bundle: Bundle) -> None:
    client = running.client()
    model = slm.load(shared_bundle.path)
    ids = chat_ids(model.tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}])
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, logprobs=True, top_logprobs=3, **GREEDY)
    assert answer.choices[0].message.content == alone(shared_bundle, ids, 12, temperature=0)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None and len(scores.content) == 12
    for entry in scores.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_answer(running: Any, n: int) -> None:
    client = running.client()
    messages: Any = [{"role": "user", "content": "Hi."}]
    options: Any = {"model": NAME, "messages": messages, "max_tokens": 12, "seed": 3, "n": n}
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = [""] * n, [None] * n, None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * n
    assert usage is not None and whole.usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_stop_texts_and_completions_in_streams(running: Any) -> None:
    client = running.client()
    whole = client.completions.create(model=NAME, prompt="The fox", temperature=0, max_tokens=40).choices[0].text
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if "�" not in whole[i : i + 2])
    cut = client.completions.create(model=NAME, prompt="The fox", temperature=0, max_tokens=40, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model=NAME, prompt="The fox", temperature=0, max_tokens=40, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.choices[0].text


def test_answers_keep_to_a_schema(running: Any) -> None:
    client = running.client()
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    messages: Any = [{"role": "user", "content": "Which animal?"}]
    for seed in range(10):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, response_format=form, seed=seed, max_tokens=64
        )
        found = json.loads(answer.choices[0].message.content or "")
        assert found.keys() == {"name", "kind"} and found["kind"] in ("cat", "dog") and len(found["name"]) <= 6
        assert answer.choices[0].finish_reason == "stop"
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.chat.completions.create(model=NAME, messages=messages, response_format=wrong)


CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "Hi."}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 2}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"seed": 2**63}, "seed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_is_named(running: Any, change: dict[str, Any], param: str | None) -> None:
    response = running.post("/v1/chat/completions", CHAT | change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == param


def test_what_is_no_request_is_refused_in_the_envelope(serve: Callable[..., Any]) -> None:
    running = serve(Limits(body_bytes=1000, new_tokens=64, prompt_tokens=20))
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b" " * 1001, 413)):
        response = httpx.post(
            f"{running.url}/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == status and response.json()["error"]["message"]
    assert running.post("/v1/nothing", {}).status_code == 404
    response = running.post("/v1/chat/completions", CHAT | {"model": "other"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    response = running.post("/v1/completions", {"model": NAME, "prompt": "word " * 60})
    assert response.status_code == 400 and "prompt" in response.json()["error"]["message"]
    response = running.post("/v1/completions", {"model": NAME, "prompt": [10**9]})
    assert response.status_code == 400
    response = running.post("/v1/completions", {"model": NAME, "prompt": ""})
    assert response.status_code in (200, 400)


def test_keys_are_asked_for(serve: Callable[..., Any]) -> None:
    running = serve(keys=("first", "second"))
    assert [model.id for model in running.client("second").models.list()] == [NAME]
    with pytest.raises(openai.AuthenticationError):
        running.client("third").models.list()
    assert httpx.get(f"{running.url}/health").status_code == 200  # probes have no key
    described = httpx.get(f"{running.url}/openapi.json").json()
    asked_for = {path: "security" in each[method] for path, each in described["paths"].items() for method in each}
    assert asked_for["/v1/models"] and asked_for["/v1/completions"] and not asked_for["/health"]
    assert "422" not in json.dumps(described)


def slow_down(running: Any) -> None:
    """Has every step take a tenth of a second."""
    scheduler = running.service.engine.scheduler
    step = scheduler.step

    def slow() -> Events:
        time.sleep(0.1)
        return step()

    scheduler.step = slow


def test_when_everything_is_taken_the_answer_is_429(serve: Callable[..., Any]) -> None:
    running = serve(slots=1, queue=0)
    slow_down(running)
    stream = running.client().completions.create(model=NAME, prompt="One day", max_tokens=40, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        running.client().completions.create(model=NAME, prompt="One day", max_tokens=2)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    stream.close()


def test_a_client_that_goes_away_frees_its_slot(serve: Callable[..., Any]) -> None:
    running = serve(slots=1, limits=Limits(new_tokens=10_000))
    slow_down(running)
    long: dict[str, Any] = {
        "model": NAME,
        "prompt": "One day",
        "max_tokens": 10_000,
        "extra_body": {"ignore_eos": True},
    }
    stream = running.client().completions.create(stream=True, **long)
    next(iter(stream))
    stream.close()
    answer = running.client().completions.create(model=NAME, prompt="One day", max_tokens=2, temperature=0, timeout=30)
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.APITimeoutError):  # one that waits for the whole answer, and gives up
        running.client().with_options(timeout=0.5).completions.create(**long)
    for _ in range(100):
        if not running.service.engine.figures.running:
            break
        time.sleep(0.05)
    done = running.service.engine.figures.done
    assert sum(done.values()) == running.service.engine.figures.asked == 3


def test_metrics_and_health(serve: Callable[..., Any]) -> None:
    running = serve()
    running.client().completions.create(model=NAME, prompt="One day", max_tokens=5, temperature=0)
    text = httpx.get(f"{running.url}/metrics").text
    for line in (
        "slm_requests_total 1.0",
        "slm_new_tokens_total 5.0",
        'slm_ended_total{reason="length"} 1.0',
        "slm_slots 8.0",
    ):
        assert line in text
    for what in ("slm_time_to_first_token_seconds", "slm_queue_seconds", "slm_text_tokens_per_second"):
        assert f"{what}_count 1.0" in text
    assert httpx.get(f"{running.url}/ready").json() == {"status": "ready"}
    running.service.engine.failed = "broken"
    assert httpx.get(f"{running.url}/health").status_code == 503
    assert running.post("/v1/completions", {"model": NAME, "prompt": "x"}).status_code == 503
    running.service.engine.failed = None
