"""Quantization-aware training: when it begins, and the weights that evaluations and checkpoints use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import rounded_in_place, set_active
from slm.train.average import WeightAverage
from slm.train.recipe import Recipe

Batches = Callable[[int], tuple[Any, ...]]


class Deployed:
    """The weights that evaluations and checkpoints use: their average if there is one, rounded if the model is on a grid.

    Attributes:
        average: The average of the weights; None without one.
        same: Whether they are the trained weights themselves.
    """

    def __init__(self, model: CausalLM, average: WeightAverage | None, on_grid: bool) -> None:
        """Takes the model, the average of its weights, and whether it is on a grid."""
        self.average = average
        self.same = average is None and not on_grid
        self._model = model

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the trained weights within the block."""
        with nullcontext() if self.average is None else self.average.in_place(), rounded_in_place(self._model):
            yield


def first_rounded_update(recipe: Recipe) -> int:
    """Returns the number of the first update, from 0, in which products are rounded."""
    return round(recipe.qat.start * recipe.updates)


def rounded_from_start(recipe: Recipe, model: CausalLM, batches: Batches) -> Batches:
    """Returns the batches of a run, which also switch rounding on when its time has come.

    Rounding depends on the number of the micro-step alone, so a resumed run continues as if it had not stopped.

    Args:
        recipe: The recipe, with its length in micro-steps.
        model: The model, on a grid or not.
        batches: The batch of a micro-step, by its number from 0.
    """
    first = first_rounded_update(recipe) * recipe.batch.accumulation

    def batch(micro_step: int) -> tuple[Any, ...]:
        set_active(model, micro_step >= first)
        return batches(micro_step)

    return batch
