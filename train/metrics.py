"""Metrics of a run: `metrics.jsonl`, the plot of the losses, and the logs that receive the same rows."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slm.core.errors import SlmError
from slm.core.figures import new_figure
from slm.core.files import atomic_file, check_readable, read_text, write_text
from slm.train.logs.logs import Logs

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
# Above every count and loss; comparisons with NaN are false too.
_LARGEST = 2.0**63

Kind = Literal["train", "eval", "sample", "spike", "slow", "hang"]
Row = Mapping[str, Any]

# Fields of each kind of row that are numbers, or null.
_NUMBERS: dict[Kind, tuple[str, ...]] = {
    "train": ("loss", "learning_rate", "grad_norm", "tokens_s"),
    "eval": ("loss", "perplexity", "bits_per_byte", "score"),
    "sample": (),
    "spike": ("loss", "grad_norm", "usual_loss", "usual_grad_norm", "at_update"),
    "slow": ("tokens_s", "usual_tokens_s", "seconds"),
    "hang": ("seconds",),
}
# Kinds of rows that always have a loss.
_WITH_LOSS = ("train", "eval")


class Metrics:
    """The rows of a run: "train" for every update, "eval" for every evaluation, "sample" for every sample text.

    A "spike" is an update that was not made, "slow" and "hang" are warnings of the watchdog.
    """

    def __init__(
        self,
        run: Path,
        updates: int,
        *,
        best: Row | None = None,
        write: bool = True,
        logs: Logs | None = None,
        rewinds: Sequence[Row] = (),
    ) -> None:
        """Opens the metrics of a run that resumes after a number of updates; later rows are dropped.

        Args:
            run: The directory of the run.
            updates: Updates done.
            best: Metrics of the best checkpoint on the disk; its row may be one of those that are dropped.
            write: Whether to write files; only one of several processes does.
            logs: Further destinations of the rows, which are opened here; None for no other.
            rewinds: The rows about the rewinds so far.
        """
        self._file = run / METRICS_FILE
        self._curve = run / CURVE_FILE
        kept = [row for row in read_rows(self._file) if row["updates"] <= updates]
        # Samples are written before their evaluation; without it they will be drawn again.
        measured = {row["updates"] for row in kept if row["type"] == "eval"}
        kept = [row for row in kept if row["type"] != "sample" or row["updates"] in measured]
        # A rewind is recorded after the state is saved to which it goes back.
        kept = [row for row in kept if not _is_rewind(row) or _without_type(row) in rewinds]
        there = [_without_type(row) for row in kept if _is_rewind(row)]
        kept += [{"type": "spike", **row} for row in rewinds if row not in there]
        self._rows: dict[Kind, list[Row]] = {kind: [] for kind in _NUMBERS}
        for row in kept:
            self._rows[row["type"]].append(row)
        self._best_kept = best
        self._lock = threading.Lock()
        self._write = write
        if write:
            write_text(self._file, "".join(map(_line, kept)))
        self.logs = logs or Logs()
        self.logs.begin(kept)

    def add(self, kind: Kind, row: Row) -> None:
        """Appends a row, and writes it."""
        row = {"type": kind, **row}
        with self._lock:  # the watchdog has a thread of its own
            self._rows[kind].append(row)
            if not self._write:
                return
            with self._file.open("a", encoding="utf-8", newline="") as file:
                file.write(_line(row))
            self.logs.add(row)

    def rewind(self, updates: int, row: Row) -> None:
        """Drops the rows after an update, to which the run went back, and appends the row about it.

        The best checkpoint stays on the disk, and the best evaluation with it.
        """
        self._best_kept = self.best
        with self._lock:
            for rows in self._rows.values():
                rows[:] = [each for each in rows if each["updates"] <= updates]
            if self._write:
                kept = [each for each in read_rows(self._file) if each["updates"] <= updates]
                write_text(self._file, "".join(map(_line, kept)))
        self.add("spike", row)

    @property
    def evaluations(self) -> Sequence[Row]:
        """The "eval" rows in order."""
        return self._rows["eval"]

    @property
    def best(self) -> Row | None:
        """The evaluation of the best checkpoint: the lowest loss after an update; None before the first."""
        after_update = [row for row in self.evaluations if row["updates"] > 0]
        kept = [] if self._best_kept is None else [self._best_kept]
        return min((*after_update, *kept), key=lambda row: row["loss"], default=None)

    def draw(self) -> None:
        """Plots training and validation loss over tokens, and the score of replies if it was measured."""
        if not self._write:
            return
        draw_losses([("", self._rows["train"], self._rows["eval"])], self._curve, spikes=[self._rows["spike"]])


def _is_rewind(row: Row) -> bool:
    return row["type"] == "spike" and row.get("action") == "rewind"


def _without_type(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "type"}


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def check_row(row: object) -> None:
    """Checks that a value is a row with kind, position and loss.

    Raises:
        ValueError: When it is not; the message names the field.
    """
    if not isinstance(row, dict) or row.get("type") not in _NUMBERS:
        raise ValueError("is not a row of metrics")
    kind: Kind = row["type"]
    for name in ("updates", "tokens", *(("loss",) if kind in _WITH_LOSS else ())):
        if not is_number(row.get(name)):
            raise ValueError(f"has no number as {name!r}")
    for name in _NUMBERS[kind]:
        if row.get(name) is not None and not is_number(row[name]):
            raise ValueError(f"has no number as {name!r}")
    if kind == "sample" and not all(isinstance(row.get(name), str) for name in ("prompt", "text")):
        raise ValueError("has no text as 'prompt' and 'text'")


def is_number(value: object) -> bool:
    """Returns whether a value from JSON is a finite number within limits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def draw_losses(
    runs: Sequence[tuple[str, Sequence[Row], Sequence[Row]]],
    file: Path,
    axis: Literal["tokens", "updates"] = "tokens",
    unit: str = "nats a token",
    software: str | None = None,
    spikes: Sequence[Sequence[Row]] = (),
) -> None:
    """Plots training and held-out losses of one run or of several, as a PNG file.

    Args:
        runs: The name, the "train" rows and the "eval" rows of each run; a single run may have an empty name.
        file: The file, which is replaced.
        axis: The field of the rows on the x axis.
        unit: The unit of the losses.
        software: The program that the file's metadata names; None for matplotlib.
        spikes: The "spike" rows of each run, which are drawn as lines; none where there are fewer.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for number, (name, train, held_out) in enumerate(runs):
        for rows, label, style in ((train, "training", "-"), (held_out, "validation", "o-")):
            several = {} if len(runs) == 1 else {"color": f"C{number}", "alpha": 0.4 if rows is train else 1.0}
            x, losses = ([row[field] for row in rows] for field in (axis, "loss"))
            if name:  # matplotlib hides labels that begin with "_", and reads text between "$" as formulas
                label = f"{' ' * name.startswith('_')}{name}, {label}".replace("$", r"\$")
            axes.plot(x, losses, style, label=label, linewidth=1, markersize=4, **several)
    for (name, _, _), rows, color in zip(runs, spikes, _spike_colors(len(runs)), strict=False):
        for action, style in (("skip", ":"), ("rewind", "--")):
            title = f"{' ' * name.startswith('_')}{name}{', ' * bool(name)}spike: {action}".replace("$", r"\$")
            at = [row[axis] for row in rows if row.get("action") == action]
            for place, x in enumerate(at):  # matplotlib lists no label that begins with "_"
                axes.axvline(x, linestyle=style, color=color, linewidth=0.8, label="_" if place else title)
    axes.set(xlabel=axis, ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    scored = [row for row in runs[0][2] if row.get("score") is not None] if len(runs) == 1 else []
    if scored:
        percent = axes.twinx()
        title = f"score: {scored[0].get('metric', 'replies')}"
        x, scores = [row[axis] for row in scored], [100 * row["score"] for row in scored]
        percent.plot(x, scores, "s--", color="tab:green", label=title, linewidth=1, markersize=4)
        percent.set(ylabel=f"{title} (%)", ylim=(-2, 102))
        percent.legend(loc="center right")
    with atomic_file(file) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata=software and {"Software": software})


def _spike_colors(runs: int) -> list[str]:
    """Returns the color of each run's spikes: that of its curves, where there are several runs."""
    return ["tab:red"] if runs == 1 else [f"C{number}" for number in range(runs)]


def read_rows(file: Path) -> list[Row]:
    """Returns the rows of `metrics.jsonl` up to the first one that a killed process left half written.

    Raises:
        SlmError: When the file is damaged in another way.
    """
    if not os.path.lexists(file):
        return []
    check_readable(file, METRICS_FILE)
    rows: list[Row] = []
    for number, line in enumerate(read_text(file, METRICS_FILE).splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        try:
            check_row(row)
        except ValueError as error:
            raise SlmError(f"{file}, line {number}: {error}", "remove the line, or start a new run") from None
        rows.append(row)
    return rows
