"""Constrains completions with llguidance, which computes the allowed tokens before each step: to a JSON schema, or to calls.

Dimensions: V vocabulary.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slm.core import child
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.call_grammar import MOST_CALLS, Marks, Replies, grammar_of_replies
from slm.runtime.guide import Constraint
from slm.runtime.memory import Array
from slm.runtime.schema_check import Impossible, grammar_of, json_of, matcher_of, tokenizer_of
from slm.runtime.token_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Cached schemas: their grammar, or the reason for their rejection.
_KEPT = 64
# The most schemas in the queue; each takes at most a few seconds, one after the other.
_WAITING = 16
# The most characters of the library's reason in an error message.
_QUOTED = 200
# The most characters of a schema: the library takes seconds for a megabyte.
_LONGEST = 1 << 16
# The most characters of the grammar of calls, which has the schemas of all tools.
_LONGEST_CALLS = 1 << 17
# Regular expressions are compared in pairs, so that the cost grows with the square of their number.
_MOST_PATTERNS = 64
# The processor time for the masks of one text: an initial budget, and an addition per token.
_FIRST_S, _TOKEN_S = 0.25, 0.01
_HINT = "use a simpler schema"


class Busy(SlmError):
    """Raised if too many schemas wait to be compiled."""


class Grammars:
    """Compiles constraints for one vocabulary. Any number of threads may use it; schemas are compiled one at a time."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...], *, at_once: bool = False
    ) -> None:
        """Reads the tokenizer, which takes seconds for 262,144 tokens.

        Args:
            tokenizer: The model's tokenizer; the model may have more tokens than it.
            vocab_size: The number of the model's logits.
            stop_tokens: The tokens that end a text.
            at_once: Whether to start the process that checks grammars now, so that it reads the tokenizer in the meantime.
        """
        self._vocab_size = vocab_size
        self._text_tokenizer = tokenizer
        self._free: dict[tuple[str, int | None], Array] = {}
        self._vocabulary: dict[str, Any] = {
            "tokenizer": tokenizer.backend.to_str(),
            "size": vocab_size,
            "stops": list(stop_tokens),
        }
        self._known: OrderedDict[str, str | Impossible] = OrderedDict()
        self._checker: subprocess.Popen[bytes] | None = None
        self._compiling = ThreadPoolExecutor(1, "slm-schema", initializer=_yield_to_others)
        self._closed = False
        self._counting = threading.Lock()
        self._waiting = 0
        if at_once:
            with suppress(OSError):  # then `_tried` starts it
                self._start_checker()
        self._tokenizer = tokenizer_of(self._vocabulary)

    def submit(self, schema: Mapping[str, Any] | None, texts: int = 1) -> "Future[Sequence[Constraint]]":
        """Starts to compile a schema, or any JSON object if None. The result has one constraint per completion.

        An expensive schema can take seconds. The result raises `SlmError` if the schema is invalid, too expensive or not
        supported.

        Raises:
            Busy: If too many schemas wait.
        """
        return self._submit(lambda: self._constraints(schema, texts))

    def _submit(self, compile: "Callable[[], Sequence[Constraint]]") -> "Future[Sequence[Constraint]]":
        with self._counting:
            if self._waiting >= _WAITING:
                raise Busy("too many JSON schemas are waiting to be compiled", "try again in a few seconds")
            self._waiting += 1
        future = self._compiling.submit(compile)
        future.add_done_callback(self._waited)  # also runs for a future that is cancelled before it starts
        return future

    def submit_calls(self, replies: Replies, texts: int = 1) -> "Future[Sequence[Constraint]]":
        """Starts to compile the grammar of replies with calls; see `submit`."""
        return self._submit(lambda: self._calls(replies, texts))

    def prepared(self, replies: Replies) -> "Callable[[], Constraint]":
        """Returns a function that makes the constraint of one reply with calls; see `submit_calls` for what is raised.

        The grammar is compiled in the calling thread: call this from one thread only.
        """
        return self._prepared(replies)

    def json(self, schema: Mapping[str, Any] | None, texts: int = 1) -> "Sequence[Constraint]":
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

    def _constraints(self, schema: Mapping[str, Any] | None, texts: int) -> "list[GrammarConstraint]":
        try:
            first = self._compiled(_dumped({"type": "object"} if schema is None else schema))
        except Impossible as error:
            raise _impossible(str(error)) from None
        return [GrammarConstraint(first.deep_copy(), self._vocab_size) for _ in range(texts)]

    def _calls(self, replies: Replies, texts: int) -> "Sequence[Constraint]":
        make = self._prepared(replies)
        return [make() for _ in range(texts)]

    def _prepared(self, replies: Replies) -> "Callable[[], Constraint]":
        try:
            for tool in replies.tools:
                _check_patterns(tool.parameters)
            marks = self._marks(replies)
            grammar = grammar_of_replies(replies, marks)
            if len(grammar) > _LONGEST_CALLS:
                raise Impossible(
                    f"the tools need a grammar of {len(grammar):,} characters; the limit is {_LONGEST_CALLS:,}"
                )
            first = self._compiled(grammar)
        except Impossible as error:
            raise _impossible(str(error), "the tools' parameters are") from None
        if not replies.free:
            return lambda: GrammarConstraint(first.deep_copy(), self._vocab_size)
        opening, spelled = replies.style.opening, token_bytes(self._text_tokenizer)
        free = self._free_text(opening, marks.tokens.get(opening))

        def calls() -> Constraint:
            follows = GrammarConstraint(first.deep_copy(), self._vocab_size)
            return CallConstraint(follows, free, opening, replies.parallel, spelled)

        return calls

    def _marks(self, replies: Replies) -> Marks:
        """Returns the marks that are tokens which the library does not see as text."""
        if not replies.native:
            return Marks({})
        tokens = {mark: self._text_tokenizer.token_id(mark) for mark in replies.style.marks}
        return Marks({mark: i for mark, i in tokens.items() if i is not None and self._tokenizer.is_special_token(i)})

    def _free_text(self, opening: str, own: int | None) -> Array:
        """Returns the tokens that are allowed in free text, bool (V,): no control tokens, except those that end a text.

        Args:
            opening: The text that begins a call, which no other token than its own contains.
            own: The token that begins a call, if there is one.
        """
        if (opening, own) not in self._free:
            vocabulary = self._text_tokenizer.backend.get_vocab(with_added_tokens=True)
            free = np.zeros(self._vocab_size, bool)
            free[[i for token, i in vocabulary.items() if i < self._vocab_size and opening not in token]] = True
            free[[i for i in self._text_tokenizer.special_ids if i < self._vocab_size]] = False
            free[self._vocabulary["stops"] + ([] if own is None else [own])] = True
            free.flags.writeable = False
            self._free[opening, own] = free
        return self._free[opening, own]

    def _waited(self, future: "Future[Sequence[Constraint]]") -> None:
        with self._counting:
            self._waiting -= 1

    def _compiled(self, schema: str) -> "LLMatcher":
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
            checker = self._start_checker()
        _send(checker, schema)
        assert checker.stdout is not None
        return checker.stdout.readline()

    def _start_checker(self) -> "subprocess.Popen[bytes]":
        self._checker = child.popen(
            "from slm.runtime.schema_check import main; main()", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        _send(self._checker, self._vocabulary)
        return self._checker

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
    if sys.platform != "win32" and hasattr(os, "setpriority"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _dumped(schema: Mapping[str, Any]) -> str:
    dumped = json_of(schema)
    if len(dumped) > _LONGEST:
        raise Impossible(f"it has {len(dumped):,} characters; the limit is {_LONGEST:,}")
    _check_patterns(schema)
    return dumped


def _check_patterns(schema: Any) -> None:
    most = _most_patterns(schema)
    if most > _MOST_PATTERNS:
        raise Impossible(f"an object has {most:,} patternProperties; the limit is {_MOST_PATTERNS}")


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


def _impossible(why: str, what: str = "the schema is") -> SlmError:
    return SlmError(f"{what} not supported: {(why.splitlines() or [''])[0][:_QUOTED]}", _HINT)


class GrammarConstraint:
    """A grammar that one completion follows. Only one thread at a time may use it, but not always the same one."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._left_s = _FIRST_S

    @property
    def accepting(self) -> bool:
        """Whether the completion may end here."""
        return bool(self._matcher.is_accepting())

    def restart(self, tokens: Sequence[int]) -> None:
        """Returns to the start of the grammar and consumes tokens from there.

        Raises:
            SlmError: If the computation exceeds its budget.
        """
        self._matcher.reset()
        for token in tokens:
            self.accept(token)

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
        """Subtracts the processor time since `started` from the budget."""
        if self._matcher.is_error():
            raise _impossible(self._matcher.get_error())
        self._left_s -= time.thread_time() - started
        if self._left_s < 0:
            raise _impossible("computing the allowed tokens takes too long")


class CallConstraint:
    """The constraint of a completion that is free text until a call begins, and after each call.

    The grammar reads only what may belong to a call: the tokens since the possible beginning of an opening. In free text every
    token is allowed that is not a control token, so that a step costs nothing there.
    """

    def __init__(
        self, constraint: GrammarConstraint, free: Array, opening: str, parallel: bool, spelled: TokenBytes
    ) -> None:
        """Starts a completion.

        Args:
            constraint: The constraint of text up to the end of a call.
            free: The tokens that are allowed in free text, bool (V,).
            opening: The text that begins a call.
            parallel: Whether text and further calls may follow a call.
            spelled: The bytes of tokens.
        """
        self._constraint, self._free, self._opening = constraint, free, opening.encode()
        self._parallel, self._bytes = parallel, spelled
        self._tail = b""
        self._recent: list[int] = []  # tokens that the grammar reads once a call begins
        self._state: Literal["free", "maybe", "call", "over"] = "free"
        self._calls = 0

    def allowed(self) -> Array:
        """Returns the tokens that may come next; see `GrammarConstraint.allowed`."""
        return self._free if self._state == "free" else self._constraint.allowed()

    def accept(self, token: int) -> bool:
        """Consumes the chosen token; see `GrammarConstraint.accept`."""
        if self._state in ("call", "over"):
            stopped = self._constraint.accept(token)
            if self._state == "call" and self._constraint.accepting:
                self._calls += 1
                self._state = "free" if self._parallel and self._calls < MOST_CALLS else "over"
                self._tail, self._recent = b"", []
            return stopped and self._state == "over"
        spelled = self._bytes[token]
        self._tail = (self._tail + spelled)[-len(self._opening) :]
        self._recent.append(token)
        begins = any(self._opening.startswith(self._tail[start:]) for start in range(len(self._tail)))
        if self._state == "maybe":
            self._constraint.accept(token)
        elif begins or self._opening in spelled:
            self._constraint.restart(self._recent)
        else:
            self._recent = []
            return False
        if not self._constraint.accepting:
            self._state = "call"
        elif begins:
            self._state = "maybe"
        else:
            self._state, self._recent = "free", []
        return False
