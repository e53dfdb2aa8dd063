"""One update: micro-steps, whose gradients are averaged, then clipping and the optimizer.

Dimensions: B windows, T positions.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.core.nn import CausalLM
from slm.train.evaluate import cross_entropy
from slm.train.optimizer import set_learning_rate
from slm.train.precision import Precision


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        loss: Mean over its micro-steps, in nats a token, before the update.
        grad_norm: Of the averaged gradient before clipping; infinite where float16 overflowed and the update was skipped.
        learning_rate: As it was.
    """

    loss: float
    grad_norm: float
    learning_rate: float


class Learner:
    """A model that learns from numbered micro-steps."""

    def __init__(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        *,
        batch: Callable[[int], tuple[Tensor, Tensor]],
        rate: Callable[[int], float],
        precision: Precision,
        accumulation: int,
        max_grad_norm: float,
    ) -> None:
        """Puts together what an update needs.

        Args:
            model: In float32 on its device.
            optimizer: Over the model's parameters.
            batch: Inputs and targets (B, T) of a micro-step, by its number from 0.
            rate: The learning rate after so many micro-steps.
            precision: What the products are computed in.
            accumulation: Micro-steps of an update.
            max_grad_norm: The gradient is scaled down to this norm.
        """
        self.model = model.train()
        self.optimizer = optimizer
        self.accumulation = accumulation
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.scale_loss)
        self._batch, self._rate, self._precision, self._max_grad_norm = batch, rate, precision, max_grad_norm

    def update(self, micro_step: int, after_micro_step: Callable[[], None]) -> Update:
        """Makes one update.

        Args:
            micro_step: Number of its first micro-step.
            after_micro_step: Called after each; may raise to abandon the update, which then changes nothing.

        Raises:
            FloatingPointError: When the loss or the gradient is not finite; the weights are as before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number in range(micro_step, micro_step + self.accumulation):
            inputs, targets = self._batch(number)
            with self._autocast():
                logits = self.model(inputs)
            loss = cross_entropy(logits, targets) / self.accumulation
            del logits  # the largest tensor of all: not two of them at once
            self.scaler.scale(loss).backward()
            total += loss.detach()
            after_micro_step()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        update = Update(total.item(), norm.item(), self._rate(micro_step + self.accumulation))
        if not math.isfinite(update.loss):
            raise FloatingPointError(f"the loss is {update.loss}")
        if not (math.isfinite(update.grad_norm) or self.scaler.is_enabled()):  # the scaler skips such an update itself
            raise FloatingPointError(f"the gradient's norm is {update.grad_norm}")
        set_learning_rate(self.optimizer, update.learning_rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return update

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._precision.autocast)
