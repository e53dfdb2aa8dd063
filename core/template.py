"""Renders chat templates of imported models in a long-lived child process with limits of time and memory.

A template is a Jinja program that comes with a model. It runs in Jinja's sandbox, which blocks access to Python's internals,
and in a separate process, which ends if it exceeds limits of time or memory (`slm.core.bounded`). A process is needed
because one long call cannot be interrupted from within, and Jinja offers many such calls. This module is the parent's side;
`template_worker` is the child's.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from slm.core.bounded import BoundedProcess, Limits
from slm.core.errors import SlmError
from slm.core.template_worker import MAX_BYTES, MAX_TEXT_CHARACTERS

MAX_TEMPLATE_CHARACTERS = 64 << 10
# The limit of CPU time for one rendering, in seconds.
MAX_SECONDS = 4
# The limit of wall-clock time for one rendering, which is longer for busy machines.
_MAX_WAIT_SECONDS = 2 * MAX_SECONDS
# The limit of wall-clock time for the start of a process, which takes 0.2 s on an idle machine.
_START_SECONDS = 60
# The limit of a reply: a rendered text in JSON takes at most six bytes per character.
_MAX_REPLY_BYTES = 6 * MAX_TEXT_CHARACTERS + 1024
# The limit of characters to send at a time. Parent and child also hold them as JSON.
_CHARACTERS_AT_ONCE = 1 << 20
# A rendering takes about a millisecond. If callers wait and no process has finished anything for this time, another process
# is started, so that one slow conversation does not delay the others. The number of processes is limited, because they take
# memory and CPU time from other work.
_PATIENCE_SECONDS = 0.05
_MAX_PROCESSES = 4
_HINT = "the chat template is part of the model; without --instruct it is not used"

# The messages, whether to append the start of the model's turn, and the declarations of tools, if there are any.
Conversation = tuple[Sequence[Mapping[str, Any]], bool, Sequence[Mapping[str, Any]] | None]


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> str:
    """Returns a conversation rendered by a template, with the start of the model's turn.

    Args:
        template: The template, in transformers' dialect of Jinja.
        messages: Objects with "role" and "content".
        tokens: Special tokens by the names that templates use, such as "bos_token".

    Raises:
        SlmError: If the template fails, rejects the conversation or exceeds a limit.
    """
    (text,) = render_all(template, [(messages, True, None)], tokens)
    if isinstance(text, SlmError):
        raise text
    return text


def render_all(template: str, conversations: Sequence[Conversation], tokens: Mapping[str, Any]) -> list[str | SlmError]:
    """Renders several conversations; if the template rejects one, the others are still rendered.

    Safe to call from several threads at once.

    Args:
        template: The template.
        conversations: The messages of each, whether to append the start of the model's turn, and the declared tools.
        tokens: As for `render`.

    Returns:
        The text of each conversation, or the template's error.

    Raises:
        SlmError: If a conversation exceeds a limit of time or memory.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise SlmError(
            f"the chat template has {len(template):,} characters; the limit is {MAX_TEMPLATE_CHARACTERS:,}", _HINT
        )
    answers: list[dict[str, Any]] = []
    limits = Limits(_MAX_WAIT_SECONDS, MAX_SECONDS, MAX_BYTES)
    with _PROCESSES.one() as process:
        try:
            for some in _portions(conversations):
                request: dict[str, Any] = {"template": template, "conversations": some, "tokens": dict(tokens)}
                request |= {"seconds": MAX_SECONDS, "wall_seconds": _MAX_WAIT_SECONDS}
                process.send(json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"), limits)
                answers += [json.loads(process.receive(limits)) for _ in some]
        except TimeoutError:
            process.end()
            raise _failed(f"it takes longer than {_MAX_WAIT_SECONDS} s") from None
        except (OSError, ValueError):
            process.end()
            raise _failed(f"it takes more than {MAX_SECONDS} s or too much memory") from None
        if answers and answers[-1]["large"]:
            process.end()
    return [answer["text"] if "text" in answer else _failed(answer["reason"]) for answer in answers]


def _portions(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Yields the conversations in batches of limited length; a long one is a batch of its own."""
    some: list[Conversation] = []
    characters = 0
    for each in conversations:
        messages, _, tools = each
        size = sum(len(str(message)) for message in messages) + len(str(tools))
        if some and characters + size > _CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
        some.append(each)
        characters += size
    if some:
        yield some


def _failed(reason: str) -> SlmError:
    return SlmError(f"the chat template failed: {reason}", _HINT)


def _start() -> BoundedProcess:
    try:
        code = "from slm.core.template_worker import work; work()"
        return BoundedProcess(code, _MAX_REPLY_BYTES, _START_SECONDS)
    except OSError as error:
        raise _failed(f"its process could not start ({' '.join(str(error).split())})") from None


class _Processes:
    """A pool that keeps one process, and adds a few more while it is busy with a slow conversation."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[BoundedProcess] = []
        self._all: set[BoundedProcess] = set()
        self._starting = False
        self._progress = 0.0  # time when a process was last acquired, released or started

    @contextmanager
    def one(self) -> Iterator[BoundedProcess]:
        """Acquires a process for one caller."""
        process = self._take()
        try:
            yield process
        except BaseException:  # an unread reply may follow
            process.end()
            raise
        finally:
            self._give_back(process)

    def _take(self) -> BoundedProcess:
        with self._changed:
            while True:
                while self._idle:
                    process = self._idle.pop()
                    if process.alive():
                        self._progress = time.monotonic()
                        return process
                    process.end()
                    self._all.discard(process)
                left = self._progress + _PATIENCE_SECONDS - time.monotonic()
                room = len(self._all) < _MAX_PROCESSES and not self._starting
                if not self._starting and (not self._all or (room and left <= 0)):
                    break
                self._changed.wait(left if room else None)
            self._starting = True
        started: BoundedProcess | None = None
        try:
            started = _start()
            return started
        finally:
            with self._changed:
                self._starting = False
                self._progress = time.monotonic()
                if started is not None:
                    self._all.add(started)
                self._changed.notify_all()

    def _give_back(self, process: BoundedProcess) -> None:
        with self._changed:
            self._progress = time.monotonic()
            if process.usable and not self._idle and process in self._all:
                self._idle.append(process)
            else:
                process.end()
                self._all.discard(process)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all processes."""
        with self._changed:
            for process in self._all:
                process.end()
            self._all.clear()
            self._idle.clear()

    def after_fork(self) -> None:
        """Forgets the parent's processes, in a forked child."""
        for process in self._all:
            process.forget()
        self.__init__()  # type: ignore[misc]  # a new lock: a thread that does not exist in the child may hold the old one


_PROCESSES = _Processes()
atexit.register(_PROCESSES.close)
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_PROCESSES.after_fork)
