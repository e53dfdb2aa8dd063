"""`slm chat`: turns from a pipe and from a keyboard, its commands, and the options of `slm generate`."""

import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.cli.commands import chat as command
from slm.cli.commands.chat import chat
from slm.cli.commands.generate import generate
from slm.core.manifest import Bundle
from slm.export.bundle import export_bundle
from slm.finetune.rows import ChatRow, read_rows
from slm.loading import load
from slm.runtime.chat import Chat

Slm = Callable[..., Any]

# Bold, for the likeliest tokens of a random model are bytes that make up no text.
SHORT = (
    "--seed",
    "0",
    "--max-new-tokens",
    "12",
    "--temperature",
    "1.5",
    "--top-p",
    "1",
    "--top-k",
    "0",
    "--threads",
    "1",
)
BOLD: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0}


@pytest.fixture
def piped(slm: Slm, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Slm:
    """Pipes lines into `slm chat`."""

    def run(*lines: str, options: tuple[str, ...] = SHORT, model: Path | None = None) -> Any:
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), "utf-8")
        )
        return slm("chat", model or shared_bundle.path, *options)

    return run


@pytest.fixture
def typed(slm: Slm, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Slm:
    """Types lines at `slm chat`, which believes that it has a keyboard."""

    def run(*lines: str, options: tuple[str, ...] = SHORT) -> Any:
        left = iter(lines)

        def answer(prompt: str) -> str:
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", answer)
        keyboard = io.StringIO()
        monkeypatch.setattr(keyboard, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", keyboard)
        return slm("chat", shared_bundle.path, *options)

    return run


def answers(bundle: Bundle, *requests: str, system: str = "", seed: int = 0) -> list[str]:
    talk = Chat(load(bundle.path, threads=1), system)
    return ["".join(piece.text for piece in talk.pieces(request, seed=seed, **BOLD)) for request in requests]


def test_every_line_of_a_pipe_is_a_turn(piped: Slm, shared_bundle: Bundle) -> None:
    result = piped("Hi.", "", "Tell me more.")
    assert result.code == 0, result.err
    assert result.out == "".join(f"{answer}\n" for answer in answers(shared_bundle, "Hi.", "Tell me more."))
    # the control: the second turn without the first, drawn alike
    alone = (answers(shared_bundle, request, seed=seed)[0] for seed, request in enumerate(("Hi.", "Tell me more.")))
    assert result.out != "".join(f"{answer}\n" for answer in alone)


def test_a_checkpoint_answers_too(piped: Slm, shared_checkpoint: Path) -> None:
    result = piped("Hi.", model=shared_checkpoint)
    assert result.code == 0 and result.out.strip() and "PyTorch" in result.err


def test_every_answer_is_an_object_for_machines(piped: Slm, shared_bundle: Bundle) -> None:
    found = [json.loads(line) for line in piped("Hi.", "And?", options=(*SHORT, "--json")).out.splitlines()]
    assert [each["text"] for each in found] == answers(shared_bundle, "Hi.", "And?")
    assert all(len(each["tokens"]) == 12 and each["stopped"] == "length" for each in found)


def test_a_model_that_knows_no_turns_is_noted(piped: Slm, shared_checkpoint: Path, tmp_path: Path) -> None:
    note = "note: this model was trained on plain text"
    assert note in piped("Hi.").err and note in piped("Hi.", model=shared_checkpoint).err
    tuned = tmp_path / "tuned"
    shutil.copytree(shared_checkpoint, tuned)
    for info, noted in (({"finetuned": {"turns": True}}, False), ({"finetuned": {"turns": False}}, True), ({}, False)):
        (tuned / "slm.json").write_text(json.dumps(info))
        assert (note in piped("Hi.", model=tuned).err) is noted
    (tuned / "slm.json").write_text(json.dumps({"merged": {"finetune": {"turns": True}}}))
    assert note not in piped("Hi.", model=export_bundle(tuned, tmp_path / "onnx").path).err


def test_nothing_piped_in_is_no_conversation(piped: Slm) -> None:
    result = piped()
    assert (result.code, result.out) == (0, "")


def test_the_options_are_those_of_generate(piped: Slm) -> None:
    own = {"model", "system", "tools", "tool_choice", "as_json"}
    theirs = {"models", "ensemble", "prompt", "instruct", "as_json", "logprobs"}
    options = {option.name: option for option in chat.params if option.name not in own}
    for option in generate.params:
        if option.name not in theirs:
            assert options.pop(option.name).to_info_dict() == option.to_info_dict()
    assert not options
    bold = ("--seed", "0", "--max-new-tokens", "20", "--temperature", "1.5", "--top-p", "1")
    drawn = [
        piped("Hi.", options=(*bold, *more)).out for more in ((), ("--seed", "4"), ("--top-k", "1"), ("--stop", "e"))
    ]
    assert len(set(drawn)) == 4


def test_the_system_is_told_first(piped: Slm, shared_bundle: Bundle) -> None:
    (told,) = answers(shared_bundle, "Hi.", system="Count.")
    assert piped("Hi.", options=(*SHORT, "--system", "Count.")).out == f"{told}\n"
    assert piped("/system Count.", "Hi.").out == f"{told}\n"
    (plain,) = answers(shared_bundle, "Hi.")
    assert piped("/system Count.", "/system", "Hi.").out == f"{plain}\n" != f"{told}\n"


def test_reset_forgets_and_retry_asks_again(piped: Slm) -> None:
    lines = ("Hi.", "/reset", "Hi.", "And?", "/retry")
    greedy = piped(*lines, options=("--max-new-tokens", "12", "--greedy")).out.splitlines()
    assert greedy[0] == greedy[1] and greedy[2] == greedy[3]
    drawn = piped(*lines).out.splitlines()
    assert len(drawn) == 4 and drawn[2] != drawn[3]


def test_a_conversation_is_saved_as_a_row_to_learn(piped: Slm, shared_bundle: Bundle) -> None:
    Path("talk.jsonl").write_text('{"text": "there before"}', encoding="utf-8")
    result = piped("½ Hi.", "/save talk.jsonl", "/reset", "One.", "/save talk.jsonl")
    assert result.code == 0 and "appended to talk.jsonl" in result.err
    _, first, second = read_rows(Path("talk.jsonl"))
    (answer,) = answers(shared_bundle, "½ Hi.")
    assert isinstance(first, ChatRow) and isinstance(second, ChatRow)
    assert [message["content"] for message in first.messages] == ["½ Hi.", answer.strip()]
    assert second.messages[0]["content"] == "One."


def test_help_names_every_command_and_quit_ends(piped: Slm) -> None:
    result = piped("/help", "/quit", "Hi.")
    assert (result.code, result.out) == (0, "")
    assert all(name.split()[0] in result.err for name in command._COMMANDS)


def test_two_slashes_begin_a_line_with_one(piped: Slm, shared_bundle: Bundle) -> None:
    assert piped("//help").out == f"{answers(shared_bundle, '/help')[0]}\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("/nothing",), "/nothing is not a command"),
        (("/retry",), "there is no request to retry"),
        (("/save",), "/save needs a file"),
        (("/save talk.jsonl",), "the conversation has no answer yet"),
        (("Hi.", "/save ."), "is a directory"),
        (("word " * 500,), "context"),
        (("\udcff",), "not UTF-8"),
    ],
)
def test_what_cannot_be_ends_a_pipe_and_not_a_conversation(
    piped: Slm, typed: Slm, lines: tuple[str, ...], said: str
) -> None:
    result = piped(*lines, "Hi.")
    assert result.code == 1 and said in result.err and "Traceback" not in result.err
    if said == "not UTF-8":
        return  # nobody types that
    result = typed(*lines, "Hi.")
    assert result.code == 0 and said in result.err and result.out.count("\n") >= 1
    assert not Path("talk.jsonl").exists()


