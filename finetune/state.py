"""Where an interrupted run stands: `OUT/trainer/`, one directory that appears whole, beside what the run will make."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_json, recover
from slm.train.metrics import Kind, Row, check_row
from slm.train.state import MOST, load_tensors

TRAINER = "trainer"
_STATE, _WEIGHTS, _OPTIMIZER, _KEPT = "state.json", "weights.safetensors", "optimizer.safetensors", "kept.safetensors"
_FILES = frozenset((_STATE, _WEIGHTS, _OPTIMIZER, _KEPT))
TRAINER_FILES = frozenset(f"{TRAINER}/{name}" for name in _FILES)


class Standing(BaseModel):
    """How far a run is. Batches, dropout and learning rates follow from it and from `course`.

    Attributes:
        course: What the state means something under: settings, data, base and machine.
        updates: Steps of the optimizer.
        tokens: Tokens learned, all epochs together.
        loss_before: Nats a learned token, before the first update.
        loss: Of the best epoch; None before the first.
        best_epoch: The first with the lowest loss.
        history: Rows for `slm.train.metrics.Metrics`, each with its kind.
        scaler: State of the float16 loss scale; empty without one.
        seconds: Wall time of all runs up to here.
    """

    model_config = ConfigDict(extra="forbid")

    course: dict[str, Any]
    updates: int = Field(default=0, ge=0, le=MOST)
    tokens: int = Field(default=0, ge=0, le=MOST)
    loss_before: float = float("nan")
    loss: float | None = None
    best_epoch: int = Field(default=0, ge=0)
    history: list[tuple[Kind, Row]] = []
    scaler: dict[str, int | float] = {}
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.course.get("settings"), dict):
            raise ValueError("course: no settings")
        for kind, row in self.history:
            check_row({"type": kind, **row})
            for name in ("epoch", "updates", "tokens"):
                if type(row.get(name)) is not int or not 0 <= row[name] <= MOST:
                    raise ValueError(f"history: a row has no whole number as {name!r}")
        if self.history and self.best_epoch not in (row["epoch"] for kind, row in self.history if kind == "eval"):
            raise ValueError("best_epoch: was not measured")
        return self


@dataclass
class State:
    """A run's standing and its tensors.

    Attributes:
        standing: How far it is.
        weights: What is trained, by name.
        optimizer: Moments and steps by "NAME.FIELD".
        kept: What was trained, as it was after the epoch that is kept; empty before the first.
    """

    standing: Standing
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


def save_state(out: Path, state: State) -> None:
    """Writes where a run stands, whole or not at all."""
    with atomic_directory(out / TRAINER, _FILES) as directory:
        for name, tensors in ((_WEIGHTS, state.weights), (_OPTIMIZER, state.optimizer), (_KEPT, state.kept)):
            safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)
        (directory / _STATE).write_text(state.standing.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_state(out: Path) -> State | None:
    """Returns what was saved; None where there is nothing.

    Raises:
        SlmError: When it is damaged.
    """
    directory = out / TRAINER
    recover(directory)
    if not directory.is_dir():
        return None
    try:
        standing = Standing.model_validate(read_json(directory / _STATE, "the state of the run"))
        weights, optimizer, kept = (load_tensors(directory / name) for name in (_WEIGHTS, _OPTIMIZER, _KEPT))
    except ValidationError as error:
        raise SlmError(
            f"the saved state is damaged: {directory / _STATE} ({first_mistake(error)})", "--overwrite begins anew"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SlmError(f"the saved state is damaged: {directory} ({reason})", "--overwrite begins anew") from None
    return State(standing, weights, optimizer, kept)


def drop_state(out: Path) -> None:
    """Removes what was saved, and the directory around it where it holds nothing else."""
    shutil.rmtree(out / TRAINER, ignore_errors=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
