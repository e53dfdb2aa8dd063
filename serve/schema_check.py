"""Tries JSON schemas in a process of its own: started by `slm.serve.constraint`.

llguidance takes a schema's word for how large its grammar becomes: a few hundred characters can cost minutes and gigabytes,
and a call into the library cannot be interrupted. Here each schema is tried in a forked process, which the system stops at a
limit of processor time or memory; what passes may then be compiled in the server. The process imports no more than it needs,
so that forks are cheap.

Input: a line with the vocabulary, then a line for each schema. Output: a line for each schema, with what is wrong or null.
All are JSON.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Of the processor, for one schema. Schemas that people write take 1 to 50 ms.
MAX_SECONDS = 0.5
# By the clock, on a machine that has other work too.
_MOST_WAITING_S = 20.0
# Characters of a reason.
_MOST_SAID = 500
# Of address space, on top of what the process has.
MAX_BYTES = 64 << 20
# Each mask of a text may take this: some 20 ms with 262,144 tokens. Verbose errors would quote the text.
LIMITS = LLParserLimits(max_lexer_states=25_000, step_lexer_fuel=50_000, step_max_items=20_000, verbose_errors=False)
_TOO_MUCH = f"it takes more than {MAX_SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile"


class Impossible(Exception):
    """Why a schema cannot be followed."""


def tokenizer_of(vocabulary: dict[str, Any]) -> LLTokenizer:
    """Returns llguidance's tokenizer for a vocabulary: `tokenizer` (JSON text), `size` and `stops` (ids)."""
    return LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["size"], eos_token=vocabulary["stops"])


def grammar_of(schema: str) -> str:
    """Returns the grammar of a JSON schema.

    Raises:
        Impossible: When it is not a schema.
    """
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    except ValueError as error:
        raise Impossible(str(error)) from None
    return grammar


def matcher_of(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Returns what follows a grammar.

    Raises:
        Impossible: When it is too large, or uses what llguidance does not support.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()  # most of what is too large shows here
    if matcher.is_error():
        raise Impossible(matcher.get_error())
    return matcher


def _tried(schema: str, tokenizer: LLTokenizer) -> str | None:
    """Returns what is wrong with a schema, from a process that is stopped at the limits."""
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
        except BaseException as error:  # the library's panics are no Exception
            answer = f"{type(error).__name__}: {error}"[:_MOST_SAID]
        finally:
            os.write(sending, json.dumps(answer).encode())
            os._exit(0)
    os.close(sending)
    said = _read(receiving, time.monotonic() + _MOST_WAITING_S)
    os.close(receiving)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # for one that waits for something, which costs no processor time
    os.waitpid(child, 0)
    try:
        wrong: str | None = json.loads(said)
    except ValueError:  # it was stopped
        return _TOO_MUCH
    return wrong


def _read(pipe: int, until: float) -> bytes:
    """Reads to the end of a pipe, or to a monotonic time."""
    said = b""
    while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        part = os.read(pipe, 4096)
        if not part:
            break
        said += part
    return said


def _limit() -> None:
    """Limits this process. The timer's signal ends it, also within the library."""
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
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and that ends the input
    os.nice(10)  # answers under way come first
    lines = iter(sys.stdin.buffer.readline, b"")
    tokenizer = tokenizer_of(json.loads(next(lines)))
    for line in lines:
        wrong = _tried(json.loads(line), tokenizer)
        sys.stdout.write(json.dumps(wrong) + "\n")
        sys.stdout.flush()
