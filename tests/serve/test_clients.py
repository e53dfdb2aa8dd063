"""Requests of the official and of typed clients: harmless fields are accepted, and each response can be parsed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2 as httpx
import pytest
from openai.types import Completion as CompletionType
from openai.types.chat import ChatCompletion as ChatCompletionType
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

import slm
from slm.core.manifest import Bundle
from slm.core.tokenizer import END_OF_TURN, START_OF_TURN
from slm.runtime.model import Model
from slm.serve.messages import ChatMessage, Part
from slm.serve.requests import ChatRequest, CompletionRequest, ResponseFormat, StreamOptions

NAME = "random"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "Name a colour."}]
CHAT: dict[str, Any] = {"model": NAME, "messages": ASKED, "max_tokens": 2}
TEXT: dict[str, Any] = {"model": NAME, "prompt": "The fox", "max_tokens": 2}
PATHS = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}


def post(running: Any, of: str, change: dict[str, Any]) -> httpx.Response:
    path, body = PATHS[of]
    response: httpx.Response = running.post(path, body | change)
    return response


def test_a_conversation_is_continued_with_its_answers(running: Any) -> None:
    client, messages = running.client(), list(ASKED)
    for _ in range(3):
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=3, temperature=0)
        messages += [answer.choices[0].message, {"role": "user", "content": "Another?"}]
    whole = answer.choices[0].message.model_dump()  # with every field that the client knows, unset ones null
    answer = client.chat.completions.create(model=NAME, messages=[*ASKED, whole, *ASKED], max_tokens=3, temperature=0)
    assert answer.choices[0].finish_reason == "length"


class Animal(BaseModel):
    name: Literal["Tom", "Mia"]
    kind: Literal["cat", "dog"]


def test_parsed_answers(running: Any) -> None:
    client = running.client()
    parsed = client.chat.completions.parse(
        model=NAME, messages=ASKED, response_format=Animal, max_tokens=64, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    # The client adds `parsed` to the message.
    messages = [*ASKED, parsed.choices[0].message, *ASKED]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=2).choices


def test_every_answer_is_of_the_type_that_the_client_says(running: Any) -> None:
    for change in ({}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"seed": 1, "stop": ["zz"]}):
        ChatCompletionType.model_validate_json(post(running, "chat", change).text, strict=True)
        body = post(running, "chat", change | {"stream": True, "stream_options": {"include_usage": True}}).text
        events = [line.removeprefix("data: ") for line in body.split("\n\n") if line and "[DONE]" not in line]
        assert [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events][-1].usage
    for change in ({}, {"n": 2}, {"logprobs": 2}, {"echo": False, "best_of": 1, "suffix": ""}):
        CompletionType.model_validate_json(post(running, "text", change).text, strict=True)


HARMLESS: dict[str, Any] = {
    "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "prompt_cache_key": "x",
    "safety_identifier": "x",
    "logit_bias": {}, "stop": [], "seed": 5.0, "n": 1, "temperature": 1, "max_tokens": 2.0, "response_format": {"type": "text"},
}  # fmt: skip
CHAT_ONLY: dict[str, Any] = {
    "tools": [], "tool_choice": "none", "functions": [], "function_call": "auto", "parallel_tool_calls": True,
    "modalities": ["text"], "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low", "verbosity": "low",
    "top_logprobs": 0, "logprobs": False,
}  # fmt: skip
TEXT_ONLY: dict[str, Any] = {"suffix": "", "echo": False, "best_of": 1}


def test_harmless_fields_change_nothing(running: Any) -> None:
    for of, more in (("chat", CHAT_ONLY), ("text", TEXT_ONLY)):
        plain = post(running, of, {"seed": 5, "temperature": 1}).json()["choices"]
        for name, value in (HARMLESS | more).items():
            assert post(running, of, {name: value}).status_code == 200, name
        assert post(running, of, HARMLESS | more).json()["choices"] == plain
    stream = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": True}}
    assert post(running, "chat", stream).status_code == 200


def test_harmless_fields_are_named_in_a_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "slm.serve"):
        CompletionRequest.model_validate(TEXT | {"metadata": {"secret": "secret"}})
    assert [json.loads(record.message) for record in caplog.records] == [
        {"object": "CompletionRequest", "ignored": ["metadata"]}
    ]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ChatMessage, Part, ResponseFormat, StreamOptions])
def test_null_is_absent(kind: Any) -> None:
    needed: dict[str, Any] = {
        "messages": ASKED, "prompt": "x", "role": "user", "content": "x", "type": "text", "text": "x",
    }  # fmt: skip
    body = {name: needed[name] for name in needed if name in kind.model_fields}
    fields = {*kind.model_fields, *kind.harmless, *kind.unsupported, "of_a_later_version"}
    nulls = {name: None for name in fields if name not in body}
    assert kind.model_validate(body | nulls) == kind.model_validate(body)


CHANGES_THE_ANSWER: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities"),
    ("chat", {"audio": {"voice": "alloy"}}, "audio"),
    ("chat", {"web_search_options": {}}, "web_search_options"),
    ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("chat", {"of_a_later_version": 1}, "of_a_later_version"),
    ("chat", {"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages.0.role"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ("chat", {"messages": [*ASKED, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages.1.function_call"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content.0.type"),
    ("chat", {"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ("chat", {"temperature": "1"}, "temperature"),
    ("chat", {"n": True}, "n"),
    ("chat", {"max_tokens": 1.5}, "max_tokens"),
    ("text", {"echo": True}, "echo"),
    ("text", {"best_of": 2}, "best_of"),
    ("text", {"suffix": "x"}, "suffix"),
    ("text", {"guided_json": {}}, "guided_json"),
]  # fmt: skip


@pytest.mark.parametrize(("of", "change", "param"), CHANGES_THE_ANSWER, ids=lambda value: str(value)[:30])
def test_what_would_change_the_answer_is_named(running: Any, of: str, change: dict[str, Any], param: str) -> None:
    response = post(running, of, change)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_integers_that_are_written_as_floats(running: Any) -> None:
    options = {"max_tokens": 2, "seed": 1}
    for ids in ([5, 6], [[5, 6]]):
        floats = json.loads(json.dumps(ids).replace("5", "5.0"))
        answers = [post(running, "text", options | {"prompt": prompt}).json()["choices"] for prompt in (ids, floats)]
        assert answers[0] == answers[1]
    assert post(running, "text", {"prompt": [5, 6.5]}).json()["error"]["param"] == "prompt.1"
    assert post(running, "text", {"prompt": [5, True]}).json()["error"]["param"] == "prompt.1"


def test_a_near_miss_is_suggested(running: Any) -> None:
    assert "did you mean max_tokens?" in post(running, "text", {"max_token": 3}).json()["error"]["message"]


def test_messages_that_have_no_text(running: Any) -> None:
    for message in (
        {
            "role": "assistant",
            "content": None,
            "refusal": "No.",
            "tool_calls": None,
            "function_call": None,
            "audio": None,
        },
        {"role": "assistant", "content": "", "tool_calls": [], "annotations": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": ""},
        {"role": "assistant"},
    ):
        assert post(running, "chat", {"messages": [*ASKED, message, *ASKED]}).status_code == 200, message


def test_what_is_above_the_limit_is_clamped(running: Any) -> None:
    for of, name in (("chat", "max_tokens"), ("chat", "max_completion_tokens"), ("text", "max_tokens")):
        answer = post(running, of, {name: 10**30, "ignore_eos": True}).json()
        assert answer["usage"]["completion_tokens"] == 64 and answer["choices"][0]["finish_reason"] == "length"


def test_other_spellings_of_the_same(running: Any) -> None:
    """`top_p` 0, which OpenAI permits, keeps only the most likely token; `top_k` -1, vLLM's default, keeps all."""
    for of in PATHS:
        wanted = {name: post(running, of, {"seed": 1, "max_tokens": 8, **change}).json() for name, change in {
            "likeliest": {"temperature": 0}, "top_p": {"top_p": 0}, "all": {"top_k": 0}, "top_k": {"top_k": -1},
        }.items()}  # fmt: skip
        texts = {
            name: answer["choices"][0].get("text") or answer["choices"][0]["message"] for name, answer in wanted.items()
        }
        assert texts["top_p"] == texts["likeliest"] != texts["all"] == texts["top_k"]
    assert post(running, "chat", {"top_k": -2}).status_code == 400


