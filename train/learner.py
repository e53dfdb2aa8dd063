"""One update, of pretraining and of fine-tuning: micro-steps, whose gradients are averaged, clipping, and the optimizers.

Dimensions: B windows, T positions, D hidden.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import operands
from slm.train.loss import linear_cross_entropy, linear_loss
from slm.train.optimizer import Optimizers
from slm.train.parallel import Alone, Processes, whole
from slm.train.precision import Precision
from slm.train.spikes import Spike, SpikeGuard
from slm.train.teacher import Ensemble


@dataclass(frozen=True)
class Update:
    """The result of an update.

    Attributes:
        loss: Mean loss over its micro-steps, in nats per token, before the update.
        grad_norm: Norm of the averaged gradient before clipping; infinite if float16 overflowed and the update was skipped.
        learning_rate: The learning rate.
        data_s: Seconds that this process waited for the batches.
        spike: Why the update was not made; None if it was.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    data_s: float = 0.0
    spike: Spike | None = None


class Objective(nn.Module):
    """A model and its loss as one module, for data parallelism to wrap."""

    def __init__(
        self, model: CausalLM, *, chunk: int | None = None, compiled: bool = False, teachers: Ensemble | None = None
    ) -> None:
        """Wraps a model.

        Args:
            model: The model.
            chunk: Positions whose logits exist at once; see `linear_cross_entropy`.
            compiled: Whether torch.compile compiles the body for training. Evaluations and samples have many lengths and few
                batches, and are not compiled.
            teachers: Models whose predictions are a part of the targets in training.
        """
        super().__init__()
        self.model = model
        self._chunk, self._teachers = chunk, teachers
        self._compiled = None
        if compiled:
            # Otherwise the fused kernels of every layer would compute the same sines again. A decorator in the model's class
            # would import the compiler, half of PyTorch's time, into every command that loads a checkpoint.
            model.model.positions = torch.compiler.disable(model.model.positions)  # type: ignore[method-assign]
            self._compiled = torch.compile(model.model.forward, dynamic=False)

    def forward(
        self, inputs: Tensor, targets: Tensor, segments: Tensor | None = None, share: float | None = None
    ) -> Tensor:
        """Returns the mean cross-entropy of inputs (B, T) for targets (B, T).

        Args:
            inputs: Ids.
            targets: Ids; those that are `slm.train.loss.IGNORED` do not count.
            segments: Number of each position's document in its row (B, T); documents do not attend to each other.
            share: Factor of the loss, for rows with fewer targets than other rows of the update.
        """
        body = self._compiled if self._compiled is not None and self.training else self.model.model
        hidden: Tensor = body(inputs) if segments is None else body(inputs, segments=segments)  # (B, T, D)
        hidden, weight = operands(self.model.lm_head, hidden.flatten(0, 1))
        if self._teachers is not None and self.training:
            loss = linear_loss(hidden, weight, self._teachers.targets(inputs, targets, segments), self._chunk)
        else:
            loss = linear_cross_entropy(hidden, weight, targets.flatten(), self._chunk)
        return loss if share is None else loss * share


@dataclass(frozen=True)
class UpdateSettings:
    """How a learner makes an update.

    Attributes:
        rate: The learning rate as a function of the micro-steps done.
        momentum: The decay of Muon's momentum, likewise; None leaves it alone.
        decay: The weight decay as a share of the recipe's, likewise; None leaves it alone.
        precision: The type of the products.
        accumulation: Micro-steps per update.
        max_grad_norm: The gradient is scaled down to this norm.
        share: Rows of this process over the mean of all processes, by which its losses are weighted.
    """

    rate: Callable[[int], float]
    precision: Precision
    accumulation: int = 1
    max_grad_norm: float = 1.0
    momentum: Callable[[int], float] | None = None
    decay: Callable[[int], float] | None = None
    share: float = 1.0


