"""Answers that keep to a JSON schema, by llguidance: before each token it says which may come.

Dimensions: V vocabulary.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.memory import Array

# Schemas that were compiled already.
_KEPT = 64


class Grammars:
    """Makes constraints for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...]) -> None:
        """Takes the tokenizer; the model may have more tokens than it."""
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(stop_tokens))
        self._compiled = lru_cache(_KEPT)(self._compile)

    def json(self, schema: dict[str, Any] | None) -> "JsonConstraint":
        """Returns what keeps an answer to a schema; to any object where there is none.

        Raises:
            SlmError: When the schema is none, or asks for what cannot be kept to.
        """
        grammar = self._compiled(json.dumps({"type": "object"} if schema is None else schema))
        matcher = LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise SlmError(f"the schema cannot be kept to: {matcher.get_error()}", "a simpler one")
        return JsonConstraint(matcher, self._vocab_size)

    def _compile(self, schema: str) -> str:
        try:
            grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise SlmError(f"the schema cannot be kept to: {str(error).splitlines()[0]}", "a simpler one") from None
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise SlmError(f"the schema cannot be kept to: {problem.splitlines()[0]}", "a simpler one")
        return grammar


class JsonConstraint:
    """One answer under way."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Array:
        """Returns which tokens may come next, bool (V,)."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: Array = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool)
        return allowed

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen; says whether the answer is complete with it."""
        if not self._matcher.consume_token(token):
            raise SlmError(f"token {token} does not keep to the schema: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())
