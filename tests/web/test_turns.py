"""Prompts of the page: the same ids as `slm chat` and `slm serve`, for slm's turns and for models' own chat templates."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from slm.core.chat import CHAT_TEMPLATE, Message, chat_ids
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.tool_fields import declared, openai_messages
from slm.core.tools import Call, Tool, ordered
from slm.web.turns import page_turns
from tests.core.chat_templates import ALTERING, TEMPLATES, chat_tokenizer
from tests.core.test_tool_prompts import TALK
from tests.core.test_tool_prompts import TOOLS as LIGHTS
from tests.core.tool_chat_templates import LOWERED, NATIVE, tool_tokenizer
from tests.web.page_text import TEXT, save_for_page

Node = Callable[..., Any]
Conversation = tuple[Sequence[Message], Sequence[Tool]]

WITH_TOOLS = {**NATIVE, **LOWERED, "slm's own": CHAT_TEMPLATE}
# Numbers and keys that JavaScript's JSON would change, and texts that templates and JSON escape.
AWKWARD = declared(
    [
        {
            "name": "plan",
            "description": '  Plans <end_of_turn> "trips" — für 2 & more.\n',
            "parameters": {
                "type": "object",
                "$defs": {
                    "place": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
                },
                "properties": {
                    "to": {"$ref": "#/$defs/place"},
                    "2": {"type": "number", "minimum": -1.0, "maximum": 1e16, "default": 1e-5},
                    "1": {"type": ["integer", "null"], "description": "Counts. <tool_call>"},
                    "mode": {"anyOf": [{"const": "a\\b"}, {"enum": [1, 2.5, None, True, "é\u2028"]}]},
                    "stops": {"type": "array", "items": {"type": "string"}, "description": ""},
                    "any": True,
                },
                "required": ["to"],
            },
        },
        {"name": "now", "parameters": None},
    ]
)
ARGUMENTS: dict[str, Any] = {
    "mode": 2.5,
    "to": {"name": '<start_of_turn>"Rome" \\ 🦊', "zip": 12345678901234567890123},
    "2": 21.0,
    "1": -7,
    "stops": ["a", "", "<escape>b\n"],
    "10": 1e22,
    "3": None,
}
TRIP: list[Message] = [
    {"role": "system", "content": " Be <|im_end|> brief.\x85 "},
    {"role": "user", "content": "\x1c Plan <end_of_turn>\n<start_of_turn>model\nit.\ufeff "},
    {
        "role": "assistant",
        "content": "Wait.",
        "calls": (Call("plan", ARGUMENTS), Call("now", {}), Call("plan", {"any": 0.1})),
    },
    {"role": "tool", "name": "plan", "content": '{"3": 1.0, "b": [true, null], "<escape>": "x"}'},
    {"role": "tool", "name": "now", "content": "nine <tool_call|>"},
    {"role": "tool", "name": "plan", "content": "{}"},
    {"role": "assistant", "content": "Done <end_function_call>."},
    {"role": "user", "content": "Thanks 🦊."},
]
CONVERSATIONS: list[Conversation] = [
    (TALK[1:2], LIGHTS),
    (TALK[:2], LIGHTS),
    (TALK[:5], LIGHTS),
    (TALK[:7], LIGHTS),
    (TALK[:7], ()),
    (TRIP[1:2], AWKWARD),
    (TRIP[:2], AWKWARD),
    (TRIP[:6], AWKWARD),
    (TRIP, AWKWARD),
    (TRIP[1:2], ()),
]

PROGRAM = (
    TEXT
    + """
import { fromOpenai, startTurns } from "page/chat.js";
import { declared } from "page/tools.js";
const { turns } = given;
const { turns: made, noChat, noTools } = await startTurns(text, turns, given.stops);
const found = given.conversations.map(({ messages, tools }) => {
  try {
    if (made === null) throw new Error(noChat);
    const known = declared(tools);
    return { ids: made.ids(fromOpenai(messages, known), known, new Date(turns.time)) };
  } catch (problem) {
    return { problem: problem.message, stack: problem.stack };
  }
});
console.log(JSON.stringify({ found, noChat, noTools }));
"""
)


def theirs(
    in_node: Node,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    stops: Sequence[int] = (),
) -> Any:
    """Returns the page's ids of prompts, or its problem, and why it offers no chat and no tools."""
    save_for_page(tokenizer)
    turns = page_turns(tokenizer, stops, {})
    assert turns is not None
    given = [
        {"messages": openai_messages(messages), "tools": json.dumps([tool.declaration for tool in tools])}
        for messages, tools in conversations
    ]
    answer = in_node(PROGRAM, {"turns": turns, "stops": list(stops), "conversations": given})
    return answer["found"], answer["noChat"], answer["noTools"]


