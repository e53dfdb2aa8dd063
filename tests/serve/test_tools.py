"""Tools through OpenAI's client: calls are valid, whole and streamed, and conversations continue with their results."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion as ChatCompletionType
from openai.types.chat import ChatCompletionChunk

from slm.core.chat import chat_ids
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.core.tool_fields import called, declared
from slm.core.tools import arguments_text
from slm.export.bundle import export_bundle
from slm.serve.requests import ChatRequest
from slm.serve.responses import ChatCompletion
from slm.serve.service import Limits
from slm.serve.tools import declared_tools, messages_of
from tests.conftest import with_context
from tests.core.test_tools import LIGHT
from tests.core.tool_chat_templates import NATIVE
from tests.serve.conftest import Running, servers

NAME = "random"
# Everything in them is bounded, so that a call is complete within a bounded number of tokens.
PARAMETERS: dict[str, Any] = {
    "set_light": LIGHT["function"]["parameters"],
    "plan": {
        "type": "object",
        "properties": {
            "steps": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {
                        "at": {"type": "integer", "minimum": 0, "maximum": 23},
                        "what": {"enum": ["wake", "sleep"]},
                    },
                    "required": ["at", "what"],
                },
            }
        },
        "required": ["steps"],
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
ASKED: list[Any] = [{"role": "user", "content": "Light in the hall, please."}]


def long_bundle(checkpoint: Path, directory: Path, template: str | None = None, context: int = 4096) -> Path:
    """Exports the random model with a context that has room for declarations."""
    copy = with_context(checkpoint, directory, context)
    if template is not None:
        ours = Tokenizer.load(copy)
        Tokenizer(ours.backend, ours.config | {"chat_template": template}).save(copy)
    return export_bundle(copy, directory / "onnx").path


@pytest.fixture(scope="module")
def bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_bundle(shared_checkpoint, tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def running(shared_bundle: Bundle, bundle: Path) -> Iterator[Running]:
    for start in servers(shared_bundle):
        yield start(bundle=bundle, limits=Limits(new_tokens=400))


def ask(client: openai.OpenAI, **options: Any) -> Any:
    messages = options.pop("messages", ASKED)
    given = {"model": NAME, "messages": messages, "tools": TOOLS, "max_tokens": 400, "seed": 3} | options
    return client.chat.completions.create(**given)


def check(call: Any) -> None:
    assert call.type == "function" and call.id.startswith("call_")
    Draft202012Validator(PARAMETERS[call.function.name]).validate(json.loads(call.function.arguments))


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def test_required_calls_are_valid(running: Any) -> None:
    client = running.client()
    for seed in range(6):
        answer = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert len(answer.message.tool_calls) == 1
        check(answer.message.tool_calls[0])


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_tool_is_called(running: Any, name: str) -> None:
    for seed in range(3):
        answer = ask(running.client(), tool_choice=named(name), seed=seed).choices[0]
        (call,) = answer.message.tool_calls
        assert call.function.name == name
        check(call)
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named(name)]}}
    (call, *_) = ask(running.client(), tool_choice=some).choices[0].message.tool_calls
    assert call.function.name == name


def test_several_calls_in_one_reply(running: Any) -> None:
    """Sampling decides whether another call follows; with a high temperature some replies have several."""
    counts = []
    for seed in range(6):
        answer = ask(running.client(), tool_choice="required", seed=seed, max_tokens=150, temperature=2).choices[0]
        complete = answer.message.tool_calls[: -1 if answer.finish_reason == "length" else None]
        for call in complete:
            check(call)
        assert len({call.id for call in answer.message.tool_calls}) == len(answer.message.tool_calls)
        counts.append(len(answer.message.tool_calls))
    assert max(counts) > 1


def test_streamed_calls_are_the_whole_calls(running: Any) -> None:
    client = running.client()
    for choice in (named("set_light"), named("plan")):
        whole = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
        events = list(ask(client, tool_choice=choice, parallel_tool_calls=False, stream=True))
        deltas = [event.choices[0].delta for event in events]
        assert deltas[0].role == "assistant"
        parts = [part for delta in deltas for part in delta.tool_calls or ()]
        assert parts[0].id and parts[0].function.name == whole.message.tool_calls[0].function.name
        assert all(part.index == 0 for part in parts) and not any(part.id or part.function.name for part in parts[1:])
        arguments = "".join(part.function.arguments for part in parts)
        assert arguments == whole.message.tool_calls[0].function.arguments
        assert len(parts) >= 3  # the arguments arrive while they are written
        assert not any(delta.content for delta in deltas)
        assert [event.choices[0].finish_reason for event in events][-1] == "tool_calls"


def test_the_clients_own_stream_helper(running: Any) -> None:
    with running.client().chat.completions.stream(
        model=NAME,
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
        seed=3,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    check(final.choices[0].message.tool_calls[0])


def test_text_stays_text(running: Any) -> None:
    """The random model does not begin a call by chance."""
    client = running.client()
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        answer = ask(client, max_tokens=8, **choice).choices[0]
        assert answer.message.content is not None and answer.message.tool_calls is None
        assert answer.finish_reason == "length"
        events = list(ask(client, max_tokens=8, stream=True, **choice))
        assert (
            "".join(event.choices[0].delta.content or "" for event in events).strip() == answer.message.content.strip()
        )
    without = client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=8, seed=3)
    assert (
        ask(client, max_tokens=8, tool_choice="none").choices[0].message.content == without.choices[0].message.content
    )


def test_calls_beside_a_response_format(running: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    for seed in range(4):
        message = ask(running.client(), response_format=form, seed=seed, parallel_tool_calls=False).choices[0].message
        if message.tool_calls:
            check(message.tool_calls[0])
        else:
            Draft202012Validator(schema).validate(json.loads(message.content))


@pytest.mark.parametrize(
    "schema", [{"not": {}}, {"enum": ["x" * 70_000]}, {"patternProperties": {f"a{n}": {} for n in range(99)}}]
)
def test_a_response_format_beside_tools_has_the_limits_of_schemas(running: Any, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": NAME, "messages": ASKED, "tools": TOOLS, "response_format": form, "max_tokens": 2}
    response = running.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "response_format" and error["message"].startswith("the schema is not supported")


def test_every_response_is_of_the_type_that_the_client_says(running: Any) -> None:
    body = {"model": NAME, "messages": ASKED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200, "n": 2}
    text = running.post("/v1/chat/completions", body).text
    ChatCompletionType.model_validate_json(text, strict=True)
    ChatCompletion.model_validate_json(text)
    body |= {"stream": True, "logprobs": True}
    text = running.post("/v1/chat/completions", body).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line and "[DONE]" not in line]
    read = [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]
    scored = [choice.logprobs.content for event in read for choice in event.choices if choice.logprobs]
    assert any(scored)


def conversation(client: openai.OpenAI) -> list[Any]:
    message = ask(client, tool_choice=named("now")).choices[0].message
    return [*ASKED, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "9:00"}]


def test_a_conversation_continues_with_results(running: Any, bundle: Path) -> None:
    client = running.client()
    messages = conversation(client)
    answer = ask(client, messages=messages, max_tokens=8)
    assert answer.choices[0].message.content is not None
    whole = [*messages[:1], messages[1].model_dump(), messages[2]]
    again = ask(client, messages=whole, max_tokens=8)
    assert again.choices[0].message.content == answer.choices[0].message.content
    # The prompt has the ids of training.
    tokenizer = Tokenizer.load(bundle)
    calls = called([call.model_dump() for call in messages[1].tool_calls])
    told: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": "", "calls": calls},
        {"role": "tool", "content": "9:00"},
    ]
    assert answer.usage.prompt_tokens == len(chat_ids(tokenizer, told, (), declared(TOOLS)))


def test_calls_in_the_prompt_are_in_the_order_of_their_declaration() -> None:
    def arguments_of(name: str, arguments: str) -> str:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
        request = ChatRequest.model_validate({"messages": messages, "tools": TOOLS})
        (read,) = messages_of(request.messages, declared_tools(request))[1]["calls"]
        return arguments_text(read)

    arguments = '{"on": true, "level": null, "room": "hall"}'
    assert arguments_of("set_light", arguments) == '{"room": "hall", "on": true}'
    assert arguments_of("of_another_request", arguments) == arguments


def test_texts_longer_than_the_context_are_rejected_before_they_are_tokenized(running: Any) -> None:
    long = "x" * 500_000
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": json.dumps({"a": long})}}
    turn = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "ok"}]
    tool = {"type": "function", "function": {"name": "now", "description": long}}
    for body, param in (({"messages": [*ASKED, *turn]}, "messages"), ({"messages": ASKED, "tools": [tool]}, "tools")):
        response = running.post("/v1/chat/completions", body | {"max_tokens": 2})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param and error["message"].startswith("a text of 500,0")


def test_a_model_that_learned_without_declarations_gets_none(
    serve: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "learned"
    shutil.copytree(shared_checkpoint, copy)
    info = json.loads((copy / "slm.json").read_text())
    (copy / "slm.json").write_text(json.dumps(info | {"finetuned": {"turns": True, "declares_tools": False}}))
    running = serve(bundle=long_bundle(copy, tmp_path), limits=Limits(new_tokens=400))
    answer = ask(running.client(), tool_choice="required", parallel_tool_calls=False)
    check(answer.choices[0].message.tool_calls[0])
    without = running.client().chat.completions.create(model=NAME, messages=ASKED, max_tokens=2)
    assert answer.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "only functions"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "has the name 'a b'"),
        ({"tools": TOOLS[:1] * 2}, "tools", "two tools have the name"),
        ({"tools": TOOLS[:1] * 200}, "tools", "at most 128"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
            "parameters has the type 'array'",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
                ]
            },
            "tools",
            "not supported",
        ),
        ({"tool_choice": "always"}, "tool_choice", "Input should be"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "must be auto, none, required"),
        ({"tool_choice": named("later")}, "tool_choice", "names 'later', which is not in tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "requires tools"),
        ({"tools": None, "tool_choice": named("now")}, "tool_choice", "requires tools"),
        ({"ignore_eos": True}, "ignore_eos", "not supported with tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tools"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]},
            "messages",
            "message 1: a result without a call",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "required"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0.role", "use tools"),
        (
            {"messages": [ASKED[0] | {"tool_call_id": "1"}]},
            "messages.0.tool_call_id",
            "only a message of the role tool",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.function",
            "required",
        ),
    ],
)
def test_what_is_rejected(running: Any, change: dict[str, Any], param: str, said: str) -> None:
    body = {"model": NAME, "messages": ASKED, "tools": TOOLS, "max_tokens": 2} | change
    response = running.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and said.lower() in error["message"].lower()


def test_calls_and_results_must_match(running: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    for rest, said in (
        ([ASKED[0]], "has 1 call, and 0 results follow"),
        ([{"role": "tool", "tool_call_id": "2", "content": "x"}], "a result is of '2', which was not called"),
    ):
        response = running.post(
            "/v1/chat/completions", {"model": NAME, "messages": [*ASKED, made, *rest], "max_tokens": 2}
        )
        assert response.status_code == 400 and said in response.json()["error"]["message"]
    broken = call | {"function": {"name": "now", "arguments": "{"}}
    body = {"messages": [*ASKED, made | {"tool_calls": [broken]}], "max_tokens": 2}
    assert "not valid JSON" in running.post("/v1/chat/completions", body).json()["error"]["message"]


def test_a_schema_that_is_not_strict_may_have_unsupported_keywords(running: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"const": 1}, "maxItems": 2, "contains": {}}},
    }
    function = {"name": "f", "parameters": parameters}
    strict = {
        "model": NAME,
        "messages": ASKED,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }
    assert running.post("/v1/chat/completions", strict).status_code == 400
    tools = [{"type": "function", "function": function | {"strict": False}}]
    response = running.post("/v1/chat/completions", strict | {"tools": tools, "max_tokens": 100})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", NATIVE)
def test_models_with_a_template_of_their_own(
    name: str, serve: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path
) -> None:
    """The vocabulary lacks the marks, so that they are plain text."""
    running = serve(bundle=long_bundle(shared_checkpoint, tmp_path, NATIVE[name]), limits=Limits(new_tokens=400))
    for seed in range(3):
        answer = ask(running.client(), tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        check(answer.message.tool_calls[0])
        assert answer.finish_reason == "tool_calls"
    events = list(ask(running.client(), tool_choice=named("set_light"), stream=True))
    parts = [part for event in events for part in event.choices[0].delta.tool_calls or ()]
    arguments = json.loads("".join(part.function.arguments for part in parts))
    Draft202012Validator(PARAMETERS["set_light"]).validate(arguments)
    assert list(arguments) == [name for name in PARAMETERS["set_light"]["properties"] if name in arguments]
    messages = conversation(running.client())
    assert ask(running.client(), messages=messages, max_tokens=4).choices[0].message.content is not None
