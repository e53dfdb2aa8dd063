"""The page with a server: tools in requests, calls in streams, results in further requests; the ids are those of `slm chat`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core.chat import Message, chat_ids
from slm.core.manifest import Bundle
from slm.core.tool_fields import declared
from slm.core.tools import Call, with_calls, written
from slm.serve.service import Limits
from tests.serve.conftest import Running, servers
from tests.serve.scripted import script
from tests.serve.test_tools import long_bundle

Node = Callable[..., Any]

TOOLS = """[{"type": "function", "function": {"name": "heat", "description": "Heats a room.", "parameters": {"type": "object",
  "properties": {"room": {"enum": ["hall", "Küche"]}, "degrees": {"type": "number", "minimum": 5.0, "maximum": 30}},
  "required": ["room", "degrees"]}}}, {"type": "function", "function": {"name": "now"}}]"""
HEAT = Call("heat", {"room": "Küche", "degrees": 21.0})
NOW = Call("now", {})
# The page's classes, with a page at the server's address.
PROGRAM = """
import { Conversation } from "page/conversation.js";
import { Remote } from "page/remote.js";
const real = globalThis.fetch;
const bodies = [];
globalThis.fetch = (url, options) => {
  bodies.push(options.body);
  return real(given.url + String(url).split("/static")[1], options);
};
const remote = new Remote();
[remote.model] = given.url ? await remote.models() : [""];
bodies.length = 0;
const conversation = new Conversation();
const options = { newTokens: 300, temperature: 0, topK: 0, topP: 1, minP: 0, seed: 1 };
const found = [];
async function answer(messages, { stopAt = Infinity, tools = given.tools } = {}) {
  const pieces = [];
  const stop = new AbortController();
  const told = (piece) => {
    pieces.push(piece);
    if (pieces.length >= stopAt) stop.abort();
  };
  const ask = { messages, ...(tools ? { tools } : {}) };
  const run = await remote.answer(ask, { ...options, ...given.options }, { told, signal: stop.signal });
  const kept = run.message ? conversation.record(messages, run.message) : null;
  found.push({ pieces, reason: run.reason, message: run.message ?? null, kept, calls: conversation.calls.length });
}
"""


@pytest.fixture(scope="module")
def running(
    shared_bundle: Bundle, shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    bundle = long_bundle(shared_checkpoint, tmp_path_factory.mktemp("page"), context=4096)
    for start in servers(shared_bundle):
        yield start(bundle=bundle, limits=Limits(new_tokens=1024))


def test_calls_and_results_through_the_server(in_node: Node, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = script(monkeypatch, running, [with_calls("Let me see.", [HEAT, NOW]), "It is warm.", "Bye."])
    program = """
    await answer(conversation.withRequest(" Be brief. ", "Heat the kitchen."));
    await answer(conversation.withResults(["done <end_of_turn>", '{"hour": 9.0}']));
    await answer(conversation.withRequest("", "Thanks."));
    console.log(JSON.stringify({ found, bodies }));
    """
    answer = in_node(PROGRAM + program, {"url": running.url, "tools": TOOLS})
    first, second, third = answer["found"]
    said = "".join(piece.get("text", "") for piece in first["pieces"])
    calls = [piece["call"] for piece in first["pieces"] if "call" in piece]
    assert said == "Let me see." and [each["name"] for each in calls if "name" in each] == ["heat", "now"]
    given = "".join(each.get("arguments", "") for each in calls if each["index"] == 0)
    assert json.loads(given) == HEAT.arguments and '"degrees": 21.0' in given
    made = first["message"]["tool_calls"]
    assert [each["function"]["name"] for each in made] == ["heat", "now"] and len({each["id"] for each in made}) == 2
    assert (first["reason"], first["calls"], second["calls"]) == ("end", 2, 0)
    assert second["message"] == {"role": "assistant", "content": "It is warm."} and third["kept"]
    assert '"minimum": 5.0' in answer["bodies"][0]  # numbers keep their spelling
    tools = declared(json.loads(TOOLS))
    talk: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Heat the kitchen."},
        {"role": "assistant", "content": "Let me see.", "calls": (HEAT, NOW)},
        {"role": "tool", "name": "heat", "content": "done <end_of_turn>"},
        {"role": "tool", "name": "now", "content": '{"hour": 9.0}'},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "Thanks."},
    ]
    tokenizer = running.service.model.tokenizer
    expected = [chat_ids(tokenizer, each, (), tools) for each in (talk[:2], talk[:5], talk[1:])]
    assert prompts == expected


def test_replies_without_a_complete_call_have_none(
    in_node: Node, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, running, [written([HEAT]), f"Wait. {written([HEAT])}", "", "No call."])
    program = """
    given.options = { newTokens: 40 };
    await answer(conversation.withRequest("", "Cut."));
    given.options = {};
    await answer(conversation.withRequest("", "Stop."), { stopAt: 3 });
    await answer(conversation.withRequest("", "Say nothing."));
    await answer(conversation.withRequest("", "Without tools."), { tools: "" });
    console.log(JSON.stringify(found));
    """
    cut, stopped, empty, without = in_node(PROGRAM + program, {"url": running.url, "tools": TOOLS})
    assert (cut["reason"], cut["message"], cut["kept"]) == ("length", {"role": "assistant", "content": ""}, False)
    assert (stopped["reason"], stopped["calls"]) == ("stopped", 0) and "tool_calls" not in stopped["message"]
    assert stopped["message"]["content"].startswith("W") and stopped["kept"]
    assert (empty["reason"], empty["kept"]) == ("end", False)
    assert without["message"] is None and "".join(piece["text"] for piece in without["pieces"]) == "No call."


def test_wrong_tools_are_named_before_a_request(in_node: Node) -> None:
    program = """
    globalThis.fetch = () => { throw new Error("a request was sent"); };
    const problem = await answer(conversation.withRequest("", "Hi."), { tools: given }).catch((error) => error);
    console.log(JSON.stringify([problem.message, problem.hint, bodies.length]));
    """
    message, hint, requests = in_node(PROGRAM + program, '[{"name": "a b"}]')
    assert (message, requests) == ("tool 1 has an invalid name", 0) and "letters" in hint


def test_the_messages_of_a_conversation(in_node: Node) -> None:
    program = """
    import { Conversation } from "page/conversation.js";
    const conversation = new Conversation();
    const call = { id: "call_0", type: "function", function: { name: "now", arguments: "{}" } };
    conversation.record(conversation.withRequest("A.", "Hi."), { role: "assistant", content: "Hello." });
    conversation.record(conversation.withRequest("B.", "Time?"), { role: "assistant", content: "", tool_calls: [call] });
    const waiting = [conversation.calls.length, conversation.withResults(["nine"])];
    conversation.drop();
    const dropped = [...conversation.messages];
    const kept = conversation.record(conversation.withRequest("", "And?"), { role: "assistant", content: "" });
    console.log(JSON.stringify({ waiting, dropped, kept, after: conversation.messages }));
    """
    found = in_node(program)
    count, messages = found["waiting"]
    assert count == 1 and [each["role"] for each in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert messages[0]["content"] == "B." and messages[-1] == {
        "role": "tool",
        "tool_call_id": "call_0",
        "content": "nine",
    }
    assert [each["content"] for each in found["dropped"]] == ["B.", "Hi.", "Hello."]
    assert not found["kept"] and [each["content"] for each in found["after"]] == ["Hi.", "Hello."]
