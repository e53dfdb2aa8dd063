"""The interface of a log of metrics, and the form in which all logs receive a row."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Row = Mapping[str, Any]
# How a run ended: "stopped" on request, so that it can be resumed.
Ending = Literal["finished", "stopped", "failed"]

_GROUPS = {"train": "train", "eval": "validation"}
_POSITION = ("type", "micro_steps", "updates", "epoch", "tokens", "elapsed_s")


@dataclass(frozen=True)
class About:
    """A run, as logs describe it.

    Attributes:
        directory: The directory of the run.
        recipe: The resolved recipe, as JSON.
        board_step: Returns TensorBoard's step of a row.
    """

    directory: Path
    recipe: Mapping[str, Any]
    board_step: Callable[[Row], int]

    @property
    def name(self) -> str:
        """A short name: the run's, with the adapter's if there is one."""
        path = self.directory.absolute()
        return f"{path.parents[1].name}-{path.name}" if path.parent.name == "adapters" else path.name


class Log(Protocol):
    """A destination of rows of metrics; see `slm.train.metrics`."""

    @property
    def run_id(self) -> str | None:
        """The identifier under which a resumed run goes on; None if there is none."""

    def add(self, row: Row) -> None:
        """Takes a row."""

    def close(self, ending: Ending) -> None:
        """Writes everything, and closes the log."""


def scalars(row: Row) -> dict[str, float]:
    """Returns the numbers of a row of training or evaluation under their tags, such as "validation/loss"."""
    group = _GROUPS.get(row["type"])
    if group is None:
        return {}
    numbers = {name: value for name, value in row.items() if name not in _POSITION and _is_number(value)}
    return {f"{group}/{name}": float(value) for name, value in numbers.items()}


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a recipe under their dotted names."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
