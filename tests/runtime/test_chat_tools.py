"""Conversations with tools: calls are made, results are read, and every prompt has the ids of training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.chat import Message, chat_ids
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tool_fields import openai_messages
from slm.core.tools import Call, with_calls, written
from slm.finetune.examples import Renderer
from slm.finetune.rows import ChatRow
from slm.loading import load
from slm.runtime.chat import MOST_ROUNDS, Chat
from slm.runtime.functions import Toolbox
from slm.runtime.model import Model
from tests.runtime.scripted import script

LONG: dict[str, Any] = {"max_new_tokens": 400}
made: list[int] = []


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    made.append(number)
    return 2 * number


DECLARED = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"properties": {}}}}
CALL = Call("double", {"number": 4})


@pytest.fixture
def model(roomy: Path) -> Model:
    made.clear()
    return load(roomy, threads=1)


def test_functions_are_called_until_there_is_an_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Call("double", {"number": 8})
    prompts = script(monkeypatch, model, [f"Wait. {written([CALL])}", written([again, CALL]), "It is 16.", "Bye."])
    chat = model.chat("Be brief.", tools=[double])
    assert chat.ask("Double 4 twice.", **LONG) == "It is 16."
    assert made == [4, 8, 4]
    expected: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Double 4 twice."},
        {"role": "assistant", "content": "Wait.", "calls": (CALL,)},
        {"role": "tool", "name": "double", "content": "8"},
        {"role": "assistant", "content": "", "calls": (again, CALL)},
        {"role": "tool", "name": "double", "content": "16"},
        {"role": "tool", "name": "double", "content": "8"},
        {"role": "assistant", "content": "It is 16."},
    ]
    assert chat.messages == expected
    assert chat.ask("Bye.", **LONG) == "Bye."
    tools = Toolbox.of([double]).tools
    for prompt, length in zip(prompts, (2, 4, 7), strict=False):
        assert prompt == chat_ids(model.tokenizer, expected[:length], (), tools)


def test_the_prompts_are_those_of_training(model: Model, monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    prompts = script(monkeypatch, model, [written([CALL]), "It is 8."])
    chat = model.chat(tools=[double])
    chat.ask("Double 4.", **LONG)
    row = ChatRow(tuple(chat.messages), tools=Toolbox.of([double]).tools)
    example = Renderer(model.tokenizer, config).example(row)
    assert [list(example.ids[:start]) for start, _ in example.spans] == prompts
    assert with_calls("", [CALL]) in model.tokenizer.decode(example.ids[slice(*example.spans[0])])


@pytest.mark.parametrize("record", ["finetuned", "merged"])
def test_prompts_declare_no_tools_to_a_model_that_learned_without(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(roomy, copy)
    info = json.loads((copy / "slm.json").read_text())
    tuned: dict[str, Any] = {"turns": True, "declares_tools": False}
    info |= {"finetuned": tuned} if record == "finetuned" else {"merged": {"finetune": tuned}}
    (copy / "slm.json").write_text(json.dumps(info))
    model = load(copy, threads=1)
    prompts = script(monkeypatch, model, [written([CALL]), "It is 8."])
    assert model.chat(tools=[double]).ask("Double 4.", **LONG) == "It is 8."
    assert prompts[0] == chat_ids(model.tokenizer, [{"role": "user", "content": "Double 4."}])


def test_calls_of_declared_tools_wait_for_results(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Call("look", {})
    script(monkeypatch, model, [written([CALL, look]), "I see.", "Hello."])
    chat = model.chat(tools=[double, DECLARED])
    assert chat.ask("Look.", **LONG) == "" and chat.calls == (CALL, look) and made == []
    for wrong in ([], ["one"], ["a", "b", "c"]):
        with pytest.raises(SlmError, match="has 2 calls, and"):
            chat.answer_calls(wrong)
    with pytest.raises(SlmError, match="look is declared, but there is no function for it"):
        chat.called()
    assert chat.answer_calls(["8", "a cat"], **LONG) == "I see." and chat.calls == ()
    assert [message["content"] for message in chat.messages if message["role"] == "tool"] == ["8", "a cat"]


def test_a_request_with_calls_without_results_is_dropped(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, [written([Call("look", {})]), "Hello.", written([Call("look", {})]), "Again."])
    chat = model.chat(tools=[DECLARED])
    chat.ask("Look.", **LONG)
    assert chat.ask("Hi.", **LONG) == "Hello."
    assert [message["content"] for message in chat.messages] == ["Hi.", "Hello."]
    chat.ask("Look.", **LONG)
    assert chat.retry(**LONG) == "Again."
    assert [message["content"] for message in chat.messages] == ["Hi.", "Hello.", "Look.", "Again."]


def test_a_conversation_goes_on_from_its_messages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = script(monkeypatch, model, [written([CALL]), "It is 8.", "Bye.", "Bye."])
    chat = model.chat(tools=[double])
    chat.ask("Double 4.", **LONG)
    again = model.chat(messages=chat.messages, tools=[double])
    as_openai: Any = openai_messages(chat.messages)
    as_openai[1]["content"] = None
    third = model.chat(messages=as_openai, tools=[double])
    assert again.messages == third.messages == chat.messages
    assert again.ask("Bye.", **LONG) == third.ask("Bye.", **LONG) == "Bye."
    assert prompts[2] == prompts[3]
    for wrong in (chat.messages[:3], [*chat.messages[:2], *chat.messages[3:]], [chat.messages[2]]):
        with pytest.raises(SlmError):
            model.chat(messages=wrong)


def test_another_answer_makes_its_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, [written([CALL]), "It is 8.", written([CALL]), "Eight."])
    chat = model.chat(tools=[double])
    assert chat.ask("Double 4.", **LONG) == "It is 8."
    assert chat.retry(**LONG) == "Eight." and made == [4, 4] and len(chat.messages) == 4


def test_an_empty_answer_is_not_the_one_before(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, ["Hello.", ""])
    chat = model.chat(tools=[double])
    assert chat.ask("Hi.", **LONG) == "Hello."
    assert chat.ask("And?", **LONG) == ""


@pytest.mark.parametrize("calls", [3, "look", [3], [{"arguments": {}}], [CALL, {"name": "f"}]])
def test_earlier_messages_have_calls(model: Model, calls: Any) -> None:
    asked = {"role": "user", "content": "Hi."}
    with pytest.raises(SlmError, match=r"tool_calls is|call 1"):
        model.chat(messages=[asked, {"role": "assistant", "content": "", "calls": calls}])


@pytest.mark.parametrize(
    "answer", [written([Call("other", {})]), '<tool_call>{"name": "double"}</tool_call>', "<tool_call>", "4 < 5"]
)
def test_what_is_no_call_of_a_tool_is_text(model: Model, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    script(monkeypatch, model, [answer])
    chat = model.chat(tools=[double])
    assert chat.ask("Hi.", **LONG) == answer and not made
    script(monkeypatch, model, [])


def test_a_conversation_without_tools_makes_no_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, [written([CALL])])
    chat = model.chat()
    assert chat.ask("Hi.", **LONG) == written([CALL]) and chat.calls == ()


def test_endless_calls_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, [written([CALL])] * (MOST_ROUNDS + 1))
    chat = model.chat(tools=[double])
    assert chat.ask("Go.", **LONG) == "" and len(made) == MOST_ROUNDS and chat.calls == (CALL,)


def test_old_exchanges_are_dropped_with_their_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, [written([CALL]), "x" * 250] * 3)
    chat = Chat(model, "Be brief.", tools=Toolbox.of([double]))
    for _ in range(3):
        chat.ask("Again.", **LONG)
    assert chat.forgotten > 0
    assert [message["role"] for message in chat.messages[:5]] == ["system", "user", "assistant", "tool", "assistant"]


@pytest.fixture
def talking(slm: Callable[..., Any], roomy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Pipes lines into `slm chat`, whose model gives scripted answers."""
    import io
    import sys

    from slm import loading

    def run(lines: list[str], answers: list[str], *options: str) -> Any:
        load_ = loading.load

        def scripted(*args: Any, **kwargs: Any) -> Model:
            loaded = load_(*args, **kwargs)
            assert isinstance(loaded, Model)
            script(monkeypatch, loaded, answers)
            return loaded

        monkeypatch.setattr(loading, "load", scripted)
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
        result = slm("chat", roomy, "--greedy", "--max-new-tokens", "400", *options)
        monkeypatch.setattr(loading, "load", load_)
        return result

    return run


