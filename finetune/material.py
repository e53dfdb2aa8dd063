"""What a run of fine-tuning trains on and measures: its batches and its loss."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from slm.core.nn import CausalLM
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, Packed, batch_loss, epoch_batches, mean_loss
from slm.finetune.examples import Example
from slm.train.evaluate import Check


class Material(ABC):
    """Rows to train on and rows to measure.

    Attributes:
        loss_name: Name of the measured loss in messages.
    """

    loss_name: str

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of rows to train on."""

    @abstractmethod
    def batches(self, batch_size: int, order: random.Random) -> list[Batch]:
        """Returns every row once, in random batches."""

    @abstractmethod
    def loss(self, model: TunableLM | CausalLM, batch: Batch) -> Tensor:
        """Returns the loss of a batch, in nats."""

    @abstractmethod
    def measure(
        self, model: TunableLM | CausalLM, batch_size: int, autocast: torch.dtype | None, check: Check
    ) -> float:
        """Returns the mean loss of the rows to measure, in nats, without dropout.

        Args:
            model: The model.
            batch_size: Rows per batch.
            autocast: Type of the products; None for float32.
            check: Called between batches; may raise to stop.
        """

    @property
    def figures(self) -> dict[str, float]:
        """Further figures of the last measurement: "preferred" for pairs, see `slm.finetune.preference`."""
        return {}


class Answers(Material):
    """Rows of which parts are learned, by cross-entropy."""

    def __init__(self, rows: Sequence[Packed], measured: Sequence[Example], loss_name: str = "held-out loss") -> None:
        """Takes the rows.

        Args:
            rows: The rows to train on, each of one example or of several that are packed.
            measured: The examples on which the loss is measured.
            loss_name: Name of that loss in messages.
        """
        self.loss_name, self._rows, self._measured = loss_name, rows, measured

    @override
    def __len__(self) -> int:
        return len(self._rows)

    @override
    def batches(self, batch_size: int, order: random.Random) -> list[Batch]:
        return epoch_batches(self._rows, batch_size, order)

    @override
    def loss(self, model: TunableLM | CausalLM, batch: Batch) -> Tensor:
        return batch_loss(model, batch)

    @override
    def measure(
        self, model: TunableLM | CausalLM, batch_size: int, autocast: torch.dtype | None, check: Check
    ) -> float:
        return mean_loss(model, self._measured, batch_size, autocast, check)
