"""Constrained calls in conversations and measurements: valid for their schemas, forced or allowed by the choice of tools."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from slm.core.chat import chat_ids
from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.task import Question, TaskRow
from slm.core.tool_fields import declared
from slm.core.tools import Call, Tool, parsed_calls
from slm.loading import load
from slm.runtime import tool_choice
from slm.runtime.model import Model
from slm.runtime.sampling import Sampler
from slm.runtime.task import measure_task

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "enum": ["kitchen", "hall"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["room", "level"],
}
TOOLS = declared(
    [
        {"name": "light", "description": "Sets a light.", "parameters": SCHEMA},
        {"name": "now", "parameters": {"type": "object", "properties": {}}},
    ]
)
LONG: dict[str, Any] = {"max_new_tokens": 300, "seed": 1}


@pytest.fixture
def model(roomy: Path) -> Model:
    return load(roomy, threads=1)


def valid(calls: Sequence[Call]) -> bool:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    return bool(calls) and all(Draft202012Validator(schemas[call.name]).is_valid(call.arguments) for call in calls)


def declarations(tools: Sequence[Tool] = TOOLS) -> list[dict[str, Any]]:
    return [tool.declaration for tool in tools]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_named_tool_is_called_once_with_valid_arguments(model: Model, seed: int) -> None:
    chat = model.chat(tools=declarations(), tool_choice="light")
    chat.ask("Hello.", max_new_tokens=300, seed=seed)
    (call,) = chat.calls
    assert call.name == "light" and valid([call])


def test_required_calls_are_valid_and_the_answer_to_results_is_free(model: Model) -> None:
    chat = model.chat(tools=declarations(TOOLS[:1]), tool_choice="required")
    result = chat.pieces("Hello.", max_new_tokens=500, seed=3).finish()
    _, calls = parsed_calls(result.text)
    assert valid(calls) and result.text.startswith("<tool_call>")
    assert list(chat.calls) == calls
    answer = chat.answer_calls(["done"] * len(calls), max_new_tokens=12, seed=1)
    assert answer and not answer.startswith("<tool_call>")  # a random text, which no grammar forces


def test_without_a_constraint_the_random_model_calls_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the calls above come from the grammar. Without llguidance the conversation still works."""
    monkeypatch.setattr(tool_choice, "find_spec", lambda name: None)
    chat = model.chat(tools=declarations())
    assert chat.unconstrained == "llguidance is not installed"
    chat.ask("Hello.", max_new_tokens=40, seed=1)
    assert not chat.calls
    with pytest.raises(SlmError, match="'light' requires llguidance") as caught:
        model.chat(tools=declarations(), tool_choice="light")
    assert "slm-edge[serve]" in (caught.value.hint or "")


def test_allowed_calls_are_valid_once_they_begin(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that wants `<tool_call>` and then anything still makes a valid call, and text stays free."""
    chat = model.chat(tools=declarations(TOOLS[:1]))
    assert chat.unconstrained == ""
    opening = model.tokenizer.encode_literal("Well. <tool_call>")
    chosen = Sampler.choose
    left = list(opening)

    def choose(self: Sampler, logits: Any) -> int:
        return left.pop(0) if left else chosen(self, logits)

    monkeypatch.setattr(Sampler, "choose", choose)
    text = chat.pieces("Hello.", **LONG).finish().text
    before, calls = parsed_calls(text)
    assert text.startswith("Well. <tool_call>") and before.startswith("Well.") and valid(calls)


def test_no_tools_are_declared_if_none_may_be_called(model: Model) -> None:
    chat = model.chat(tools=declarations(), tool_choice="none")
    result = chat.pieces("Hi.", max_new_tokens=2, seed=1).finish()
    assert result.prompt_tokens == len(chat_ids(model.tokenizer, [{"role": "user", "content": "Hi."}]))


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("other", TOOLS, "'other' is not a declared tool"),
        ("required", (), "'required' requires tools"),
        ("light", (), "'light' requires tools"),
    ],
)
def test_a_choice_that_does_not_fit(model: Model, choice: str, tools: Sequence[Tool], message: str) -> None:
    with pytest.raises(SlmError, match=message):
        model.chat(tools=declarations(tools), tool_choice=choice)


def test_tools_that_cannot_constrain_are_still_declared(model: Model) -> None:
    """Some people's schemas are too large for the grammar: a conversation says so, and a forced call is an error."""
    parameters = {
        "properties": {f"field_{i}": {"enum": [f"{i} {j} " + "x" * 40 for j in range(30)]} for i in range(40)}
    }
    large = [{"name": f"large_{i}", "parameters": parameters} for i in range(3)]
    chat = model.chat(tools=large)
    assert "parameters are not supported" in chat.unconstrained
    with pytest.raises(SlmError, match="parameters are not supported"):
        model.chat(tools=large, tool_choice="required")


def test_keywords_that_the_grammar_lacks_are_ignored(model: Model) -> None:
    """The functions of a file check their arguments themselves."""
    odd = {**SCHEMA, "properties": {"level": {"type": "integer", "not": {"const": 3}}}, "required": ["level"]}
    chat = model.chat(tools=[{"name": "odd", "parameters": odd}], tool_choice="odd")
    chat.ask("Hi.", **LONG)
    assert [call.name for call in chat.calls] == ["odd"]


def test_replies_of_a_task_are_constrained_on_request(model: Model) -> None:
    row = TaskRow("Hello.", "", "rows.jsonl:1", calls=(Call("light", {"room": "hall", "level": 3}),))
    ids = tuple(chat_ids(model.tokenizer, [{"role": "user", "content": "Hello."}], (), TOOLS))
    questions = [Question(row, ids, (1, 2), tools=TOOLS[:1]), Question(row, ids, (1, 2))]
    free = measure_task(model, questions, "tool-call", Silent(), max_tokens=30)
    forced = measure_task(model, questions, "tool-call", Silent(), max_tokens=90, tool_choice="required")
    assert (free.tool_choice, forced.tool_choice) == (None, "required")
    assert not parsed_calls(free.answers[0].reply)[1]
    assert valid(parsed_calls(forced.answers[0].reply)[1])
    assert not parsed_calls(forced.answers[1].reply)[1]  # the row declares no tools


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home.json").write_text(json.dumps(declarations()))
    return tmp_path / "home.json"


def test_slm_chat_forces_a_call(
    slm: Callable[..., Any], roomy: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello.\n"), "utf-8"))
    result = slm(
        "chat", roomy, "--tools", home, "--tool-choice", "light", "--greedy", "--max-new-tokens", "300", "--json"
    )
    assert result.code == 0, result.err
    (made,) = json.loads(result.out)["calls"]
    assert made["name"] == "light" and valid([Call(made["name"], made["arguments"])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tool-choice", "light"], "'light' requires tools"),
        (["--tools", "home.json", "--tool-choice", "x"], "light, now"),
    ],
)
def test_slm_chat_rejects_a_choice_before_it_loads_the_model(
    slm: Callable[..., Any], roomy: Path, home: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    from slm import loading

    monkeypatch.chdir(home.parent)
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    result = slm("chat", roomy, *options)
    assert result.code == 1 and message in result.err