def test_a_keyboard_is_told_how_to_go_on(typed: Slm, piped: Slm) -> None:
    assert "/help shows the commands" in typed("Hi.").err
    assert "/help shows the commands" not in piped("Hi.").err


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    typed: Slm, monkeypatch: pytest.MonkeyPatch, shared_bundle: Bundle
) -> None:
    pieces = Chat._recorded
    times = iter([0, 6])

    def interrupted(self: Chat, made: Any) -> Any:
        stop = next(times, None)

        def some() -> Any:
            for number, piece in enumerate(made):
                if number == stop:
                    raise KeyboardInterrupt
                yield piece

        return pieces(self, some())

    monkeypatch.setattr(Chat, "_recorded", interrupted)
    result = typed("Never heard.", "Hi.", "/save talk.jsonl")
    assert result.code == 0, result.err
    assert result.err.count("interrupted; the conversation continues, /quit or Ctrl-D ends it") == 2
    (row,) = [json.loads(line) for line in Path("talk.jsonl").read_text().splitlines()]
    (whole,) = answers(shared_bundle, "Hi.", seed=1)  # the second that is asked
    said = [message["content"] for message in row["messages"]]
    assert said[0] == "Hi." and whole.strip().startswith(said[1]) and said[1] != whole.strip()


def test_wrong_usage_exits_with_2(piped: Slm) -> None:
    assert piped("Hi.", options=("--keep", "3")).code == 2
    assert piped("Hi.", options=("--top-p", "2")).code == 2
