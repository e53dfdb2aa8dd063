"""The training loop of an adapter: AdamW, warm-up and decay, the best epoch kept."""

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.finetune.adapter import TunableLM, adapter_state
from slm.finetune.batches import Batch, batch_loss, epoch_batches, mean_loss
from slm.finetune.examples import Example
from slm.finetune.settings import LoraSettings
from slm.train.metrics import Kind, Row
from slm.train.precision import Precision
from slm.train.schedule import learning_rate

# Share of the updates in which the rate rises to its peak; it then falls to 0 along a cosine.
WARMUP = 0.05
_BETAS = (0.9, 0.999)
# An adapter starts as no change at all, and decay would only pull it back there.
_WEIGHT_DECAY = 0.0


@dataclass
class Fit:
    """A trained adapter. Losses are nats a learned token.

    Attributes:
        loss_before: Of the base, on the rows that are measured.
        loss: Of the adapter that was kept.
        best_epoch: The epoch after which it was kept: the first with the lowest loss.
        updates: Steps of the optimizer, all epochs together.
        state: The adapter's tensors after that epoch.
        history: Rows for `slm.train.metrics.Metrics`.
    """

    loss_before: float
    loss: float = math.inf
    best_epoch: int = 0
    updates: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    history: list[tuple[Kind, Row]] = field(default_factory=list)


def fit(
    adapter: PeftModel,
    train: Sequence[Example],
    measured: Sequence[Example],
    settings: LoraSettings,
    precision: Precision,
    progress: Progress,
) -> Fit:
    """Trains the adapter that is on a model.

    Args:
        adapter: A model with a fresh adapter, on its device.
        train: What is trained on.
        measured: What the loss is measured on, before the first epoch and after every one.
        settings: With nothing left open.
        precision: What the products are computed in while training; the losses are measured in float32.
        progress: Is told how it goes.

    Raises:
        SlmError: When the loss is no longer finite.
    """
    assert settings.epochs is not None
    model: TunableLM = adapter.get_base_model()
    learner = _Learner(adapter, settings, precision, settings.epochs * math.ceil(len(train) / settings.batch_size))
    order = random.Random(settings.seed)
    done = Fit(loss_before=mean_loss(model, measured, settings.batch_size))
    done.history.append(("eval", {"epoch": 0, "updates": 0, "tokens": 0, "loss": done.loss_before}))
    tokens = 0
    progress.start("fine-tuning", learner.total, "updates")
    try:
        for epoch in range(1, settings.epochs + 1):
            model.train()
            for batch in epoch_batches(train, settings.batch_size, order):
                row = learner.update(batch)
                done.updates, tokens = done.updates + 1, tokens + batch.trained
                done.history.append(("train", {"epoch": epoch, "updates": done.updates, "tokens": tokens, **row}))
                progress.advance(epoch=f"{epoch}/{settings.epochs}", loss=f"{row['loss']:.3f}")
            loss = mean_loss(model, measured, settings.batch_size)
            done.history.append(("eval", {"epoch": epoch, "updates": done.updates, "tokens": tokens, "loss": loss}))
            if loss < done.loss:
                done.loss, done.best_epoch = loss, epoch
                done.state = {name: tensor.detach().cpu().clone() for name, tensor in adapter_state(adapter).items()}
    finally:
        progress.finish()
    if not done.state:
        raise SlmError("the held-out loss was never finite", "try a lower --learning-rate")
    return done


class _Learner:
    """Adapter, optimizer and schedule."""

    def __init__(self, adapter: PeftModel, settings: LoraSettings, precision: Precision, total: int) -> None:
        assert settings.learning_rate is not None
        self.total = total
        self._model: TunableLM = adapter.get_base_model()
        self._parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
        self._peak, self._max_grad_norm = settings.learning_rate, settings.max_grad_norm
        self._device = self._parameters[0].device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=precision.scale_loss)
        self._autocast = precision.autocast
        self._updates = 0

    def update(self, batch: Batch) -> Row:
        """Makes one update; returns its loss and learning rate."""
        self._updates += 1
        warmup = round(WARMUP * self.total)
        # One more than there are, so that the last update is not made at a rate of 0.
        total = self.total + 1
        rate = learning_rate(self._updates, peak=self._peak, final=0.0, start=0.0, warmup=warmup, total=total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        autocast = torch.autocast(self._device, dtype=self._autocast) if self._autocast else nullcontext()
        with autocast:
            loss = batch_loss(self._model, batch) / batch.trained
        if not loss.isfinite():
            raise SlmError(f"update {self._updates:,}: the loss is {loss.item()}", "try a lower --learning-rate")
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return {"loss": loss.item(), "learning_rate": rate}
