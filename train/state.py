"""The state from which a run resumes: `RUN/trainer/`, one directory that appears whole or not at all.

`slm train` and `slm finetune` keep their position as JSON and their tensors in safetensors files beside it.

For `slm train` without a moving average the weights are those of `checkpoint/last`, linked rather than copied where the file
system can. A run that is killed between the two renames resumes from `trainer/`, whichever checkpoint lies beside it.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_readable, read_json, recover
from slm.core.weights import WEIGHTS_FILE
from slm.train.spikes import SpikeState

TRAINER = "trainer"
# The state to which a spike rewinds: the files of an earlier `trainer/`.
REWIND = "rewind"
POSITION_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_AVERAGE_FILE = "average.safetensors"
# More steps or tokens than any run has, and few enough that products of them can be printed.
MOST = 2**48
_NEW_RUN = "start a new run with another --out"


class Position(BaseModel):
    """The position of a run between two updates. Batches, dropout and learning rates follow from it and `course`.

    Attributes:
        course: The values under which the state is valid, by name; a resumed run must have the same ones.
        elapsed_s: Seconds of training so far, evaluations and earlier parts of a resumed run included.
        scaler: State of the float16 loss scale; empty without one.
        logs: Identifiers of the run in the logs that continue it, by the names of the logs.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    course: dict[str, Any]
    elapsed_s: float = Field(default=0.0, ge=0)
    scaler: dict[str, int | float] = {}
    logs: dict[str, str] = {}


class Counters(Position):
    """The position of a run of `slm train`.

    Attributes:
        micro_steps: Micro-steps done, of the batch that `course` names.
        precision: Name of the precision; None in a state that an older version saved.
        spikes: What is remembered about loss spikes.
    """

    model_config = ConfigDict(frozen=True)

    micro_steps: int = Field(ge=0, le=MOST)
    precision: str | None = None
    spikes: SpikeState = SpikeState()

    @model_validator(mode="after")
    def _check(self) -> Self:
        accumulation = self.course.get("batch.accumulation")
        if type(accumulation) is not int or accumulation < 1:
            raise ValueError(f"course: batch.accumulation is {accumulation!r}")
        return self


@dataclass(frozen=True)
class SavedState:
    """The saved state of a run of `slm train`.

    Attributes:
        counters: The position.
        weights: The model's tensors by name.
        optimizer: The optimizers' tensors, as `slm.train.optimizer.Optimizers.state_tensors` names them.
        average: The moving average of the weights; empty without one.
    """

    counters: Counters
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]


_TRAINING_FILES = frozenset((WEIGHTS_FILE, OPTIMIZER_FILE, POSITION_FILE, _AVERAGE_FILE))
AnyPosition = TypeVar("AnyPosition", bound=Position)
Files = Mapping[str, Mapping[str, Tensor] | Path]


def write_state(run: Path, position: Position, files: Files, may_hold: frozenset[str]) -> None:
    """Writes `run/trainer`, whole or not at all.

    Args:
        run: The directory of the run.
        position: The position of the run.
        files: Tensors by file name, or a safetensors file to link or copy; the latter may be replaced later but never
            written to.
        may_hold: Names of all files that such a directory may hold.
    """
    with atomic_directory(run / TRAINER, may_hold) as directory:
        for name, tensors in files.items():
            if not isinstance(tensors, Path):
                whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                safetensors.torch.save_file(whole, directory / name)
                continue
            _link(tensors, directory / name)
        (directory / POSITION_FILE).write_text(position.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="")


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        shutil.copyfile(file, target)


def read_state(
    run: Path,
    kind: type[AnyPosition],
    files: Sequence[str],
    *,
    optional: Sequence[str] = (),
    hint: str = _NEW_RUN,
    where: str = TRAINER,
) -> tuple[AnyPosition, dict[str, dict[str, Tensor]]] | None:
    """Reads `run/trainer`. Returns the position and the tensors by file name, or None where nothing was saved.

    Args:
        run: The directory of the run.
        kind: The class of the position.
        files: Names of the files of tensors.
        optional: Names of files that may be absent; their tensors are then empty.
        hint: What to do about a damaged state.
        where: The directory in the run.

    Raises:
        SlmError: When the state is damaged.
    """
    directory = run / where
    recover(directory)
    if not directory.is_dir():
        return None
    try:
        position = kind.model_validate(read_json(directory / POSITION_FILE, "the state of the run"))
        tensors = {name: _load(directory / name) for name in files}
        tensors |= {name: _load(directory / name) if (directory / name).is_file() else {} for name in optional}
    except ValidationError as error:
        raise SlmError(
            f"the saved state is damaged: {directory / POSITION_FILE} ({first_mistake(error)})", hint
        ) from None
    except (SafetensorError, OSError) as error:
        raise SlmError(f"the saved state is damaged: {directory} ({' '.join(str(error).split())})", hint) from None
    return position, tensors


def _load(file: Path) -> dict[str, Tensor]:
    check_readable(file, "the state of the run")
    # Not mapped: the next saved state replaces the file, which Windows does not allow while it is mapped.
    with safetensors.safe_open(str(file), framework="pt", backend="pread") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it has no other iterator


def save_state(
    run: Path,
    counters: Counters,
    optimizer: Mapping[str, Tensor],
    weights: Path | Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the state of a run of `slm train`.

    Args:
        run: The directory of the run.
        counters: The position.
        optimizer: The optimizers' tensors by name.
        weights: The model's tensors, or a safetensors file of them, which may be replaced later but never written to.
        average: The moving average of the weights, where there is one.
    """
    files: dict[str, Mapping[str, Tensor] | Path] = {OPTIMIZER_FILE: optimizer, WEIGHTS_FILE: weights}
    if average is not None:
        files[_AVERAGE_FILE] = average
    write_state(run, counters, files, _TRAINING_FILES)


def keep_rewind_point(run: Path) -> None:
    """Keeps the saved state as the one to which a spike rewinds. Its files are linked: a later save replaces them."""
    with atomic_directory(run / REWIND, _TRAINING_FILES) as directory:
        for file in sorted((run / TRAINER).iterdir()):
            _link(file, directory / file.name)


def rewind_position(run: Path) -> Counters | None:
    """Returns the position to which a spike rewinds; None where there is none.

    Raises:
        SlmError: When it is damaged.
    """
    found = read_state(run, Counters, (), where=REWIND)
    return None if found is None else found[0]


def load_state(run: Path, where: str = TRAINER) -> SavedState | None:
    """Returns a saved state of a run of `slm train`; None where a run was killed before it saved anything.

    Args:
        run: The directory of the run.
        where: `TRAINER` or `REWIND`.

    Raises:
        SlmError: When it is damaged.
    """
    found = read_state(run, Counters, (WEIGHTS_FILE, OPTIMIZER_FILE), optional=(_AVERAGE_FILE,), where=where)
    if found is None:
        return None
    counters, tensors = found
    return SavedState(counters, tensors[WEIGHTS_FILE], tensors[OPTIMIZER_FILE], tensors[_AVERAGE_FILE])
