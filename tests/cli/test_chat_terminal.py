"""`slm chat` at a terminal and in a pipe, with real Ctrl-C: what ends an answer, what ends the conversation."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.finetune.rows import read_rows

# Runs slm and says when a text has begun.
COUNTING = Path(__file__).parent / "scripts" / "slm_counting.py"
LOADING_SLOWLY = Path(__file__).parent / "scripts" / "slm_loading_slowly.py"

CTRL_C, CTRL_D = b"\x03", b"\x04"
# Without its ends a text goes on until it is stopped.
ENDLESS = ("--max-new-tokens", "1000000", "--on-full", "slide", "--logit-bias", "0=-inf", "--logit-bias", "2=-inf")
_PATIENCE_S = 60


class Terminal:
    """A command whose standard streams are a terminal of its own."""

    def __init__(self, *arguments: object, program: Sequence[object] = ("-m", "slm")) -> None:
        self._ours, theirs = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there is SIGINT

        self.process = subprocess.Popen(
            [sys.executable, *map(str, (*program, *arguments))],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_terminal,  # no other thread is in the middle of anything
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)
        self.shown = self._unread = ""

    def _read(self, missing: str) -> None:
        ready, _, _ = select.select([self._ours], [], [], _PATIENCE_S)
        assert ready, f"{missing} did not come: {self._unread!r}"
        try:
            read = os.read(self._ours, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            raise AssertionError(f"{missing} did not come before the end: {self._unread!r}") from None
        self._unread += read
        self.shown += read

    def until(self, text: str) -> None:
        """Reads up to a text and over it."""
        while text not in self._unread:
            self._read(repr(text))
        self._unread = self._unread.partition(text)[2]

    def prompt(self) -> None:
        """Reads up to the prompt, and waits until a key is waited for: before that, CPython keeps Ctrl-C until the next key."""
        self.until("> ")
        stat = Path(f"/proc/{self.process.pid}/stat")
        asleep = 0
        while asleep < 4:
            time.sleep(0.05)
            asleep = asleep + 1 if stat.read_text().rpartition(")")[2].split()[0] == "S" else 0

    def some(self, characters: int) -> None:
        """Reads so many characters."""
        while len(self._unread) < characters:
            self._read(f"{characters} characters")
        self._unread = ""

    def rest(self) -> int:
        """Reads to the end and returns the exit code."""
        try:
            while data := os.read(self._ours, 4096):
                self.shown += data.decode(errors="replace")
        except OSError:  # Linux's end of a terminal
            pass
        return self.process.wait(_PATIENCE_S)

    def type(self, text: bytes) -> None:
        """Types."""
        os.write(self._ours, text)

    def close(self) -> None:
        """Ends the command, if need be."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(shared_bundle: Bundle) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*options: object, **program: Sequence[object]) -> Terminal:
        opened.append(Terminal("chat", shared_bundle.path, "--threads", 1, "--seed", 3, *options, **program))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(*ENDLESS)
    chat.prompt()
    chat.type(b"/help\n")  # on a busy machine the model loads until now
    chat.until("like Ctrl-D")
    chat.prompt()
    chat.type(b"Hello there.\n")
    chat.until("Hello there.")
    chat.some(40)  # of the answer
    chat.type(CTRL_C)
    chat.until("interrupted; the conversation continues")
    chat.prompt()
    chat.type(b"half a line" + CTRL_C)
    chat.until("press Ctrl-C again, Ctrl-D or /quit to end the conversation")
    chat.prompt()
    chat.type(b"And more?\n")  # after which Ctrl-C has to be pressed twice again
    chat.until("And more?")
    chat.some(40)
    chat.type(CTRL_C)
    chat.until("interrupted; the conversation continues")
    chat.prompt()
    chat.type(b"/save talk.jsonl\n")
    chat.until("appended to talk.jsonl")
    chat.prompt()
    chat.type(CTRL_C)
    chat.until("Ctrl-C again")
    chat.prompt()
    chat.type(CTRL_C)
    assert chat.rest() == 0
    assert "next: slm serve " in chat.shown and "Traceback" not in chat.shown and "error" not in chat.shown
    (row,) = [json.loads(line) for line in Path("talk.jsonl").read_text().splitlines()]
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
    assert asked == ["Hello there.", "And more?"]  # the half line is no part of it
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    assert all(each["content"].strip() and each["weight"] == 0 for each in answers)
    with pytest.raises(SlmError, match="every answer has weight 0"):  # nothing of it is learned
        read_rows(Path("talk.jsonl"))


