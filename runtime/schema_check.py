"""Checks JSON schemas in a separate process, which `slm.runtime.constraint` starts.

llguidance builds whatever grammar a schema describes: a few hundred characters can cost minutes and gigabytes, and a call
into the library cannot be interrupted. On Linux each schema is compiled in a forked process, which the system stops at a limit
of processor time or memory. The process imports as little as possible, so that forks are cheap. Windows has no fork, and macOS
no limit of memory: there a process that is started once compiles the schemas, this one watches it, and starts another one
after a schema that exceeded a limit. The server then compiles only schemas that passed.

Input: a line with the vocabulary, then a line for each schema or grammar. Output: a line for each of them, with the error or
null. All lines are JSON.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from slm.core.bounded import BoundedProcess, Limits, hello, receive, send
from slm.core.process_limits import can_limit_memory, limit_memory, prepare_timer, start_timer, stop_timer
from slm.core.processes import yield_to_others

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Processor seconds per schema. Typical schemas take 1 to 50 ms.
MAX_SECONDS = 0.5
# Wall-clock seconds per schema, on a machine with other load.
_MOST_WAITING_S = 20.0
# The most characters of a reason, and the most bytes of an answer with it.
_MOST_SAID = 500
_LONGEST_ANSWER = 12 * _MOST_SAID + 100
# Wall-clock seconds for the start of a process and a large vocabulary, on a machine with other load.
_START_S = 60.0
_WORK = "from slm.runtime.schema_check import work; work()"
# Address space in bytes, in addition to that of the process.
MAX_BYTES = 64 << 20
# The first line of a grammar in llguidance's dialect of Lark, which tells it from a JSON schema.
GRAMMAR = "%llguidance {}"
_TOO_MUCH = f"it takes more than {MAX_SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile"


class Impossible(Exception):
    """Raised if a schema is invalid or not supported."""


def tokenizer_of(vocabulary: dict[str, Any]) -> "LLTokenizer":
    """Returns llguidance's tokenizer for a vocabulary: `tokenizer` (JSON text), `size` and `stops` (ids)."""
    from llguidance import LLTokenizer

    return LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["size"], eos_token=vocabulary["stops"])


def json_of(schema: Mapping[str, Any]) -> str:
    """Returns the JSON text of a schema.

    Raises:
        Impossible: If it is nested too deeply, or has a number that is not finite.
    """
    try:
        return json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise Impossible("it is nested too deeply") from None
    except ValueError:
        raise Impossible("it has a number that is not finite") from None


def grammar_of(schema: str) -> str:
    """Returns llguidance's grammar of a JSON schema, or of a grammar that begins with `GRAMMAR`.

    Raises:
        Impossible: If it is not a schema.
    """
    from llguidance import LLMatcher

    grammar: str
    if schema.startswith(GRAMMAR):
        grammar = LLMatcher.grammar_from_lark(schema)
        return grammar
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    except ValueError as error:
        raise Impossible(str(error)) from None
    return grammar


