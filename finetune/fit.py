"""The weights that fine-tuning trains: batches by number, updates with AdamW, evaluation, and the epoch that is kept."""

import hashlib
import math
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import rounded_in_place
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch
from slm.finetune.judge import Judge, score_fields
from slm.finetune.material import Material
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import START_OVER, Standing, State
from slm.train.evaluate import Check
from slm.train.learner import Learner, UpdateSettings
from slm.train.metrics import Row
from slm.train.optimizer import Optimizers
from slm.train.precision import Precision, restore_scaler
from slm.train.schedule import Schedule
from slm.train.sections import SpikesRecipe
from slm.train.spikes import SpikeGuard

# Share of the updates in which the rate rises to its peak; it then falls to 0 along a cosine.
WARMUP = 0.05
_BETAS = (0.9, 0.999)
# An adapter starts as no change at all, and decay would only pull it back there; a whole model starts as a good one.
_WEIGHT_DECAY = 0.0
# What a spike is, with `skip_spikes`; as in the recipes of `slm train`.
_SPIKES = SpikesRecipe(action="skip")


@dataclass(frozen=True)
class Trainable:
    """A model on its device, as it is before the first update.

    Attributes:
        model: The model.
        parameters: The parameters that are trained, by their names in the file that is written.
    """

    model: TunableLM | CausalLM
    parameters: Mapping[str, nn.Parameter]

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns names and parameters."""
        return self.parameters.items()


class _Objective(nn.Module):
    """A model and its loss on a batch as one module, which is what `Learner` takes."""

    def __init__(self, model: TunableLM | CausalLM, material: Material) -> None:
        super().__init__()
        self.model = model
        self._material = material

    def forward(self, batch: Batch) -> Tensor:
        return self._material.loss(self.model, batch)


class Fit:
    """The weights of a run, its position, and the weights of the epoch that is kept."""

    def __init__(
        self,
        trainable: Trainable,
        material: Material,
        settings: FinetuneSettings,
        precision: Precision,
        standing: Standing,
        judge: Judge | None = None,
    ) -> None:
        """Prepares the first update.

        Args:
            trainable: The model.
            material: The rows.
            settings: Resolved hyperparameters.
            precision: The type of the products.
            standing: The position of a run that has not begun.
            judge: Scores the replies after each epoch; None chooses the epoch by the loss.
        """
        assert settings.epochs is not None and settings.learning_rate is not None and settings.batch_size is not None
        self.standing = standing
        self.material = material
        self.judge = judge
        self.epochs = settings.epochs
        self.updates_per_epoch = math.ceil(len(material) / settings.batch_size)
        self.updates = self.epochs * self.updates_per_epoch
        self.kept: dict[str, Tensor] = {}
        self._trainable, self._settings, self._autocast = trainable, settings, precision.autocast
        self._batch_size = settings.batch_size
        group = {"params": list(trainable.parameters.values()), "weight_decay": _WEIGHT_DECAY, "rate": 1.0}
        # One update more than there are, so that the last one is not made at a rate of 0.
        schedule = Schedule(
            peak=settings.learning_rate, final=0.0, total=self.updates + 1, warmup=round(WARMUP * self.updates)
        )
        self._guard = None
        if settings.skip_spikes:
            advice = "try a lower --learning-rate, and look for damaged rows"
            self._guard = SpikeGuard("skip", _SPIKES.threshold, _SPIKES.window, _SPIKES.limit, advice)
        self._learner = Learner(
            _Objective(trainable.model, material),
            Optimizers([torch.optim.AdamW([group], betas=_BETAS, fused=True)]),
            self._inputs,
            UpdateSettings(schedule.rate, precision, max_grad_norm=settings.max_grad_norm),
            trained=trainable.parameters.values(),
            guard=self._guard,
        )
        self._batches: tuple[int, list[Batch]] = (0, [])

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are kept, from 1; 0 before the first."""
        if self._settings.keep == "best":
            return self.standing.best_epoch
        epoch: int = self.standing.evaluations[-1]["epoch"]
        return epoch

    @property
    def kept_loss(self) -> float:
        """The measured loss of the weights that are kept; of the base before the first epoch."""
        return float(self._evaluation(self.kept_epoch)["loss"])

    @property
    def scores(self) -> tuple[Row, Row] | None:
        """The evaluations with the scores of the base and of the weights that are kept; None without a metric."""
        return None if self.judge is None else (self._evaluation(0), self._evaluation(self.kept_epoch))

    @property
    def preferred(self) -> tuple[float, float] | None:
        """The share of the measured pairs whose chosen answer is likelier, of the base and of the weights that are kept."""
        before, after = (self._evaluation(epoch).get("preferred") for epoch in (0, self.kept_epoch))
        return None if before is None or after is None else (before, after)

    def _evaluation(self, epoch: int) -> Row:
        return next(row for row in reversed(self.standing.evaluations) if row["epoch"] == epoch)

    def state(self) -> State:
        """Returns the state for resuming. Its tensors share memory with the weights."""
        standing = self.standing.model_copy(update={"scaler": self._learner.scaler.state_dict()})
        if self._guard is not None:
            standing = standing.model_copy(update={"spikes": self._guard.state()})
        weights = {name: parameter.detach() for name, parameter in self._trainable.named_parameters()}
        return State(standing, weights, self._learner.optimizers.state_tensors(self._trainable), self.kept)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Returns to the state of a run with the same course.

        Raises:
            SlmError: When the state is of other parameters, or contradicts itself.
        """
        shapes = {name: parameter.shape for name, parameter in self._trainable.named_parameters()}
        for saved, may_be_empty in ((state.weights, False), (state.kept, True)):
            found = {name: tensor.shape for name, tensor in saved.items()}
            odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            if odd and (found or not may_be_empty):
                raise SlmError(f"the saved state does not fit the model: {odd[0]}", START_OVER)
        self._check_position(state)
        self.standing, self.kept = state.standing, state.kept
        for name, parameter in self._trainable.named_parameters():
            parameter.copy_(state.weights[name])
        self._learner.optimizers.load_state_tensors(self._trainable, state.optimizer, hint=START_OVER)
        restore_scaler(self._learner.scaler, state.standing.scaler, hint=START_OVER)
        if self._guard is not None:
            self._guard.restore(state.standing.spikes)

    def _check_position(self, state: State) -> None:
        where = state.standing
        epoch, into = divmod(where.updates, self.updates_per_epoch)
        # A run that is saved at the end of an epoch may not have evaluated it yet.
        evaluated = where.evaluations[-1]["epoch"] if where.evaluations else None
        fits = evaluated == epoch or (into == 0 and evaluated == (epoch - 1 if epoch else None))
        after_an_epoch = bool(evaluated)
        if (
            where.updates > self.updates
            or not fits
            or after_an_epoch != (where.loss is not None)
            or after_an_epoch != bool(state.kept)
            or any(("score" in row) != (self.judge is not None) for row in where.evaluations)
        ):
            raise SlmError("the saved state contradicts itself: updates, epochs and losses do not match", START_OVER)

    def _inputs(self, update: int) -> tuple[Batch]:
        """Returns the batch of an update, and seeds dropout for it: a resumed run draws what it would have drawn."""
        digest = hashlib.sha256(f"{self._settings.seed} {update + 1}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return (self._batch(update),)

    def _batch(self, update: int) -> Batch:
        """Returns the batch of an update, which follows from its number and the seed."""
        epoch, place = divmod(update, self.updates_per_epoch)
        if self._batches[0] != epoch or not self._batches[1]:
            order = random.Random(f"{self._settings.seed} {epoch}")
            self._batches = epoch, self.material.batches(self._batch_size, order)
        return self._batches[1][place]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return list(self._trainable.parameters.values())

    def first_epoch(self) -> list[Batch]:
        """Returns the batches of the first epoch."""
        self._batch(0)
        return self._batches[1]

    def update(self, check: Check) -> tuple[Row, float]:
        """Makes one update; returns its loss and learning rate, and tokens per second. Of a spike, returns the row about it.

        Args:
            check: Called before the weights change; may raise to abandon the update.

        Raises:
            FloatingPointError: When the loss or the gradient is not finite; the weights are unchanged.
            SlmError: When too many updates were spikes.
        """
        began, number = time.perf_counter(), self.standing.updates
        update = self._learner.update(number, check)
        batch = self._batch(number)
        self.standing.updates, self.standing.tokens = number + 1, self.standing.tokens + batch.trained
        row: Row = {"loss": update.loss, "learning_rate": update.learning_rate}
        if update.spike is not None:
            assert self._guard is not None
            self._guard.count(number, update.spike)
            row = {"action": "skip", "at_update": number + 1, **update.spike.fields(), "reason": update.spike.reason}
        return row, batch.input_ids.numel() / (time.perf_counter() - began)

    def evaluate(self, check: Check) -> float:
        """Returns the measured loss, and keeps the weights if they are the best so far, or if the last epoch is kept.

        The best weights have the highest score of the judge, and of equal scores the lowest loss.

        Args:
            check: Called between batches; may raise to abandon the evaluation.

        Raises:
            FloatingPointError: When the loss is not finite.
        """
        standing, epoch = self.standing, self.standing.updates // self.updates_per_epoch
        with rounded_in_place(self._trainable.model):
            loss = self.material.measure(self._trainable.model, self._batch_size, self._autocast, check)
            judged = None
            if self.judge is not None and math.isfinite(loss):
                judged = self.judge.measure(self._trainable.model, self._autocast, check)
        self._learner.objective.train()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {self.material.loss_name} is {loss}")
        row = {"epoch": epoch, **self.position(), "loss": loss, **self.material.figures}
        row |= {} if judged is None else score_fields(judged)
        better = standing.loss is None or _rank(row) > _rank(self._evaluation(standing.best_epoch))
        standing.history.append(("eval", row))
        if epoch == 0:
            standing.loss_before = loss
        elif better:
            standing.loss, standing.best_epoch = loss, epoch
        if epoch and (self._settings.keep == "last" or standing.best_epoch == epoch):
            self.kept = {name: p.detach().cpu().clone() for name, p in self._trainable.named_parameters()}
        return loss

    def position(self) -> Row:
        """Returns the fields of a row of metrics that place it in the run."""
        return {"updates": self.standing.updates, "tokens": self.standing.tokens}

    @torch.no_grad()
    def put_kept(self) -> None:
        """Puts the weights that are kept into the model."""
        for name, parameter in self._trainable.named_parameters():
            parameter.copy_(self.kept[name])


def _rank(row: Row) -> tuple[float, float]:
    """Returns a value that is higher for better evaluations: by the score, if there is one, and then by the loss."""
    return row.get("score", 0.0), -row["loss"]
