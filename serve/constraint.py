"""Answers that keep to a JSON schema, by llguidance: before each token it says which may come.

Dimensions: V vocabulary.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.memory import Array

# Schemas that were compiled already.
_KEPT = 64
# Characters of what the library says that are passed on.
_QUOTED = 200
# Characters of a schema: a megabyte would take the library seconds.
_LONGEST = 1 << 16
# What one schema may take: some 20 ms a token and 50 MB, by the library's figures. Its verbose errors would quote the text.
_LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)


class Grammars:
    """Makes constraints for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...]) -> None:
        """Takes the tokenizer; the model may have more tokens than it."""
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(stop_tokens))
        self._compiled = lru_cache(_KEPT)(self._compile)

    def json(self, schema: dict[str, Any] | None, texts: int = 1) -> "list[JsonConstraint]":
        """Returns what keeps each of several answers to a schema; to any object where there is none.

        Takes up to seconds for a large one.

        Raises:
            SlmError: When the schema is none, or asks for what cannot be kept to.
        """
        grammar = self._compiled(_dumped({"type": "object"} if schema is None else schema))
        first = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        first.compute_bitmask()  # what is too much shows here mostly, and before anything has been read
        _check(first)
        return [JsonConstraint(first.deep_copy(), self._vocab_size) for _ in range(texts)]

    def _compile(self, schema: str) -> str:
        try:
            grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise _impossible(str(error)) from None
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer, limits=_LIMITS)
        if problem:
            raise _impossible(problem)
        return grammar


def _dumped(schema: dict[str, Any]) -> str:
    try:
        dumped = json.dumps(schema)
    except RecursionError:
        raise _impossible("it is nested too deeply") from None
    if len(dumped) > _LONGEST:
        raise _impossible(f"it has {len(dumped):,} characters, and {_LONGEST:,} are possible")
    return dumped


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise _impossible(matcher.get_error())


def _impossible(why: str) -> SlmError:
    return SlmError(f"the schema cannot be kept to: {why.splitlines()[0][:_QUOTED]}", "a simpler one")


class JsonConstraint:
    """One answer under way."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Array:
        """Returns which tokens may come next, bool (V,).

        Raises:
            SlmError: When it would take too long to find out.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        allowed: Array = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool)
        return allowed

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen; says whether the answer is complete with it.

        Raises:
            SlmError: When it would take too long to find out.
        """
        self._matcher.consume_token(token)
        _check(self._matcher)
        return bool(self._matcher.is_stopped())
