"""What a run needs to go on: `RUN/trainer/`, with weights, optimizer and counters in one directory that appears whole.

Without a moving average the weights are those of `checkpoint/last`, linked rather than copied where the file system can: a
run killed between the two renames goes on from what `trainer/` holds, whichever checkpoint lies beside it.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_readable, read_json, recover
from slm.core.weights import WEIGHTS_FILE

TRAINER = "trainer"
_OPTIMIZER_FILE = "optimizer.safetensors"
_COUNTERS_FILE = "state.json"
_AVERAGE_FILE = "average.safetensors"
# More steps or tokens than any run has, and few enough for products of them to be written down.
MOST = 2**48
_FILES = frozenset((WEIGHTS_FILE, _OPTIMIZER_FILE, _COUNTERS_FILE, _AVERAGE_FILE))


class Counters(BaseModel):
    """Where a run stands, between two updates. Batches and learning rates follow from it and the recipe.

    Attributes:
        micro_steps: Done, of the batch that `course` names.
        course: What the state means something under: the recipe's values that may not change, by their names.
        elapsed_s: Seconds of training, evaluations included.
        scaler: State of the float16 loss scale; empty without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    micro_steps: int = Field(ge=0, le=MOST)
    course: dict[str, Any]
    elapsed_s: float = Field(default=0.0, ge=0)
    scaler: dict[str, int | float] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        accumulation = self.course.get("batch.accumulation")
        if type(accumulation) is not int or accumulation < 1:
            raise ValueError(f"course: batch.accumulation is {accumulation!r}")
        return self


@dataclass(frozen=True)
class SavedState:
    """What was saved of a run.

    Attributes:
        counters: Where it stood.
        weights: The model's tensors by name.
        optimizer: The optimizers' tensors, as `slm.train.optimizer.Optimizers.state_tensors` names them.
        average: The moving average of the weights; empty without one.
    """

    counters: Counters
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]


def save_state(
    run: Path,
    counters: Counters,
    optimizer: Mapping[str, Tensor],
    weights: Path | Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves where a run stands.

    Args:
        run: The run's directory.
        counters: Where it stands.
        optimizer: The optimizers' tensors by name.
        weights: The model's tensors, or a safetensors file of them, which may be replaced later but never written to.
        average: The moving average of the weights, where there is one.
    """
    with atomic_directory(run / TRAINER, _FILES) as directory:
        safetensors.torch.save_file(dict(optimizer), directory / _OPTIMIZER_FILE)
        (directory / _COUNTERS_FILE).write_text(counters.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if average is not None:
            safetensors.torch.save_file(dict(average), directory / _AVERAGE_FILE)
        if not isinstance(weights, Path):
            safetensors.torch.save_file(dict(weights), directory / WEIGHTS_FILE)
            return
        try:
            os.link(weights, directory / WEIGHTS_FILE)
        except OSError:  # a file system without links
            shutil.copyfile(weights, directory / WEIGHTS_FILE)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file of a saved state.

    Raises:
        SlmError: When there is no such file.
        SafetensorError: When it is damaged.
    """
    check_readable(file, "the state of the run")
    tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
    return tensors


def load_state(run: Path) -> SavedState | None:
    """Returns what was saved last; None for a run that was killed before it saved anything.

    Raises:
        SlmError: When it is damaged.
    """
    directory = run / TRAINER
    recover(directory)
    if not directory.is_dir():
        return None
    try:
        counters = Counters.model_validate(read_json(directory / _COUNTERS_FILE, "the state of the run"))
        weights, optimizer = (load_tensors(directory / name) for name in (WEIGHTS_FILE, _OPTIMIZER_FILE))
        averaged = directory / _AVERAGE_FILE
        average = load_tensors(averaged) if averaged.is_file() else {}
    except ValidationError as error:
        raise SlmError(
            f"the saved state is damaged: {directory / _COUNTERS_FILE} ({first_mistake(error)})",
            "start a new run with another --out",
        ) from None
    except (SafetensorError, OSError) as error:
        raise SlmError(
            f"the saved state is damaged: {directory} ({error})", "start a new run with another --out"
        ) from None
    return SavedState(counters, weights, optimizer, average)
