"""The state of an interrupted fine-tuning run: `OUT/trainer/`, beside the result that the run will write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.train.metrics import Kind, Row, check_row
from slm.train.spikes import SpikeState
from slm.train.state import MOST, OPTIMIZER_FILE, POSITION_FILE, TRAINER, Position, read_state, write_state

_WEIGHTS_FILE, _KEPT_FILE = "weights.safetensors", "kept.safetensors"
_FILES = frozenset((POSITION_FILE, _WEIGHTS_FILE, OPTIMIZER_FILE, _KEPT_FILE))
TRAINER_FILES = frozenset(f"{TRAINER}/{name}" for name in _FILES)
START_OVER = "--overwrite starts over"


class Standing(Position):
    """The position of a fine-tuning run. It changes as the run proceeds.

    Attributes:
        updates: Steps of the optimizer.
        tokens: Tokens that counted in the loss so far, over all epochs.
        loss_before: Loss before the first update, in nats per token; None before it was measured.
        loss: Loss of the best epoch; None before the first.
        best_epoch: The first epoch with the highest score, or the lowest loss without a metric; 0 before the first.
        spikes: What is remembered about loss spikes.
        history: Rows for `slm.train.metrics.Metrics`, each with its kind.
    """

    updates: int = Field(default=0, ge=0, le=MOST)
    tokens: int = Field(default=0, ge=0, le=MOST)
    loss_before: float | None = None
    loss: float | None = None
    best_epoch: int = Field(default=0, ge=0)
    spikes: SpikeState = SpikeState()
    history: list[tuple[Kind, Row]] = Field(default_factory=list)

    @property
    def evaluations(self) -> list[Row]:
        """The rows of the evaluations, the one before the first update included."""
        return [row for kind, row in self.history if kind == "eval"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.course.get("settings"), dict):
            raise ValueError("course: no settings")
        for kind, row in self.history:
            check_row({"type": kind, **row})
            for name in ("epoch", "updates", "tokens"):
                if type(row.get(name)) is not int or not 0 <= row[name] <= MOST:
                    raise ValueError(f"history: a row has no whole number as {name!r}")
        if (self.loss_before is None) != (not self.evaluations):
            raise ValueError("loss_before: does not fit the history")
        if self.history and self.best_epoch not in (row["epoch"] for row in self.evaluations):
            raise ValueError("best_epoch: was not measured")
        return self


@dataclass
class State:
    """The state of a run.

    Attributes:
        standing: The position.
        weights: The trained tensors by name.
        optimizer: The optimizer's tensors, as `slm.train.optimizer.Optimizers.state_tensors` names them.
        kept: The trained tensors after the epoch that is kept; empty before the first.
    """

    standing: Standing
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


def save_state(out: Path, state: State) -> None:
    """Writes the state of a run, whole or not at all."""
    files = {_WEIGHTS_FILE: state.weights, OPTIMIZER_FILE: state.optimizer, _KEPT_FILE: state.kept}
    write_state(out, state.standing, files, _FILES)


def load_state(out: Path) -> State | None:
    """Returns the saved state; None where there is none.

    Raises:
        SlmError: When it is damaged.
    """
    found = read_state(out, Standing, (_WEIGHTS_FILE, OPTIMIZER_FILE, _KEPT_FILE), hint=START_OVER)
    if found is None:
        return None
    standing, tensors = found
    return State(standing, tensors[_WEIGHTS_FILE], tensors[OPTIMIZER_FILE], tensors[_KEPT_FILE])


def saved_precision(out: Path, device: torch.device) -> str | None:
    """Returns the name of the precision of an interrupted run on this kind of device; None where there is none."""
    try:
        course = read_json(out / TRAINER / POSITION_FILE, "the state of the run")["course"]
        name, _, of = str(course["precision"]).rpartition(" on ")
    except (SlmError, KeyError, TypeError):  # `load_state` reports the damage
        return None
    return name if of == device.type else None


def resumable(out: Path, course: Mapping[str, Any]) -> State | None:
    """Returns the saved state of a run with the same course; None where there is none.

    Raises:
        SlmError: When it is damaged, or of a run with another course; the message names what differs.
    """
    state = load_state(out)
    if state is None or state.standing.course == course:
        return state
    was, settings = state.standing.course, course["settings"]
    changed = [name for name in course if name not in ("settings", "held_out") and was.get(name) != course[name]]
    changed += [name for name, value in settings.items() if was["settings"].get(name) != value]
    raise SlmError(  # held_out follows from the other values, unless another version of slm drew the rows
        f"{out} holds an interrupted run that differs in {', '.join(changed or ['held_out'])}",
        f"give the same values to resume it; {START_OVER}",
    )


def drop_state(out: Path) -> None:
    """Removes the saved state, and the directory around it if nothing else is in it."""
    renames.remove_leftovers(out / TRAINER)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
