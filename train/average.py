"""Averages of the weights. While the learning rate is high they generalize better than the last weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.train.parallel import collect, shared_like


def exponential(decay: float, updates: int) -> float:
    """Returns the share that an exponential moving average (arXiv:2407.20323) keeps: less at first, with little to average."""
    return min(decay, (1 + updates) / (10 + updates))


def uniform(before: int, updates: int) -> float:
    """Returns the share that the mean over all updates after the first `before` keeps (arXiv:1803.05407, arXiv:2306.03241)."""
    return 0.0 if updates <= before else (updates - before - 1) / (updates - before)


class WeightAverage:
    """An average of a model's weights, which every update moves towards the new weights."""

    def __init__(self, model: nn.Module, kept: Callable[[int], float], updates: int = 0) -> None:
        """Starts from the current weights.

        Args:
            model: The model, on its device.
            kept: Share of the average that an update keeps, by its number from 1.
            updates: Number of updates that the average already contains.
        """
        self._parameters = dict(model.named_parameters())
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._kept, self._updates = kept, updates

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights of an update to the average."""
        self._updates += 1
        kept = self._kept(self._updates)
        for name, average in self._average.items():
            average.lerp_(self._parameters[name], 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the weights by the average within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self, keep: bool = True) -> dict[str, Tensor]:
        """Returns the average by name, whole and on the CPU. A process that does not `keep` it gets nothing."""
        return collect(self._average.items(), keep)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int | None = None) -> None:
        """Restores the average that `tensors` returned.

        Args:
            tensors: The average by name.
            updates: Number of updates that it contains; None keeps the number.

        Raises:
            SlmError: When a tensor is missing.
        """
        missing = sorted(self._average.keys() - tensors.keys())
        if missing:
            raise SlmError(f"the saved average of the weights lacks {missing[0]}", "start a new run with another --out")
        for name, average in self._average.items():
            average.copy_(shared_like(tensors[name], average))
        if updates is not None:
            self._updates = updates

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            parameter = self._parameters[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
