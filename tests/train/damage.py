"""Training data that is damaged in some micro-steps: targets that no text has."""

from collections.abc import Callable, Collection
from typing import Any

import pytest

from slm.train import build
from slm.train.recipe import Recipe


def damaged(patch: pytest.MonkeyPatch, micro_steps: Collection[int]) -> list[int]:
    """Damages the data of micro-steps, counted with the data that was left out; returns the numbers that were drawn.

    Args:
        patch: Undoes it.
        micro_steps: Their numbers, from 0.
    """
    batch: Callable[..., Any] = build._batch
    drawn: list[int] = []

    def drawing(recipe: Recipe, tokens: Any, mine: slice, rank: int, device: Any, micro_step: int, length: int) -> Any:
        inputs, targets, *rest = batch(recipe, tokens, mine, rank, device, micro_step, length)
        drawn.append(micro_step)
        return inputs, (targets * 0 + 5 if micro_step in micro_steps else targets), *rest

    patch.setattr(build, "_batch", drawing)
    return drawn
