"""Constrains completions to a JSON schema with llguidance, which computes the allowed tokens before each step.

Dimensions: V vocabulary.
"""

import json
import os
import subprocess
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from llguidance import LLMatcher

from slm.core import child
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.memory import Array
from slm.serve.schema_check import Impossible, grammar_of, matcher_of, tokenizer_of

# Cached schemas: their grammar, or the reason for their rejection.
_KEPT = 64
# The most schemas in the queue; each takes at most a few seconds, one after the other.
_WAITING = 16
# The most characters of the library's reason in an error message.
_QUOTED = 200
# The most characters of a schema: the library takes seconds for a megabyte.
_LONGEST = 1 << 16
# Regular expressions are compared in pairs, so that the cost grows with the square of their number.
_MOST_PATTERNS = 64
# The processor time for the masks of one text: an initial budget, and an addition per token.
_FIRST_S, _TOKEN_S = 0.25, 0.01
_HINT = "use a simpler schema"


class Busy(SlmError):
    """Raised if too many schemas wait to be compiled."""


class Grammars:
    """Compiles constraints for one vocabulary. Any number of threads may use it; schemas are compiled one at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...]) -> None:
        """Stores the tokenizer; the model may have more tokens than it."""
        self._vocab_size = vocab_size
        self._vocabulary = {"tokenizer": tokenizer.backend.to_str(), "size": vocab_size, "stops": list(stop_tokens)}
        self._tokenizer = tokenizer_of(self._vocabulary)
        self._known: OrderedDict[str, str | Impossible] = OrderedDict()
        self._checker: subprocess.Popen[bytes] | None = None
        self._compiling = ThreadPoolExecutor(1, "slm-schema", initializer=_yield_to_others)
        self._closed = False
        self._counting = threading.Lock()
        self._waiting = 0

    def submit(self, schema: dict[str, Any] | None, texts: int = 1) -> "Future[list[JsonConstraint]]":
        """Starts to compile a schema, or any JSON object if None. The result has one constraint per completion.

        An expensive schema can take seconds. The result raises `SlmError` if the schema is invalid, too expensive or not
        supported.

        Raises:
            Busy: If too many schemas wait.
        """
        with self._counting:
            if self._waiting >= _WAITING:
                raise Busy("too many JSON schemas are waiting to be compiled", "try again in a few seconds")
            self._waiting += 1
        future = self._compiling.submit(self._constraints, schema, texts)
        future.add_done_callback(self._waited)  # also runs for a future that is cancelled before it starts
        return future

    def json(self, schema: dict[str, Any] | None, texts: int = 1) -> "list[JsonConstraint]":
        """Returns the result of `submit`."""
        return self.submit(schema, texts).result()

    def close(self) -> None:
        """Ends the process that checks schemas."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._closed = True
        checker = self._checker
        if checker is not None:
            checker.kill()  # a thread that waits for its output reads end of file
            checker.wait()

    def _constraints(self, schema: dict[str, Any] | None, texts: int) -> "list[JsonConstraint]":
        try:
            first = self._compiled(_dumped({"type": "object"} if schema is None else schema))
        except Impossible as error:
            raise _impossible(str(error)) from None
        return [JsonConstraint(first.deep_copy(), self._vocab_size) for _ in range(texts)]

    def _waited(self, future: "Future[list[JsonConstraint]]") -> None:
        with self._counting:
            self._waiting -= 1

    def _compiled(self, schema: str) -> LLMatcher:
        found = self._known.get(schema)
        if found is None:
            try:
                self._check(schema)
                found = grammar_of(schema)
            except Impossible as error:
                found = error
            self._known[schema] = found
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(schema)
        if isinstance(found, Impossible):
            raise Impossible(str(found))
        return matcher_of(found, self._tokenizer)

    def _check(self, schema: str) -> None:
        """Checks a schema in another process, which can be stopped.

        Raises:
            Impossible: If the schema is invalid or not supported.
        """
        for _ in range(2):  # the process may have been killed while it was idle
            try:
                line = self._tried(schema)
            except OSError:  # the process cannot start, or does not read
                line = b""
            if line:
                wrong = json.loads(line)
                if wrong is not None:
                    raise Impossible(wrong)
                return
            self._end_checker()
        # This failure does not depend on the schema, so the schema is not cached as rejected.
        raise Busy("the process that compiles JSON schemas has ended", "try again in a few seconds")

    def _tried(self, schema: str) -> bytes:
        """Returns the line from the other process; empty if the process has ended."""
        if self._closed:
            return b""
        checker = self._checker
        if checker is None or checker.poll() is not None:
            self._end_checker()
            checker = self._checker = child.popen(
                "from slm.serve.schema_check import main; main()", stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            _send(checker, self._vocabulary)
        _send(checker, schema)
        assert checker.stdout is not None
        return checker.stdout.readline()

    def _end_checker(self) -> None:
        checker, self._checker = self._checker, None
        if checker is not None:
            checker.kill()
            checker.wait()
            for pipe in (checker.stdin, checker.stdout):
                if pipe is not None:
                    with suppress(OSError):  # a failed write may leave unsent data
                        pipe.close()


def _send(checker: "subprocess.Popen[bytes]", said: Any) -> None:
    assert checker.stdin is not None
    checker.stdin.write(json.dumps(said).encode() + b"\n")
    checker.stdin.flush()


def _yield_to_others() -> None:
    """Lowers the priority of this thread in favour of requests in progress. Only Linux has priorities per thread."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _dumped(schema: dict[str, Any]) -> str:
    try:
        dumped = json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise _impossible("it is nested too deeply") from None
    except ValueError:
        raise _impossible("it has a number that is not finite") from None
    if len(dumped) > _LONGEST:
        raise _impossible(f"it has {len(dumped):,} characters; the limit is {_LONGEST:,}")
    patterns = dumped.count('"patternProperties"')
    if patterns and (most := _most_patterns(schema)) > _MOST_PATTERNS:
        raise _impossible(f"an object has {most:,} patternProperties; the limit is {_MOST_PATTERNS}")
    return dumped


def _most_patterns(schema: Any) -> int:
    """Returns the largest number of patternProperties of any object in a schema."""
    most, left = 0, [schema]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            patterns = each.get("patternProperties")
            most = max(most, len(patterns) if isinstance(patterns, dict) else 0)
            left += each.values()
        elif isinstance(each, list):
            left += each
    return most


def _impossible(why: str) -> SlmError:
    return SlmError(f"the schema is not supported: {(why.splitlines() or [''])[0][:_QUOTED]}", _HINT)


class JsonConstraint:
    """The constraint of one completion. Only one thread at a time may use it, but not always the same one."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._left_s = _FIRST_S

    def allowed(self) -> Array:
        """Returns the tokens that may come next, bool (V,).

        Raises:
            SlmError: If the computation exceeds its budget.
        """
        started = time.thread_time()
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._spend(started)
        allowed: Array = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool)
        return allowed

    def accept(self, token: int) -> bool:
        """Consumes the chosen token. Returns whether the completion is complete with it.

        Raises:
            SlmError: If the computation exceeds its budget.
        """
        started = time.thread_time()
        self._matcher.consume_token(token)
        self._left_s += _TOKEN_S
        self._spend(started)
        return bool(self._matcher.is_stopped())

    def _spend(self, started: float) -> None:
        """Subtracts the processor time since `began` from the budget."""
        if self._matcher.is_error():
            raise _impossible(self._matcher.get_error())
        self._left_s -= time.thread_time() - started
        if self._left_s < 0:
            raise _impossible("computing the allowed tokens takes too long")
