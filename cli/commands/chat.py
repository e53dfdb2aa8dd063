"""`slm chat`."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.choosing import default_model
from slm.cli.commands.generate import figures
from slm.cli.console import one_line, print_json, say, say_error
from slm.cli.following import after_checkpoint, next_step, slm_command
from slm.cli.options import Artifact, json_option
from slm.cli.sampling import Sections, TextOptions, generation_options, listen, say_backend, utf8
from slm.core.call_stream import CallPart, CallStream
from slm.core.chat import knows_turns
from slm.core.checkpoint import INFO_FILE, read_info
from slm.core.errors import SlmError
from slm.core.files import read_text, write_text
from slm.core.machine import return_freed_memory
from slm.core.manifest import Bundle, is_bundle
from slm.core.tool_fields import openai_messages
from slm.core.tools import arguments_text

if TYPE_CHECKING:
    from concurrent.futures import Future

    from slm.runtime.chat import Chat
    from slm.runtime.functions import Toolbox
    from slm.runtime.generation import Piece
    from slm.runtime.model import Model
    from slm.runtime.options import GenerationOptions
    from slm.runtime.streaming import Stream

_COMMANDS = {
    "/help": "list the commands",
    "/reset": "begin a new conversation",
    "/system TEXT": "begin a new conversation with the system message TEXT; without TEXT, with none",
    "/retry": "replace the last answer by another one",
    "/save FILE": "append the conversation to FILE as a row for slm finetune; interrupted answers have the weight 0",
    "/quit": "end the conversation, like Ctrl-D",
}


# Most seconds to wait for the model before the prompt appears. Small models load in less.
_LOADED_AT_ONCE_S = 0.3
_PROMPT = "> "


class _Quit(Exception):
    """Ends the conversation."""


@click.command(cls=Sections)
@click.argument("model", type=Artifact(), required=False)
@click.option("--system", default="", metavar="TEXT", help="System message.")
@click.option(
    "--tools",
    type=click.Path(path_type=Path),
    metavar="FILE.py|FILE.json",
    help="Tools that the model may call: the functions of a .py file, which is executed, or declarations in JSON.",
)
@click.option(
    "--tool-choice",
    default="auto",
    show_default=True,
    metavar="auto|none|required|NAME",
    help="Whether an answer may call tools, must not, must, or must call the tool NAME. Answers to results may be text.",
)
@json_option
@generation_options
def chat(
    model: Path | None, system: str, tools: Path | None, tool_choice: str, as_json: bool, options: TextOptions
) -> None:
    """Chat with a bundle (onnxruntime) or a checkpoint (PyTorch) that was fine-tuned on conversations.

    Without MODEL, uses the newest finished model under ./runs, or the bundled demo model if there is none. Every request
    contains the whole conversation; if it no longer fits into the context, the oldest exchanges are dropped. Lines that begin
    with a slash are commands, and /help lists them; // begins a line with a slash. Ctrl-C ends an answer and keeps the
    conversation; pressed twice at the prompt it ends the conversation, as Ctrl-D does. From a pipe every line is a turn; with
    --json every answer is one object.

    With --tools the model may call tools. The functions of a .py file need type hints and docstrings; their calls are made, and
    the model reads the results. For declarations in JSON (OpenAI's list of tools) the next lines are the results. The arguments
    of calls follow the schemas of the tools if llguidance is installed, as in slm serve.

    \b
      slm chat runs/tiny/onnx-int8
      slm chat --system "Be brief." --temperature 0.3
      printf 'Hi.\\nTell me more.\\n' | slm chat --greedy
      slm chat --tools home.py
      slm chat --tools home.py --tool-choice required
    """
    converse(model, system, as_json, options, tools, tool_choice)


def converse(
    model: Path | None,
    system: str,
    as_json: bool,
    options: TextOptions,
    tools: Path | None = None,
    tool_choice: str = "auto",
) -> None:
    """Talks with a model until the input ends.

    Args:
        model: A bundle or a checkpoint; None for the newest.
        system: The system message.
        as_json: Whether each answer is printed as a JSON object.
        options: The options for running the model and sampling.
        tools: A file of tools that the model may call; None for none.
        tool_choice: "auto", "none", "required", or the name of a tool.
    """
    from slm.loading import load
    from slm.runtime.functions import Toolbox, load_tools
    from slm.runtime.tool_choice import check_choice

    return_freed_memory()
    box = Toolbox() if tools is None else load_tools(tools.expanduser())
    check_choice(tool_choice, box.tools)
    if tool_choice == "none":
        box = Toolbox()
    path = model or default_model()

    loaded = partial(load, path, adapter=options.adapter, **options.loading)

    def opened(model: "Model") -> _Talk:
        return _Talk(_conversation(path, model, system, options, box, tool_choice), as_json, box)

    with suppress(_Quit):
        if sys.stdin.isatty():
            with ThreadPoolExecutor(1) as background:
                _read_terminal(background.submit(loaded), opened)
        else:
            talk = opened(loaded())
            for line in _piped():
                talk.hear(line)
    next_step(slm_command("serve", *([] if model is None else [model])) if is_bundle(path) else after_checkpoint(path))


def _conversation(
    path: Path, loaded: "Model", system: str, options: TextOptions, box: "Toolbox", tool_choice: str
) -> tuple["Chat", "GenerationOptions"]:
    """Begins a conversation, and says how its model is run. Returns it with the options of an answer."""
    from slm.runtime.chat import Chat

    say_backend(path, loaded.decoder, options.loading)
    if (info := _made(path, options.adapter)) and not knows_turns(info, loaded.tokenizer):
        say(
            "note: this model was trained on plain text and continues it rather than answering; slm finetune trains on turns"
        )
    generation: GenerationOptions = {**options.generation}
    seed = generation.pop("seed")  # the conversation's: each answer has its own
    conversation = Chat(
        loaded,
        utf8(system, "system's text"),
        seed=seed,
        draft_tokens=options.draft,
        tools=box,
        tool_choice=tool_choice,
    )
    if conversation.unconstrained:
        say(f"note: calls may not follow the schemas of the tools: {conversation.unconstrained}")
    if generation["temperature"] > 0:
        say(f"seed: {conversation.seed} (--seed {conversation.seed} gives the same answers to the same lines)")
    return conversation, generation


def _made(path: Path, adapter: Path | None) -> dict[str, Any]:
    """Returns the recorded training of a model or its adapter; empty if there is no record."""
    if adapter is not None:
        return {"finetuned": read_info(adapter)}
    if not is_bundle(path):
        return read_info(path)
    info = Bundle.open(path, trust=True).manifest.provenance.get(INFO_FILE)
    return info if isinstance(info, dict) else {}


def _read_terminal(loading: "Future[Model]", opened: "Callable[[Model], _Talk]") -> None:
    """Reads lines from a terminal until Ctrl-D, /quit, or Ctrl-C twice at the prompt. Lines can be edited and recalled.

    The first line can be written while a large model loads.

    Args:
        loading: The model, which another thread loads.
        opened: Begins the conversation with it.

    Raises:
        SlmError: If the model cannot be loaded.
        _Quit: If the user enters /quit.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it if it is available
    wait([loading], _LOADED_AT_ONCE_S)
    talk = opened(loading.result()) if loading.done() else None
    if talk is None:
        say("the model is loading; the first line can be written already")
    say("/help shows the commands; Ctrl-D ends")
    again = answering = False
    while True:
        try:
            answering = False
            line = input(_PROMPT if talk is None else talk.prompt)
            answering, again = True, False
            talk = talk or opened(loading.result())
            talk.hear(line)
        except EOFError:
            click.echo()
            return
        except SlmError as error:
            if talk is None:
                raise
            say_error(error.message, error.hint)
        except KeyboardInterrupt:
            if answering:
                say("interrupted; the conversation continues, /quit or Ctrl-D ends it")
                continue
            click.echo()  # leaves the unfinished line
            if again:
                return
            again = True
            say("press Ctrl-C again, Ctrl-D or /quit to end the conversation")


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise SlmError(
            f"standard input is not UTF-8 text (byte {error.start})", "convert it, for example with iconv"
        ) from None


class _Talk:
    """Processes lines and shows the answers."""

    def __init__(self, conversation: tuple["Chat", "GenerationOptions"], as_json: bool, box: "Toolbox") -> None:
        self._chat, self._options = conversation
        self._as_json, self._box = as_json, box
        self._results: list[str] = []  # of the calls of the last answer, as far as they are known
        self._rounds = 0

    @property
    def prompt(self) -> str:
        """The prompt of the next line; if the line is the result of a call, it names the tool."""
        return f"result of {self._chat.calls[len(self._results)].name}{_PROMPT}" if self._chat.calls else _PROMPT

    def hear(self, line: str) -> None:
        """Processes a line: a command, or a message.

        Raises:
            SlmError: If the command is unknown, or there is no answer.
            KeyboardInterrupt: If Ctrl-C ended the answer. The generated part is in the conversation then.
        """
        waits = bool(self._chat.calls)
        if not utf8(line, "line").strip() and not waits:
            return
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            self._command(name, rest.strip())
            return
        if waits:
            self._results.append(line)
            self._continue()
            return
        self._begin(lambda: self._chat.pieces(line, **self._options))

    def _command(self, name: str, rest: str) -> None:
        match name:
            case "/help":
                for command, what in _COMMANDS.items():
                    say(f"{command:14} {what}")
            case "/reset":
                self._chat.reset()
                say("the conversation is empty")
            case "/system":
                self._chat.reset(rest)
                say("a new conversation" + (f", system message: {rest}" if rest else ""))
            case "/retry":
                self._begin(lambda: self._chat.retry_pieces(**self._options))
            case "/save":
                self._save(rest)
            case "/quit" | "/exit":
                raise _Quit
            case _:
                raise SlmError(f"{name} is not a command", "/help lists the commands; // begins a line with a slash")

    def _begin(self, ask: "Callable[[], Stream[Piece]]") -> None:
        """Shows the answer to a request, and the answers to the results of its calls."""
        self._rounds, self._results = 0, []
        self._answer(ask)

    def _answer(self, ask: "Callable[[], Stream[Piece]]") -> None:
        forgotten = self._chat.forgotten
        answer = ask()
        if self._chat.forgotten > forgotten:
            say(f"the context is full: exchanges dropped so far: {self._chat.forgotten}")
        with closing(answer):
            made, interrupted = listen(self._visible(answer) if self._box.tools else answer, show=not self._as_json)
        text, result = "".join(piece.text for piece in made), answer.result
        calls = self._chat.calls
        if not self._as_json:
            click.echo()
        else:
            shown: dict[str, Any] = (
                {} if result.seed is None else {"seed": self._chat.seed}
            )  # reproduces the conversation
            made_calls = [{"name": call.name, "arguments": call.arguments} for call in calls]
            print_json({"text": text} | ({"calls": made_calls} if self._box.tools else {}) | figures(result) | shown)
            sys.stdout.flush()
        if not result.text.strip():
            say("the answer is empty, and the question was dropped")
        if interrupted:
            raise KeyboardInterrupt
        if result.text.strip() and result.stopped in ("length", "context"):
            say(
                f"cut after {len(result.tokens)} tokens: "
                + ("--max-new-tokens" if result.stopped == "length" else "the context is full")
            )
        for call in calls:
            say(f"call: {call.name} {arguments_text(call)}")
        if calls:
            self._continue()

    def _continue(self) -> None:
        """Makes calls of functions, and continues the answer when each call has a result."""
        from slm.runtime.chat import MOST_ROUNDS

        calls = self._chat.calls
        while len(self._results) < len(calls) and calls[len(self._results)].name in self._box.functions:
            call = calls[len(self._results)]
            self._results.append(self._box.functions[call.name].result(call))
            say(f"result of {call.name}: {one_line(self._results[-1])}")
        if len(self._results) < len(calls):
            return
        results, self._results = self._results, []
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            self._chat.abandon()
            say(f"the model called tools {MOST_ROUNDS} times without an answer, and the question was dropped")
            return
        self._answer(lambda: self._chat.result_pieces(results, **self._options))

    def _visible(self, answer: "Stream[Piece]") -> "Iterator[Piece]":
        """Yields the pieces of an answer without the text of its calls.

        Text after the beginning of a call comes last: only the whole answer shows whether it calls a tool or is text.
        """
        from slm.runtime.generation import Piece

        stream = CallStream(self._chat.style)
        said = ""
        for piece in answer:
            before = "" if stream.begun else _text_before_a_call(stream.push(piece.text))
            said += before
            yield replace(piece, text=before)
        if self._chat.calls:
            rest = self._chat.messages[-1]["content"].removeprefix(said.strip())
        else:
            rest = answer.result.text[len(said) :]
        if rest:
            yield Piece(rest)

    def _save(self, name: str) -> None:
        if not name:
            raise SlmError("/save needs a file", "/save talk.jsonl")
        if not any(message["role"] == "assistant" for message in self._chat.messages):
            raise SlmError("the conversation has no answer yet", "enter a message")
        path = Path(name).expanduser()
        before = read_text(path, "the file to append to") if path.exists() else ""
        # The weight 0 of OpenAI's format excludes an interrupted answer from the loss.
        whole = self._chat.messages[:-1] if self._chat.calls else self._chat.messages
        messages = [
            row | ({"weight": 0} if self._chat.was_interrupted(message) else {})
            for row, message in zip(openai_messages(whole), whole, strict=True)
        ]
        tools = {"tools": [tool.declaration for tool in self._box.tools]} if self._box.tools else {}
        row = json.dumps({"messages": messages} | tools, ensure_ascii=False)
        write_text(path, before + ("\n" if before and not before.endswith("\n") else "") + row + "\n")
        say(f"appended to {path}")


def _text_before_a_call(parts: "Sequence[str | CallPart]") -> str:
    said = ""
    for part in parts:
        if not isinstance(part, str):
            break
        said += part
    return said
