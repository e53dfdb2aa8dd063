"""Completions of the demo model follow JSON schemas, whatever is sampled."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator, ValidationError

from slm.cli.choosing import default_model
from slm.serve.service import Limits

NAME = "random"
WORD = {"type": "string", "minLength": 1, "maxLength": 16}
# Everything in them is bounded, so that an answer is complete within a bounded number of tokens.
SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choice": {
        "type": "object",
        "properties": {
            "animal": {"enum": ["cat", "dog", "fox"]},
            "happy": {"type": "boolean"},
            "size": {"type": ["integer", "null"], "minimum": -9, "maximum": 9},
        },
        "required": ["animal", "happy", "size"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 4},
    "nested": {
        "type": "object",
        "properties": {
            "title": WORD,
            "scenes": {
                "type": "array",
                "minItems": 2,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {"place": WORD, "who": {"type": "array", "items": WORD, "maxItems": 2}},
                    "required": ["place", "who"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["title", "scenes"],
        "additionalProperties": False,
    },
    "either": {
        "anyOf": [
            {"type": "object", "properties": {"word": WORD}, "required": ["word"], "additionalProperties": False},
            {"type": "string", "pattern": "^[a-z]{3,8}-[0-9]{2}$"},
            {"$ref": "#/$defs/pair"},
        ],
        "$defs": {
            "pair": {"type": "array", "prefixItems": [WORD, {"const": 7}], "minItems": 2, "maxItems": 2, "items": False}
        },
    },
}


def keeps(text: str, schema: Any) -> bool:
    """Returns whether a text is JSON that follows a schema."""
    try:
        Draft202012Validator(schema).validate(json.loads(text))
    except (json.JSONDecodeError, ValidationError):
        return False
    return True


def written(running: Any, name: str, seed: int, kept: bool) -> tuple[str, str]:
    """Returns a completion at temperature 1 and its finish reason: half of them chats, half completions."""
    client: openai.OpenAI = running.client()
    form: Any = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name], "strict": True}}
    extra: Any = {"response_format": form} if kept else {}
    asked = f"A {name} in JSON:"
    if seed % 2:
        whole = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": asked}], seed=seed, temperature=1, max_tokens=400, **extra
        )
        return whole.choices[0].message.content or "", whole.choices[0].finish_reason
    text = client.completions.create(
        model=NAME, prompt=asked, seed=seed, temperature=1, max_tokens=400, extra_body=extra
    ).choices[0]
    return text.text, text.finish_reason


def all_written(running: Any, seeds: range, kept: bool = True) -> list[tuple[str, str, str]]:
    """Returns schemas, completions and finish reasons, eight requests at a time."""
    cases = [(name, seed) for name in SCHEMAS for seed in seeds]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda case: written(running, *case, kept), cases)
    return [(name, *answer) for (name, _), answer in zip(cases, answers, strict=True)]


@pytest.fixture
def shipped(serve: Callable[..., Any]) -> Any:
    return serve(bundle=default_model(), limits=Limits(new_tokens=400))


def check(answers: list[tuple[str, str, str]]) -> None:
    for name, text, why in answers:
        assert why == "stop" and keeps(text, SCHEMAS[name]), (name, text, why)
    assert len({text for _, text, _ in answers}) > len(answers) / 2  # chance had a say


@pytest.mark.examples(few=4, many=40)
def test_answers_keep_to_their_schemas(shipped: Any, examples: int) -> None:
    answers = all_written(shipped, range(100, 100 + examples))
    assert len(answers) == examples * len(SCHEMAS)
    check(answers)


def test_without_the_schema_none_does(shipped: Any) -> None:
    """Negative control: without a schema the model generates stories."""
    assert not any(keeps(text, SCHEMAS[name]) for name, text, _ in all_written(shipped, range(2), kept=False))


def test_what_is_not_bounded_may_be_cut_off_and_says_so(shipped: Any) -> None:
    client = shipped.client()
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 500}}}
    choice = client.completions.create(
        model=NAME, prompt="Once", max_tokens=20, seed=1, extra_body={"response_format": form}
    ).choices[0]
    assert choice.finish_reason == "length" and not keeps(choice.text, {})