FILE = '''
def double(number: int) -> int:
    """Doubles a number."""
    return 2 * number
'''


def test_slm_chat_calls_the_functions_of_a_file(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    save = tmp_path / "talk.jsonl"
    lines = ["Double 4.", f"/save {save}"]
    result = talking(lines, [f"Wait.\n{written([CALL])}", "It is 8."], "--tools", str(tmp_path / "tools.py"))
    assert result.code == 0, result.err
    assert result.out == "Wait.\nIt is 8.\n"  # the text of the call is not shown
    assert 'call: double {"number": 4}' in result.err and "result of double: 8" in result.err
    row = json.loads(save.read_text())
    assert row["tools"][0]["function"]["name"] == "double"
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "double", "arguments": '{"number": 4}'}
    assert row["messages"][2] == {"role": "tool", "content": "8", "tool_call_id": "call_0"}
    from slm.finetune.rows import read_rows

    (read,) = read_rows(save)
    assert isinstance(read, ChatRow) and read.messages[1]["calls"] == (CALL,)


def test_slm_chat_reads_results_of_declared_tools(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([DECLARED]))
    look = written([Call("look", {}), Call("look", {})])
    lines = ["Look twice.", "a cat", "/help", "//dog", "Thanks."]
    result = talking(lines, [look, "A cat and a dog.", "Bye."], "--tools", str(tmp_path / "tools.json"), "--json")
    assert result.code == 0, result.err
    first, second, third = map(json.loads, result.out.splitlines())
    assert first["calls"] == [{"name": "look", "arguments": {}}] * 2
    assert (second["text"], second["calls"], third["text"]) == ("A cat and a dog.", [], "Bye.")


