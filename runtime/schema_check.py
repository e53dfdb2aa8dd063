"""Checks JSON schemas in a separate process, which `slm.runtime.constraint` starts.

llguidance builds whatever grammar a schema describes: a few hundred characters can cost minutes and gigabytes, and a call
into the library cannot be interrupted. Here each schema is compiled in a forked process, which the system stops at a limit of
processor time or memory. The server then compiles only schemas that passed. The process imports as little as possible, so
that forks are cheap.

Input: a line with the vocabulary, then a line for each schema or grammar. Output: a line for each of them, with the error or
null. All lines are JSON.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Processor seconds per schema. Typical schemas take 1 to 50 ms.
MAX_SECONDS = 0.5
# Wall-clock seconds per schema, on a machine with other load.
_MOST_WAITING_S = 20.0
# The most characters of a reason.
_MOST_SAID = 500
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


def _tried(schema: str, tokenizer: "LLTokenizer") -> str | None:
    """Returns the error of a schema, found in a process that is stopped at the limits; None if it passes."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiving)
        try:
            _limit()
            matcher_of(grammar_of(schema), tokenizer)
            answer = None
        except Impossible as error:
            answer = str(error)[:_MOST_SAID]
        except MemoryError:
            answer = _TOO_MUCH
        except BaseException as error:  # panics of the library do not derive from Exception
            answer = f"{type(error).__name__}: {error}"[:_MOST_SAID]
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
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    # The library reports a failed allocation to standard error before it ends the process.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        now = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MAX_BYTES, now + MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):  # macOS has neither
        pass


def main() -> None:
    """Checks schemas until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which ends the input
    os.nice(10)  # requests in progress come first
    lines = iter(sys.stdin.buffer.readline, b"")
    tokenizer = tokenizer_of(json.loads(next(lines)))
    for line in lines:
        wrong = _tried(json.loads(line), tokenizer)
        sys.stdout.write(json.dumps(wrong) + "\n")
        sys.stdout.flush()
