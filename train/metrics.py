"""`metrics.jsonl`, one object a line, and the curve drawn from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slm.core.files import atomic_file, write_text

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"

Kind = Literal["train", "eval"]
Row = Mapping[str, Any]


class Metrics:
    """The rows of a run: "train" for every update, "eval" for every evaluation."""

    def __init__(self, run: Path, micro_steps: int) -> None:
        """Opens the metrics of a run that goes on after `micro_steps`; what was written later is dropped."""
        self._file = run / METRICS_FILE
        self._curve = run / CURVE_FILE
        kept = [row for row in _read(self._file) if row["micro_steps"] <= micro_steps]
        self._rows: dict[Kind, list[Row]] = {"train": [], "eval": []}
        for row in kept:
            self._rows[row["type"]].append(row)
        write_text(self._file, "".join(map(_line, kept)))

    def add(self, kind: Kind, row: Row) -> None:
        """Appends a row and writes it."""
        row = {"type": kind, **row}
        self._rows[kind].append(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    @property
    def evaluations(self) -> Sequence[Row]:
        """The "eval" rows in order."""
        return self._rows["eval"]

    @property
    def best(self) -> Row | None:
        """The evaluation with the lowest loss after an update; None before there was one."""
        return min((row for row in self.evaluations if row["updates"] > 0), key=lambda row: row["loss"], default=None)

    def draw(self) -> None:
        """Draws the losses of training and validation over the tokens seen."""
        from matplotlib.figure import Figure  # not pyplot: no global state, no window system

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        curves: tuple[tuple[Kind, str, str], ...] = (("train", "training", "-"), ("eval", "validation", "o-"))
        for kind, label, style in curves:
            tokens, losses = ([row[name] for row in self._rows[kind]] for name in ("tokens", "loss"))
            axes.plot(tokens, losses, style, label=label, linewidth=1, markersize=4)
        axes.set(xlabel="tokens", ylabel="loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_file(self._curve) as partial:
            figure.savefig(partial, format="png", dpi=120)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _read(file: Path) -> list[Row]:
    """Returns the rows up to the first that a killed process left half written."""
    rows: list[Row] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