@pytest.mark.parametrize("cut", [None, 60], ids=["a tool that is not declared", "cut within a call"])
def test_slm_chat_shows_text_that_resembles_a_call(
    talking: Callable[..., Any], tmp_path: Path, cut: int | None
) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    answer = f"Wait.\n{written([CALL if cut else Call('other', {})])}"[:cut]
    result = talking(["Double 4."], [answer], "--tools", str(tmp_path / "tools.py"))
    assert result.code == 0 and result.out == f"{answer}\n"
    assert "dropped" not in result.err and "call: " not in result.err


def test_slm_chat_shows_text_after_a_call(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    result = talking(["Go."], [f"One. {written([CALL])} Two.", "Done."], "--tools", str(tmp_path / "tools.py"))
    assert result.out == "One.\nTwo.\nDone.\n"


def test_slm_chat_counts_rounds_for_each_request(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FILE)
    answers = [*[written([CALL])] * MOST_ROUNDS, "Eight."]
    result = talking(["Double 4.", "/retry"], answers * 2, "--tools", str(tmp_path / "tools.py"))
    assert result.code == 0 and result.out.split() == ["Eight."] * 2
    result = talking(["Double 4."], [written([CALL])] * (MOST_ROUNDS + 1), "--tools", str(tmp_path / "tools.py"))
    assert "the question was dropped" in result.err


def test_slm_chat_shows_results_as_one_line(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("def double(number: int) -> str:\n    return '8\\x1b[31m\\n' + '9' * 999\n")
    result = talking(["Double 4."], [written([CALL]), "It is 8."], "--tools", str(tmp_path / "tools.py"))
    (line,) = [line for line in result.err.splitlines() if "result of double" in line]
    assert line.startswith("result of double: 8 [31m 999") and len(line) < 300 and "\x1b" not in result.err


def test_slm_chat_says_what_is_wrong_with_a_file(talking: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("x = ")
    result = talking([], [], "--tools", str(tmp_path / "tools.py"))
    assert result.code == 1 and "tools.py failed: SyntaxError" in result.err and "Traceback" not in result.err