def test_a_whole_answer_has_no_weight(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--max-new-tokens", 12, "--temperature", 1.5)
    chat.prompt()
    chat.type(b"Hello.\n")
    chat.prompt()
    chat.type(b"/save talk.jsonl\n")
    chat.until("appended to talk.jsonl")
    chat.prompt()
    chat.type(CTRL_D)
    assert chat.rest() == 0
    assert "weight" not in Path("talk.jsonl").read_text()


def test_the_first_line_can_be_written_while_the_model_loads(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--max-new-tokens", 12, program=(LOADING_SLOWLY, "gate"))
    chat.until("the model is loading")
    chat.prompt()
    chat.type(b"Hello.\n")
    assert "seed: 3" not in chat.shown
    Path("gate").touch()
    chat.until("seed: 3")
    chat.prompt()
    chat.type(b"/save talk.jsonl\n")
    chat.until("appended to talk.jsonl")
    chat.prompt()
    chat.type(CTRL_D)
    assert chat.rest() == 0
    (row,) = [json.loads(line) for line in Path("talk.jsonl").read_text().splitlines()]
    assert row["messages"][0] == {"role": "user", "content": "Hello."}


def test_a_model_that_fails_to_load_ends_the_conversation_at_the_first_line(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(program=(LOADING_SLOWLY, "gate"))
    chat.until("the model is loading")
    chat.prompt()
    Path("gate").write_text("the weights are damaged")
    chat.type(b"Hello.\n")
    assert chat.rest() == 1
    assert "error: the weights are damaged" in chat.shown and "Traceback" not in chat.shown


@pytest.mark.parametrize("ends", [CTRL_D, b"/quit\n", CTRL_C + CTRL_C])
def test_a_conversation_without_a_word_ends_politely(terminal: Callable[..., Terminal], ends: bytes) -> None:
    chat = terminal()
    chat.prompt()
    chat.type(ends[:1] if ends == CTRL_C + CTRL_C else ends)
    if ends == CTRL_C + CTRL_C:
        chat.until("Ctrl-C again")
        chat.prompt()
        chat.type(CTRL_C)
    assert chat.rest() == 0 and "Traceback" not in chat.shown


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_a_pipe_with_what_was_said_so_far(shared_bundle: Bundle, as_json: bool) -> None:
    command = [sys.executable, str(COUNTING), "chat", str(shared_bundle.path), "--threads", "1", *ENDLESS]
    with subprocess.Popen(
        command + ["--json"] * as_json, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("Hello.\nNever answered.\n")
        process.stdin.flush()
        while "token read" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-2].startswith("error: interrupted")
    if as_json:
        (answer,) = [json.loads(line) for line in out.splitlines()]
        assert answer["stopped"] == "interrupted" and answer["tokens"]
    else:
        assert out.strip()


def test_the_seed_that_is_printed_repeats_the_conversation(shared_bundle: Bundle) -> None:
    def talk(*options: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "slm", "chat", str(shared_bundle.path), "--max-new-tokens", "12", *options]
        done = subprocess.run(command, input=b"Hi.\nMore.\n", capture_output=True, check=True)
        return (
            done.stdout.decode(),
            done.stderr.decode(),
        )  # not as text, which would make line feeds of carriage returns

    first, said = talk()
    (seed,) = re.findall(r"^seed: (\d+) ", said, flags=re.MULTILINE)
    assert talk("--seed", seed)[0] == first
    answers = [json.loads(line) for line in talk("--json")[0].strip("\n").split("\n")]
    assert answers[0]["seed"] == answers[1]["seed"]
    again, _ = talk("--seed", str(answers[0]["seed"]))
    assert again == "".join(f"{answer['text']}\n" for answer in answers)
    assert "seed" not in talk("--greedy")[1]
