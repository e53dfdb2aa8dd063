"""The grammar of replies: every call follows its tool's schema, and text that is not a call stays free."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from slm.core.errors import SlmError
from slm.core.tool_fields import declared
from slm.core.tools import FUNCTION_GEMMA, GEMMA_4, JSON_STYLE, STYLES, Call, Style, Tool, parsed_calls, written
from slm.runtime.call_grammar import Replies
from slm.runtime.constraint import Grammars
from tests.core.tool_chat_templates import NATIVE, tool_tokenizer
from tests.serve.test_schemas import EXPENSIVE

# All values are bounded, so that a random call ends.
PARAMETERS: dict[str, Any] = {
    "light": {
        "type": "object",
        "properties": {
            "room": {"type": "string", "enum": ["kitchen", "living room", 'a "quoted" {room}, é']},
            "on": {"type": "boolean"},
            "level": {"type": "integer", "minimum": 0, "maximum": 100},
            "colour": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 255},
                "minItems": 3,
                "maxItems": 3,
            },
        },
        "required": ["room", "on"],
    },
    "route": {
        "type": "object",
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "name": {"enum": ["a", "b"]}},
                "required": ["name", "x"],
            }
        },
        "properties": {
            "stops": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 1, "maxItems": 2},
            "mode": {"anyOf": [{"const": "car"}, {"type": "null"}]},
            "by": {"type": ["boolean", "null"]},
        },
        "required": ["stops", "mode"],
    },
    "now": {"type": "object", "properties": {}},
    "word": {
        "type": "object",
        "properties": {"Zed": {"type": "string", "minLength": 1, "maxLength": 4}, "a": {"const": 1}},
    },
}
TOOLS = declared([{"name": name, "parameters": parameters} for name, parameters in PARAMETERS.items()])
BY_STYLE = {JSON_STYLE: "qwen", FUNCTION_GEMMA: "functiongemma", GEMMA_4: "gemma 4"}
SPECIAL = pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
EACH = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.opening)


class Writer:
    """Grammars of a tokenizer, and texts that follow them."""

    def __init__(self, style: Style, special: bool) -> None:
        self.tokenizer = tool_tokenizer(NATIVE[BY_STYLE[style]], special=special)
        self.end = self.tokenizer.token_id("<end_of_turn>")
        assert self.end is not None
        self.size = self.tokenizer.vocab_size
        self.grammars = Grammars(self.tokenizer, self.size, (self.end,))

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.backend.decode(ids, skip_special_tokens=False)

    def accepts(self, replies: Replies, text: str) -> bool:
        """Whether a reply may be this text, and end with it."""
        (constraint,) = self.grammars.submit_calls(replies).result()
        for token in [*self.tokenizer.encode_rendered(text), self.end]:
            if not constraint.allowed()[token]:
                return False
            if token != self.end:
                constraint.accept(token)
        return True

    def drawn(self, replies: Replies, seed: int, most: int = 600) -> str:
        """Returns a reply of random allowed tokens."""
        random = np.random.default_rng(seed)
        (constraint,) = self.grammars.submit_calls(replies).result()
        ids: list[int] = []
        while len(ids) < most:
            token = int(random.choice(np.flatnonzero(constraint.allowed())))
            if token == self.end:
                break
            ids.append(token)
            if constraint.accept(token):
                break
        return self.text(ids)


_WRITERS: dict[tuple[Style, bool], Writer] = {}


@pytest.fixture(scope="module", autouse=True)
def closing() -> Iterator[None]:
    yield
    for writer in _WRITERS.values():
        writer.grammars.close()
    _WRITERS.clear()


def writer_of(style: Style, special: bool) -> Writer:
    if (style, special) not in _WRITERS:
        _WRITERS[style, special] = Writer(style, special)
    return _WRITERS[style, special]


@SPECIAL
@EACH
def test_random_calls_are_valid(style: Style, special: bool) -> None:
    writer = writer_of(style, special)
    for seed in range(12):
        text = writer.drawn(Replies(TOOLS, style, "required", parallel=False), seed)
        said, (call,) = parsed_calls(text, style)
        assert not said
        Draft202012Validator(PARAMETERS[call.name]).validate(call.arguments)
        assert not call.arguments.keys() - PARAMETERS[call.name]["properties"].keys()


GOOD = [
    Call("light", {"room": 'a "quoted" {room}, é', "on": False, "level": 100, "colour": [0, 128, 255]}),
    Call("light", {"room": "kitchen", "on": True}),
    Call("route", {"stops": [{"x": -3, "name": "a"}], "mode": None, "by": True}),
    Call("now", {}),
    Call("word", {"Zed": "é\n{}", "a": 1}),
]
BAD = [
    Call("light", {"room": "cellar", "on": True}),
    Call("light", {"room": "kitchen"}),
    Call("light", {"room": "kitchen", "on": True, "level": 101}),
    Call("light", {"room": "kitchen", "on": True, "colour": [1, 2]}),
    Call("light", {"room": "kitchen", "on": "true"}),
    Call("light", {"room": "kitchen", "on": True, "more": 1}),
    Call("route", {"stops": [], "mode": None}),
    Call("route", {"stops": [{"x": 1, "name": "c"}], "mode": None}),
    Call("route", {"stops": [{"x": 1, "name": "a"}], "mode": "bus"}),
    Call("now", {"a": 1}),
    Call("later", {}),
    Call("word", {"Zed": "", "a": 1}),
    Call("word", {"Zed": "abcde", "a": 1}),
]


@SPECIAL
@EACH
def test_which_calls_are_allowed(style: Style, special: bool) -> None:
    writer = writer_of(style, special)
    required = Replies(TOOLS, style, "required")
    auto = Replies(TOOLS, style, "auto")
    for call in GOOD:
        text = written([call], style)
        assert writer.accepts(required, text), call
        assert writer.accepts(auto, f"Well. {text}"), call
    for call in BAD:
        text = written([call], style)
        assert not writer.accepts(required, text), call
        assert not writer.accepts(auto, f"Well. {text}"), call
    several = written(GOOD, style)
    assert writer.accepts(required, several) and writer.accepts(auto, f"Both. {several}")
    for choice in ("required", "auto"):
        one = Replies(TOOLS, style, choice, parallel=False)  # type: ignore[arg-type]
        assert writer.accepts(one, written(GOOD[:1], style))
        assert not writer.accepts(one, several)
    named = Replies(TOOLS[2:3], style, "required", parallel=False)
    assert writer.accepts(named, written(GOOD[3:4], style)) and not writer.accepts(named, written(GOOD[:1], style))


@SPECIAL
@EACH
def test_text_is_free_unless_a_call_is_required(style: Style, special: bool) -> None:
    writer = writer_of(style, special)
    for text in ("Once upon a time {a cat}.", "x < y, <b> and <tool", "", '{"name": "now", "arguments": {}}'):
        assert writer.accepts(Replies(TOOLS, style, "auto"), text), text
        assert writer.accepts(Replies(TOOLS, style, "auto", parallel=False), text), text
        assert not writer.accepts(Replies(TOOLS, style, "required"), text), text
    for text in (style.opening, f"{style.opening} is a mark", f"a {style.opening}\n[1]"):
        assert not writer.accepts(Replies(TOOLS, style, "auto"), text), text


@EACH
def test_text_instead_of_a_call_may_follow_a_schema(style: Style) -> None:
    writer = writer_of(style, True)
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    replies = Replies(TOOLS, style, "auto", answer=answer)
    assert writer.accepts(replies, '{"ok": true}') and writer.accepts(replies, written(GOOD[:1], style))
    assert not writer.accepts(replies, "Fine.") and not writer.accepts(replies, '{"ok": 1}')


@EACH
def test_control_tokens_are_not_free_text(style: Style) -> None:
    writer = writer_of(style, True)
    (constraint,) = writer.grammars.submit_calls(Replies(TOOLS, style, "auto")).result()
    allowed = constraint.allowed()
    named = {
        token: writer.tokenizer.token_id(token) for token in ("<start_of_turn>", "<pad>", "<b>", "a", style.opening)
    }
    assert [bool(allowed[i]) for i in named.values()] == [False, False, True, True, True]
    assert allowed[writer.end]


def test_plain_text_calls_of_a_vocabulary_that_has_the_marks() -> None:
    """A template without tools gets calls as plain text, although the vocabulary may have a token for the mark."""
    writer = writer_of(JSON_STYLE, True)
    replies = Replies(TOOLS, JSON_STYLE, "auto", native=False)
    (constraint,) = writer.grammars.submit_calls(replies).result()
    assert not constraint.allowed()[writer.tokenizer.token_id("<tool_call>")]
    text = "So: " + written(GOOD[:1]).removesuffix("</tool_call>")  # the library ends a call with the token
    for token in writer.tokenizer.encode_literal(text):
        assert constraint.allowed()[token]
        constraint.accept(token)
    bad = written([Call("later", {})])
    (constraint,) = writer.grammars.submit_calls(replies).result()
    fits = True
    for token in writer.tokenizer.encode_literal(bad):
        fits = fits and bool(constraint.allowed()[token])
        if fits:
            constraint.accept(token)
    assert not fits


@EACH
def test_schemas_that_are_not_supported_are_refused_unless_they_need_not_be_strict(style: Style) -> None:
    writer = writer_of(style, True)
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}}},
    }
    tool = Tool("f", "", parameters)
    with pytest.raises(SlmError, match=r"the tools' parameters are not supported: .*contains"):
        writer.grammars.submit_calls(Replies([tool], style, "required")).result()
    assert writer.accepts(Replies([tool], style, "required", lenient={"f"}), written([Call("f", {"a": [2]})], style))


@pytest.mark.parametrize("style", [FUNCTION_GEMMA, GEMMA_4], ids=lambda style: style.opening)
def test_a_long_chain_of_references_is_refused(style: Style) -> None:
    chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)}
    parameters = {
        "type": "object",
        "$defs": chain | {"d1500": {"type": "null"}},
        "properties": {"a": {"$ref": "#/$defs/d0"}},
    }
    tools = declared([{"name": "f", "parameters": parameters}])
    with pytest.raises(SlmError, match="its references are nested too deeply"):
        writer_of(style, True).grammars.submit_calls(Replies(tools, style, "required")).result()


# Their cost arises only while a call is written; it has a budget there.
LATER = ("optional characters", "ref to itself", "long")


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_tools_are_refused_or_end_only_their_own_reply(name: str) -> None:
    writer = writer_of(JSON_STYLE, True)
    parameters = {"type": "object", "properties": {"a": EXPENSIVE[name]}, "required": ["a"]}
    replies = Replies([Tool("f", "", parameters)], JSON_STYLE, "required", parallel=False)
    used = time.process_time()
    if name in LATER:
        with suppress(SlmError):
            writer.drawn(replies, 0, most=100)
    else:
        with pytest.raises(SlmError, match="the tools' parameters are not supported"):
            writer.grammars.submit_calls(replies).result()
    assert time.process_time() - used < 4
    assert writer.accepts(Replies(TOOLS, JSON_STYLE, "required"), written(GOOD[:1]))
