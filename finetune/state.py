"""Where an interrupted run stands: `OUT/trainer/`, one directory that appears whole, beside what the run will make."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_text, recover
from slm.train.metrics import Kind, Row

TRAINER = "trainer"
_STATE, _WEIGHTS, _OPTIMIZER, _BEST = "state.json", "weights.safetensors", "optimizer.safetensors", "best.safetensors"
_FILES = frozenset((_STATE, _WEIGHTS, _OPTIMIZER, _BEST))
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
    updates: int = 0
    tokens: int = 0
    loss_before: float = float("nan")
    loss: float | None = None
    best_epoch: int = 0
    history: list[tuple[Kind, Row]] = []
    scaler: dict[str, Any] = {}
    seconds: float = 0.0


@dataclass
class State:
    """A run's standing and its tensors.

    Attributes:
        standing: How far it is.
        weights: What is trained, by name.
        optimizer: Moments and steps by "NAME.FIELD".
        best: What was trained, as it was after the best epoch; empty before the first.
    """

    standing: Standing
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)


def save_state(out: Path, state: State) -> None:
    """Writes where a run stands, whole or not at all."""
    with atomic_directory(out / TRAINER, _FILES) as directory:
        for name, tensors in ((_WEIGHTS, state.weights), (_OPTIMIZER, state.optimizer), (_BEST, state.best)):
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
        standing = Standing.model_validate_json(read_text(directory / _STATE, "the state of the run"))
        weights, optimizer, best = (
            safetensors.torch.load_file(directory / name) for name in (_WEIGHTS, _OPTIMIZER, _BEST)
        )
    except (ValidationError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SlmError(f"the saved state is damaged: {directory} ({reason})", "--overwrite begins anew") from None
    return State(standing, weights, optimizer, best)


def drop_state(out: Path) -> None:
    """Removes what was saved, and the directory around it where it holds nothing else."""
    shutil.rmtree(out / TRAINER, ignore_errors=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