def matcher_of(grammar: str, tokenizer: "LLTokenizer") -> "LLMatcher":
    """Returns the matcher of a grammar.

    Raises:
        Impossible: If the grammar is too large, or uses features that llguidance does not support.
    """
    from llguidance import LLMatcher, LLParserLimits

    # A mask takes at most about 20 ms with 262,144 tokens. Verbose errors would quote the text.
    limits = LLParserLimits(
        max_lexer_states=25_000, step_lexer_fuel=50_000, step_max_items=20_000, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # most grammars that are too large fail here
    if matcher.is_error():
        raise Impossible(matcher.get_error())
    return matcher


class Spawned:
    """Checks schemas in a process that is started for many of them."""

    def __init__(self, vocabulary: dict[str, Any], code: str = _WORK) -> None:
        """Keeps the vocabulary for the process, which is started for the first schema."""
        self._vocabulary, self._code = json.dumps(vocabulary).encode(), code
        self._process: BoundedProcess | None = None

    def tried(self, schema: str) -> str | None:
        """Returns the error of a schema; None if it passes.

        Raises:
            OSError: If the process cannot be started.
        """
        if self._process is None or not self._process.alive():
            self.end()
            self._process = BoundedProcess(self._code, _LONGEST_ANSWER, _START_S)
            self._process.send(self._vocabulary, Limits(_START_S))
            self._process.receive(Limits(_START_S))
        limits = Limits(_MOST_WAITING_S, MAX_SECONDS, MAX_BYTES, more=True)
        try:
            self._process.send(schema.encode("utf-8", "surrogatepass"), limits)
            wrong: str | None = json.loads(self._process.receive(limits))
        except (OSError, ValueError):
            self.end()
            return _TOO_MUCH
        return wrong

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.end()
            self._process = None


def work() -> None:
    """Runs the process of `Spawned`: reads the vocabulary and then schemas, until its input ends."""
    prepare_timer()
    hello([])  # the parent watches time and memory: a limit here would count for all schemas together
    vocabulary = receive()
    if vocabulary is not None:
        tokenizer = tokenizer_of(json.loads(vocabulary))
        send(b"null")
        while (schema := receive()) is not None:
            start_timer(_MOST_WAITING_S, _MOST_WAITING_S)  # in case the parent ends
            answer = _answer(schema.decode("utf-8", "surrogatepass"), tokenizer)
            stop_timer()
            send(json.dumps(answer).encode())
    os._exit(0)


def _answer(schema: str, tokenizer: "LLTokenizer") -> str | None:
    """Returns the error of a schema, compiled in this process; None if it passes."""
    try:
        matcher_of(grammar_of(schema), tokenizer)
    except Impossible as error:
        return str(error)[:_MOST_SAID]
    except MemoryError:
        return _TOO_MUCH
    except BaseException as error:  # panics of the library do not derive from Exception
        return f"{type(error).__name__}: {error}"[:_MOST_SAID]
    return None


def _tried(schema: str, tokenizer: "LLTokenizer") -> str | None:
    """Returns the error of a schema, found in a process that is stopped at the limits; None if it passes."""
    assert hasattr(os, "fork") and hasattr(signal, "SIGKILL")
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiving)
        answer: str | None = _TOO_MUCH
        try:
            _limit()
            answer = _answer(schema, tokenizer)
        finally:
            os.write(sending, json.dumps(answer).encode())
            os._exit(0)
    os.close(sending)
    said = _read(receiving, time.monotonic() + _MOST_WAITING_S)
    os.close(receiving)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # for a process that blocks, which uses no processor time
    os.waitpid(child, 0)
    try:
        wrong: str | None = json.loads(said)
    except ValueError:  # the system stopped the process
        return _TOO_MUCH
    return wrong


def _read(pipe: int, until: float) -> bytes:
    """Reads to the end of a pipe, or until a monotonic time."""
    said = b""
    while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        part = os.read(pipe, 4096)
        if not part:
            break
        said += part
    return said


def _limit() -> None:
    """Limits this process. The timer's signal ends it, even within the library."""
    start_timer(MAX_SECONDS, _MOST_WAITING_S)
    # The library reports a failed allocation to standard error before it ends the process.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit_memory(MAX_BYTES, more=True)


def main() -> None:
    """Checks schemas until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which ends the input
    yield_to_others()  # requests in progress come first
    prepare_timer()
    lines = iter(sys.stdin.buffer.readline, b"")
    vocabulary = json.loads(next(lines))
    if hasattr(os, "fork") and can_limit_memory():
        tokenizer = tokenizer_of(vocabulary)
        tried: Callable[[str], str | None] = lambda schema: _tried(schema, tokenizer)  # noqa: E731
    else:
        tried = Spawned(vocabulary).tried
    for line in lines:
        wrong = tried(json.loads(line))
        sys.stdout.write(json.dumps(wrong) + "\n")
        sys.stdout.flush()