def ours(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool], stops: Sequence[int] = ()) -> Any:
    """Returns the ids of a prompt of `slm serve`, which orders arguments as they are declared."""
    known = {tool.name: tool for tool in tools}
    sent: list[Message] = [{**message} for message in messages]
    for message in sent:
        if "calls" in message:
            message["calls"] = tuple(ordered(call, known.get(call.name)) for call in message["calls"])
    try:
        return chat_ids(tokenizer, sent, stops, tools)
    except SlmError as error:
        return error


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_the_same_ids_with_tools(in_node: Node, vendor: None, name: str, special: bool) -> None:
    tokenizer = tool_tokenizer(WITH_TOOLS[name], special=special)
    found, no_chat, no_tools = theirs(in_node, tokenizer, CONVERSATIONS)
    assert no_chat == no_tools == ""
    count = 0
    for (messages, tools), each in zip(CONVERSATIONS, found, strict=True):
        expected = ours(tokenizer, messages, tools)
        if isinstance(expected, SlmError):
            assert "problem" in each
            continue
        assert each.get("ids") == expected, each
        count += 1
    assert count >= len(CONVERSATIONS) - 2


# Templates that the page does not render: its library gives ~ the precedence of +.
UNLIKE = {"counts"}

TALKS: list[list[Message]] = [
    [{"role": "user", "content": "Hi."}],
    [{"role": "user", "content": " <|im_end|> x <end_of_turn>\n<start_of_turn> <|user|> [INST] </s>\t"}],
    [
        {"role": "user", "content": "One 🦊 <START_OF_TURN>"},
        {"role": "assistant", "content": "<think>no</think>\n\nTwo, two."},
        {"role": "user", "content": "Three?\n "},
    ],
    [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "Where's “it”?"}],
]


@pytest.mark.parametrize("name", {**TEMPLATES, **ALTERING})
def test_the_same_ids_or_a_problem(in_node: Node, vendor: None, name: str) -> None:
    """Of templates in many styles; what the page cannot render, it says, and never gives other ids."""
    tokenizer = chat_tokenizer({**TEMPLATES, **ALTERING}[name])
    if page_turns(tokenizer, (), {}) is None:
        pytest.skip("the template rejects plain conversations")
    found, no_chat, _ = theirs(in_node, tokenizer, [(talk, ()) for talk in TALKS])
    assert (no_chat == "") == (name not in UNLIKE)
    for talk, each in zip(TALKS, found, strict=True):
        expected = ours(tokenizer, talk, ())
        if isinstance(expected, SlmError) or name in UNLIKE:
            assert "problem" in each
        else:
            assert each.get("ids") == expected, each


def test_no_chat_with_another_template_or_other_tokens(in_node: Node, vendor: None) -> None:
    """The negative control of the check of prompts: the page offers what gives the ids of `slm chat`, and nothing else."""
    tokenizer = tool_tokenizer(NATIVE["qwen"])
    save_for_page(tokenizer)
    turns = page_turns(tokenizer, (), {})
    assert turns is not None
    calling = json.loads(json.dumps(turns))
    calling["template"] = calling["template"].replace("</tools>", "</tool>")
    plain = turns | {"template": turns["template"].replace("message.role == 'assistant'", "false")}
    unknown = turns | {"template": turns["template"] + "{{ messages | groupby('role') }}"}
    broken = turns | {"template": turns["template"] + "{% if %}"}
    without = turns | {"prompts_with_tools": None}
    program = (
        TEXT
        + """
    import { startTurns } from "page/chat.js";
    const found = [];
    for (const each of given) {
      const { turns, noChat, noTools } = await startTurns(text, each, []);
      found.push([turns !== null, noChat, noTools]);
    }
    console.log(JSON.stringify(found));
    """
    )
    found = in_node(program, [turns, calling, plain, unknown, broken, without, None])
    unlike = "the page renders the model's chat template differently from slm chat"
    assert found[0] == [True, "", ""]
    assert found[1] == [True, "", unlike]
    assert found[2] == [False, unlike, ""]
    assert not found[3][0] and "cannot render the model's chat template" in found[3][1]
    assert not found[4][0] and "cannot render the model's chat template" in found[4][1]
    assert found[5] == [True, "", "the model's chat template rejects tools"]
    assert found[6] == [False, "this model has no turns", ""]


ENDLESS = {
    "steps": "{% for a in range(100000) %}{% for b in range(100000) %}{% set c = b %}{% endfor %}{% endfor %}",
    "text": "{% set ns = namespace(x='abcdefgh') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "list": "{% set ns = namespace(x=[1, 2, 3]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{% for a in range(100000) %}{{ 'x' * 1 if false else '" + "x" * 999 + "' }}{% endfor %}",
    "range": "{% for a in range(10000000000) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "reaches": "{{ messages.constructor.constructor('return 1')() }}",
    "reaches text": "{{ 'x'.constructor('y') }}",
}


def test_templates_end_and_reach_nothing(in_node: Node, vendor: None) -> None:
    program = """
    import { compiled } from "page/jinja.js";
    console.log(JSON.stringify(given.map((template) => {
      const started = performance.now();
      try {
        return [compiled(template)({ messages: [] }).slice(0, 20), ""];
      } catch (problem) {
        return [problem.constructor.name, problem.message, performance.now() - started];
      }
    })));
    """
    found = in_node(program, [*ENDLESS.values(), "{{ [1, 2] | length }} {{ 'é' * 1 if false else 'fine' }}"])
    for name, each in zip(ENDLESS, found, strict=False):
        assert each[0] == "Problem" and "cannot render the model's chat template" in each[1], (name, each)
        assert each[2] < 60_000
    assert found[-1] == ["2 fine", ""]  # the negative control
