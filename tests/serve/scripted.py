"""A server whose answers are given: its model reads the prompts, and its tokens are those of texts."""

from collections.abc import Sequence
from typing import Any

import pytest

from slm.runtime.generation import Generation
from slm.serve import engine
from tests.serve.conftest import Running


def script(monkeypatch: pytest.MonkeyPatch, running: Running, answers: Sequence[str]) -> list[list[int]]:
    """Makes the model of a server give answers, one for each request. Returns the list that the prompts will be in."""
    model = running.service.model
    left, prompts = iter(answers), list[list[int]]()

    class Given(Generation):
        def __init__(self, request: Any, *rest: Any, **options: Any) -> None:
            super().__init__(request, *rest, **options)
            prompts.append(list(request.prompt))
            tokens = iter([*model.tokenizer.encode_literal(next(left)), *model.stop_token_ids])
            self._next = lambda logits: next(tokens)

    monkeypatch.setattr(engine, "Generation", Given)
    return prompts
