"""The record, in the `slm.json` of a checkpoint, of the rows that it was fine-tuned on: paths and hashes, never their text."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# The field of `slm.json`. The last fine-tuning of a model replaces the record of an earlier one.
RECORD = "tuned_on"
# Records of fine-tuning, at any depth, whose sample answers are texts of the rows.
_RUNS = ("finetune", "finetuned", "merged")


class RowsFile(BaseModel):
    """A file or directory of rows.

    Attributes:
        path: The path as it was given.
        sha256: Its hash; of a directory, over the names and hashes of its files.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: str
    sha256: str


class TunedOn(BaseModel):
    """The rows of a fine-tuning run.

    Attributes:
        data: The training rows.
        validation: The held-out rows; None if they were drawn from the training rows.
        skip_bad: Whether rows that cannot be read were skipped.
        held_out_rows: The numbers, from 1, of the rows that were drawn.
        teacher: The teacher, which answered rows that end with a request; None without one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    data: RowsFile
    validation: RowsFile | None = None
    skip_bad: bool = False
    held_out_rows: tuple[int, ...] = Field(default=())
    teacher: dict[str, str] | None = None


def tuned_on(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the field of `slm.json` for the record of a fine-tuning run; None in it if the run does not name its rows."""
    try:
        return {RECORD: TunedOn.model_validate(dict(run)).model_dump(mode="json")}
    except ValidationError:  # an adapter of another program
        return {RECORD: None}


def recorded_rows(info: object) -> TunedOn | None:
    """Returns the rows that a model was fine-tuned on last; None if its `slm.json` does not name them."""
    try:
        return TunedOn.model_validate(info[RECORD]) if isinstance(info, Mapping) and RECORD in info else None
    except ValidationError:
        return None


def without_samples(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a model without the texts of rows that runs of fine-tuning record as samples."""
    found = dict(info)
    for name in _RUNS:
        run = found.get(name)
        if isinstance(run, Mapping):
            found[name] = without_samples({key: value for key, value in run.items() if key != "samples"})
    return found
