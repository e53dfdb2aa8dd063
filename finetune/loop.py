"""The training loop: AdamW, warm-up and decay, one epoch kept, and stopping where the run can be gone on from."""

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.core.nn import CausalLM
from slm.core.progress import Progress
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, Packed, batch_loss, casting, epoch_batches, mean_loss
from slm.finetune.examples import Example
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import Standing, State
from slm.train.interrupt import Interruption
from slm.train.loop import duration
from slm.train.metrics import Row
from slm.train.precision import Precision, restore_scaler
from slm.train.schedule import learning_rate

# Share of the updates in which the rate rises to its peak; it then falls to 0 along a cosine.
WARMUP = 0.05
_BETAS = (0.9, 0.999)
# An adapter starts as no change at all, and decay would only pull it back there; a whole model starts as one that is good.
_WEIGHT_DECAY = 0.0
# Saving takes time and disk; a killed run loses this much at most. Ctrl-C and SIGTERM save first.
_SAVE_EVERY_S = 300.0
# After so long without a line about an epoch there is one about the updates since.
_LINE_EVERY_S = 60.0
# What AdamW remembers of a parameter.
_MOMENTS, _STEP = ("exp_avg", "exp_avg_sq"), "step"


class Fit:
    """A run from where it stands to its end."""

    def __init__(
        self,
        model: TunableLM | CausalLM,
        parameters: Mapping[str, nn.Parameter],
        rows: Sequence[Packed],
        measured: Sequence[Example],
        settings: FinetuneSettings,
        precision: Precision,
        standing: Standing,
        measured_on: str = "held-out loss",
    ) -> None:
        """Puts together what a run needs.

        Args:
            model: On its device, as it is before the first update.
            parameters: Those that are trained, by the names of the file that is made of them.
            rows: What is trained on.
            measured: What the loss is measured on, before the first epoch and after every one.
            settings: With nothing left open.
            precision: What the products are computed in.
            standing: Of a run that has not begun.
            measured_on: What the measured loss is called in the line about an epoch.
        """
        assert settings.epochs is not None and settings.learning_rate is not None
        self.standing = standing
        self._measured_on = measured_on
        self.kept: dict[str, Tensor] = {}
        self._model, self._parameters, self._rows, self._measured = model, dict(parameters), rows, measured
        self._settings, self._autocast, self._peak = settings, precision.autocast, settings.learning_rate
        self._updates_per_epoch = math.ceil(len(rows) / settings.batch_size)
        self._epochs, self._total = settings.epochs, settings.epochs * self._updates_per_epoch
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )
        self._device = model.model.norm.weight.device.type
        self._scaler = torch.amp.GradScaler(self._device, enabled=precision.scale_loss)
        self._batches: tuple[int, list[Batch]] = (0, [])
        self._said = time.perf_counter(), 0  # when there was a line, and how many rows of history it was about

    @property
    def kept_epoch(self) -> int:
        """The pass over the rows whose weights are kept, from 1; 0 before the first."""
        return self.standing.best_epoch if self._settings.keep == "best" else self._measured_epochs[-1][0]

    @property
    def kept_loss(self) -> float:
        """The measured loss of the weights that are kept; of the base before the first pass."""
        return dict(self._measured_epochs)[self.kept_epoch]

    @property
    def _measured_epochs(self) -> list[tuple[int, float]]:
        return [(row["epoch"], row["loss"]) for kind, row in self.standing.history if kind == "eval"]

    def state(self) -> State:
        """Returns where the run stands, with copies of nothing."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        moments = {
            f"{names[id(parameter)]}.{field}": tensor
            for parameter, values in self._optimizer.state.items()
            for field, tensor in values.items()
        }
        standing = self.standing.model_copy(update={"scaler": self._scaler.state_dict()})
        return State(standing, {name: p.detach() for name, p in self._parameters.items()}, moments, self.kept)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Goes back to where a run of the same course stood.

        Raises:
            SlmError: When what was saved is of other parameters.
        """
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        moments = {f"{name}.{field}": shape for name, shape in shapes.items() for field in _MOMENTS}
        moments |= {f"{name}.{_STEP}": torch.Size() for name in shapes}
        for saved, wanted, may_lack in (
            (state.weights, shapes, False),
            (state.kept, shapes, True),
            (state.optimizer, moments, True),
        ):
            found = {name: tensor.shape for name, tensor in saved.items()}
            odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if odd and (found or not may_lack):
                raise SlmError(f"the saved state does not fit the model: {odd[0]}", "--overwrite begins anew")
        where = state.standing
        whole_epochs = where.updates >= self._updates_per_epoch
        if where.updates > self._total or whole_epochs != (where.loss is not None) or whole_epochs != bool(state.kept):
            raise SlmError("the saved state says what cannot be of its updates and epochs", "--overwrite begins anew")
        self.standing, self.kept = where, state.kept
        for name, parameter in self._parameters.items():
            parameter.copy_(state.weights[name])
            fields = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in state.optimizer.items()
                if key.rpartition(".")[0] == name
            }
            if fields:
                self._optimizer.state[parameter] = {
                    # The step counter stays where fused AdamW looks for it: beside the parameter.
                    field: tensor.to(parameter.device)
                    for field, tensor in fields.items()
                }
        restore_scaler(self._scaler, state.standing.scaler)

    def run(self, progress: Progress, interruption: Interruption, save: Callable[[State], None]) -> None:
        """Trains to the end, or until the held-out loss falls no more.

        Args:
            progress: Is told how it goes.
            interruption: Says when the run is to stop.
            save: Keeps a state to go on from.

        Raises:
            SlmError: When the loss is no longer finite.
            KeyboardInterrupt: After saving, when Ctrl-C asked for it.
            SystemExit: After saving, when SIGTERM asked for it.
        """
        began, saved_at = time.perf_counter() - self.standing.seconds, time.perf_counter()
        progress.start("fine-tuning", self._total, "updates")
        progress.advance(self.standing.updates)
        try:
            if not self.standing.history:
                self._measure(0, progress)
            while self.standing.updates < self._total and not self._out_of_patience(progress):
                row, speed = self.update()
                self._told(progress, row, speed)
                epoch, into = divmod(self.standing.updates, self._updates_per_epoch)
                if into == 0:
                    self._measure(epoch, progress)
                elif time.perf_counter() - self._said[0] > _LINE_EVERY_S:
                    self._say_updates(progress, speed, time.perf_counter() - began)
                self.standing.seconds = time.perf_counter() - began
                stop = interruption.pending is not None and self.standing.updates < self._total
                if stop or time.perf_counter() - saved_at > _SAVE_EVERY_S:
                    save(self.state())
                    saved_at = time.perf_counter()
                if stop:
                    progress.note(f"stopping after update {self.standing.updates:,} of {self._total:,}; it is saved")
                    interruption.deliver()
        finally:
            progress.finish()

    def _told(self, progress: Progress, row: Row, speed: float) -> None:
        epoch = (self.standing.updates - 1) // self._updates_per_epoch + 1
        self.standing.history.append(("train", {"epoch": epoch, **self._position(), **row}))
        progress.advance(epoch=f"{epoch}/{self._epochs}", loss=f"{row['loss']:.3f}", tok_s=f"{speed:,.0f}")

    def _position(self) -> Row:
        return {"updates": self.standing.updates, "tokens": self.standing.tokens}

    def _train_loss(self, first: int) -> float:
        """Returns the mean loss of the updates in the history from a row on, in nats a learned token."""
        before = next((row["tokens"] for _, row in reversed(self.standing.history[:first])), 0)
        total, tokens = 0.0, before
        for kind, row in self.standing.history[first:]:
            if kind == "train":
                total += row["loss"] * (row["tokens"] - tokens)
                tokens = row["tokens"]
        return total / max(1, tokens - before)

    def _say_updates(self, progress: Progress, speed: float, seconds: float) -> None:
        """Says how it goes within a long epoch."""
        done, now = self.standing.updates, time.perf_counter()
        left = duration(seconds / done * (self._total - done))
        progress.note(
            f"update {done:,} of {self._total:,}, epoch {done // self._updates_per_epoch + 1}/{self._epochs}: "
            f"train loss {self._train_loss(self._said[1]):.3f}, {speed:,.0f} tokens/s, about {left} left"
        )
        self._said = now, len(self.standing.history)

    def _say_epoch(self, progress: Progress, epoch: int, loss: float) -> None:
        """Says what an epoch came to."""
        if epoch == 0:
            progress.note(f"before training: {self._measured_on} {loss:.3f}")
            return
        rows = self.standing.history
        first = next(number for number, (_, row) in enumerate(rows) if row["epoch"] == epoch)
        best = " (best so far)" * (self.standing.best_epoch == epoch)
        progress.note(
            f"epoch {epoch}/{self._epochs}: train loss {self._train_loss(first):.3f}, {self._measured_on} {loss:.3f}{best}"
        )
        self._said = time.perf_counter(), len(rows)

    def _measure(self, epoch: int, progress: Progress) -> None:
        loss = mean_loss(self._model, self._measured, self._settings.batch_size, self._autocast)
        if not math.isfinite(loss):
            hint = "try a lower --learning-rate" if epoch else "slm eval measures the base"
            raise SlmError(f"the held-out loss is {loss} after {epoch} epochs", hint)
        self.standing.history.append(("eval", {"epoch": epoch, **self._position(), "loss": loss}))
        if epoch == 0:
            self.standing.loss_before = loss
        elif self.standing.loss is None or loss < self.standing.loss:
            self.standing.loss, self.standing.best_epoch = loss, epoch
        if epoch and (self._settings.keep == "last" or self.standing.best_epoch == epoch):
            self.kept = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}
        self._say_epoch(progress, epoch, loss)

    @torch.no_grad()
    def put_kept(self) -> None:
        """Puts the weights that are kept into the model."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.kept[name])

    def _out_of_patience(self, progress: Progress) -> bool:
        epoch, into = divmod(self.standing.updates, self._updates_per_epoch)
        since = epoch - self.standing.best_epoch
        patience = self._settings.patience if self._settings.keep == "best" else None
        out = into == 0 and patience is not None and self.standing.loss is not None and since >= patience
        if out:
            progress.note(f"stopping early: no new best in {since} epochs")
        return out

    def _batch(self, update: int) -> Batch:
        """Returns what an update learns from; which follows from its number and the seed."""
        epoch, place = divmod(update, self._updates_per_epoch)
        if self._batches[0] != epoch or not self._batches[1]:
            order = random.Random(f"{self._settings.seed} {epoch}")
            self._batches = epoch, epoch_batches(self._rows, self._settings.batch_size, order)
        return self._batches[1][place]

    def update(self) -> tuple[Row, float]:
        """Makes one update; returns its loss and learning rate, and tokens a second."""
        began = time.perf_counter()
        batch = self._batch(self.standing.updates)
        number = self.standing.updates + 1
        # Dropout follows from the update's number too, so that a run that goes on draws what it would have drawn.
        digest = hashlib.sha256(f"{self._settings.seed} {number}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # One more than there are, so that the last update is not made at a rate of 0.
        warmup, total = round(WARMUP * self._total), self._total + 1
        rate = learning_rate(number, peak=self._peak, final=0.0, start=0.0, warmup=warmup, total=total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._model.train()
        with casting(self._model, self._autocast):
            loss = batch_loss(self._model, batch)
        if not loss.isfinite():
            raise SlmError(f"update {number:,}: the loss is {loss.item()}", "try a lower --learning-rate")
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.standing.updates, self.standing.tokens = number, self.standing.tokens + batch.trained
        return (
            {"loss": loss.item(), "learning_rate": rate},
            batch.input_ids.numel() / (time.perf_counter() - began),
        )