def test_the_only_model_needs_no_name(running: Any) -> None:
    for model in ({}, {"model": None}):
        body = {key: value for key, value in CHAT.items() if key != "model"} | model
        response = running.post("/v1/chat/completions", body)
        assert response.status_code == 200 and response.json()["model"] == NAME
    response = post(running, "chat", {"model": "gpt-4o"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_one_of_several_models_needs_a_name(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.service, "adapters", {"pirate": object()})
    response = post(running, "chat", {"model": None})
    assert response.status_code == 400 and "pirate" in response.json()["error"]["message"]


def test_any_content_type(running: Any) -> None:
    body = json.dumps(TEXT).encode()
    for kind in (
        None,
        "application/json; charset=utf-8",
        "text/json",
        "text/plain",
        "application/x-www-form-urlencoded",
    ):
        headers = {} if kind is None else {"content-type": kind}
        assert httpx.post(f"{running.url}/v1/completions", content=body, headers=headers).status_code == 200, kind


def fox_of(bundle: Bundle) -> list[int]:
    import slm

    return slm.load(bundle.path).tokenizer.encode_literal("🦊")


def test_logprobs_of_parts_of_a_character(running: Any, shared_bundle: Bundle) -> None:
    fox = fox_of(shared_bundle)
    assert len(fox) > 1
    # The penalty has each token chosen once, in this order.
    options = {"logit_bias": {str(token): 100 - 5 * i for i, token in enumerate(fox)}, "frequency_penalty": 2,
               "presence_penalty": 2, "max_tokens": 1, "temperature": 0}  # fmt: skip
    prompt, spelt = [5], b""
    for token in fox:
        bias = {"logit_bias": {str(token): 100}}
        (choice,) = post(running, "text", options | bias | {"prompt": prompt, "logprobs": 20}).json()["choices"]
        assert choice["logprobs"]["tokens"][0].startswith("bytes:\\x")
        assert len(choice["logprobs"]["top_logprobs"][0]) == 20  # none has another's name
        prompt.append(token)
        chat = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1}
        (choice,) = post(running, "chat", options | bias | chat).json()["choices"]
        (entry,) = choice["logprobs"]["content"]
        assert len(entry["top_logprobs"]) == 5
        spelt += bytes(entry["bytes"])
    assert spelt == "🦊".encode()


def test_logprobs_in_a_stream_are_those_of_the_whole_answer(running: Any) -> None:
    for of, asked in (("chat", {"logprobs": True, "top_logprobs": 3}), ("text", {"logprobs": 3})):
        options = asked | {"seed": 3, "max_tokens": 30}
        whole = post(running, of, options).json()["choices"][0]
        body = post(running, of, options | {"stream": True}).text
        events = [json.loads(line[6:]) for line in body.split("\n\n") if line and "[DONE]" not in line]
        scores = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
        for name, values in whole["logprobs"].items():
            if values is not None:
                assert [value for each in scores for value in each[name]] == values
        if of == "chat":
            text = b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]["content"])
            assert text.decode(errors="replace") == whole["message"]["content"]
        else:
            offsets = whole["logprobs"]["text_offset"]
            assert offsets == sorted(offsets) and offsets[-1] <= len(whole["text"])


