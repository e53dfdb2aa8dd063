"""A model whose answers are given: its decoder reads, and its tokens are those of texts."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from slm.core.tokenizer import END_OF_TURN
from slm.runtime.model import Model


def script(monkeypatch: pytest.MonkeyPatch, model: Model, answers: Sequence[str]) -> list[list[int]]:
    """Makes a model give answers, one for each prompt. Returns the list that the prompts will be in."""
    prompts: list[list[int]] = []
    left = iter(answers)
    generation_of = model._generation
    end = model.tokenizer.token_id(END_OF_TURN)
    assert end is not None

    def generation(prompt: Any, options: Any, seed: int | None = None, constraint: Any = None) -> Any:
        made = generation_of(prompt, options, seed)  # without the constraint: answers may be anything
        prompts.append(list(prompt))
        tokens: Iterator[int] = iter([*model.tokenizer.encode_literal(next(left)), end])
        monkeypatch.setattr(made, "_next", lambda logits: next(tokens))
        return made

    monkeypatch.setattr(model, "_generation", generation)
    return prompts