class Learner:
    """Trains a model by numbered micro-steps."""

    def __init__(
        self,
        objective: nn.Module,
        optimizers: Optimizers,
        batch: Callable[[int], tuple[Any, ...]],
        settings: UpdateSettings,
        *,
        processes: Processes | None = None,
        trained: Iterable[nn.Parameter] | None = None,
        guard: SpikeGuard | None = None,
    ) -> None:
        """Prepares the first update.

        Args:
            objective: Returns the loss of a batch; its model is in float32 on its device.
            optimizers: Over the model's parameters.
            batch: The objective's arguments for a micro-step, by its number from 0; this process's share of the rows.
            settings: The learning rate, the precision, the accumulation and the clipping.
            processes: The processes that share every micro-step.
            trained: The parameters that the optimizers move, in the order in which their gradients' norm is summed; all of
                the objective's by default.
            guard: Judges the updates; None makes every update with a finite loss and gradient.
        """
        self.objective = objective.train()
        self.optimizers = optimizers
        self.accumulation = settings.accumulation
        self.device = next(objective.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision.scale_loss)
        self._batch, self._settings = batch, settings
        self._processes = processes or Alone()
        self._guard = guard
        self._trained = list(objective.parameters() if trained is None else trained)

    def update(self, micro_step: int, after_micro_step: Callable[[], None]) -> Update:
        """Makes one update.

        Args:
            micro_step: Number of its first micro-step.
            after_micro_step: Called after each micro-step; may raise to abandon the update, which then changes nothing.

        Raises:
            FloatingPointError: When the loss or the gradient is not finite, and no guard judges it; the weights are unchanged.
        """
        self.optimizers.zero_grad()
        total = torch.zeros((), device=self.device)
        last = micro_step + self.accumulation - 1
        data_s = 0.0
        for number in range(micro_step, last + 1):
            began = time.perf_counter()
            arguments = self._batch(number)
            data_s += time.perf_counter() - began
            with self._processes.micro_step(self.objective, number == last):
                with self._autocast():
                    loss = self.objective(*arguments) / self.accumulation
                    if self._settings.share != 1.0:
                        loss = loss * self._settings.share
                self.scaler.scale(loss).backward()
            total += loss.detach()
            after_micro_step()
        for optimizer in self.optimizers.members:
            self.scaler.unscale_(optimizer)
        norm = self._clip()
        # The mean of the norms is the norm itself. It is exchanged so that all processes judge by the same numbers.
        loss, grad_norm = (each / self._processes.size for each in self._processes.total([total.item(), norm.item()]))
        update = Update(loss, grad_norm, self._settings.rate(last + 1), data_s)
        if self._guard is not None:
            self._guard.begin(micro_step // self.accumulation)
            spike = self._guard.judge(loss, grad_norm, overflow=self.scaler.is_enabled())
            if spike is not None:
                self.scaler.update()
                return replace(update, spike=spike)
        if not math.isfinite(update.loss):
            raise FloatingPointError(f"the loss is {update.loss}")
        if not (math.isfinite(update.grad_norm) or self.scaler.is_enabled()):
            raise FloatingPointError(f"the gradient's norm is {update.grad_norm}")
        self._adjust_optimizers(last + 1, update.learning_rate)
        if math.isfinite(update.grad_norm):  # the scaler would skip only the optimizers whose own gradients overflowed
            self.optimizers.step(self.scaler.step)
        self.scaler.update()
        if self._guard is not None:
            self._guard.accept(loss, grad_norm)
        return update

    def _adjust_optimizers(self, done: int, rate: float) -> None:
        """Sets what the schedules prescribe for the update that ends with a micro-step, by the number of micro-steps done."""
        settings = self._settings
        self.optimizers.set_learning_rate(rate)
        if settings.momentum is not None:
            self.optimizers.set_momentum(settings.momentum(done))
        if settings.decay is not None:
            self.optimizers.set_decay(settings.decay(done))

    def _clip(self) -> Tensor:
        """Clips the gradient to the maximum norm, and returns the norm before."""
        parameters = [parameter for parameter in self._trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm_of_all = whole(norm)
        if not norm_of_all <= self._settings.max_grad_norm:  # usually it is, and the gradients need no pass
            nn.utils.clip_grads_with_norm_(parameters, self._settings.max_grad_norm, norm)
        return norm_of_all

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self._settings.precision.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