def test_a_special_token_stops_an_answer(running: Any) -> None:
    end = START_OF_TURN
    token = running.service.model.tokenizer.token_id(end)
    assert token not in running.service.model.stop_token_ids
    options = {"logit_bias": {str(token): 100}, "temperature": 0, "max_tokens": 5}
    for stop, tokens, why in (([end], 1, "stop"), ([f"{end}{end}"], 2, "stop"), ([f"{end}\n"], 5, "length")):
        answer = post(running, "chat", options | {"stop": stop}).json()
        assert answer["choices"][0]["message"]["content"] == "" and answer["choices"][0]["finish_reason"] == why
        assert answer["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("kind", list(PATHS))
def test_the_end_of_a_turn_stops_an_answer_of_a_base_that_does_not_name_it(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A pretrained Gemma names the end of text alone; its adapters learn to end turns."""
    load = slm.load

    def pretrained(path: Path) -> Model:
        model = load(path)
        end = model.tokenizer.token_id(END_OF_TURN)
        model.stop_token_ids = tuple(each for each in model.stop_token_ids if each != end)
        return model

    monkeypatch.setattr(slm, "load", pretrained)
    running = serve()
    bias = {str(running.service.model.tokenizer.token_id(END_OF_TURN)): 100}
    answer = post(running, kind, {"logit_bias": bias, "temperature": 0, "max_tokens": 5}).json()
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 0


def test_the_api_is_shown_without_anything_from_elsewhere(serve: Callable[..., Any]) -> None:
    running = serve(keys=("key",))
    response = httpx.get(f"{running.url}/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = response.text
    for shown in ("/v1/chat/completions", "max_completion_tokens", "ChatMessage", "/v1/models", "Authorization"):
        assert shown.lower() in page.lower(), shown
    assert "<script" not in page and "src=" not in page and "http" not in page.replace("http://localhost:8000", "")
    assert httpx.get(f"{running.url}/openapi.json").status_code == 200
