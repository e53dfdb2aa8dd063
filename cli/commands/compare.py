"""`slm compare`: runs of training and fine-tuning side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import one_line, print_json, print_table, say
from slm.cli.options import FilePath, Word, json_option
from slm.core.errors import SlmError
from slm.core.outputs import ANOTHER, check_writable
from slm.core.runs import RUNS

if TYPE_CHECKING:
    from slm.steps.past_runs import Axis, PastRun

# The picture's metadata names it, so that a later call knows that it may replace the file.
_SOFTWARE = "slm compare"
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES = 4096
_NONE = "–"
# Characters of a hash in the table.
_HASH = 12


@click.command()
@click.argument("runs", type=Word(), nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "--axis",
    type=click.Choice(["tokens", "updates"]),
    default="tokens",
    show_default=True,
    help="The x axis of the curves.",
)
@click.option(
    "--out",
    type=FilePath(directories=False),
    metavar="FILE.png",
    help=f"The picture of the curves. [default: {RUNS}/compare.png]",
)
@json_option
def compare(runs: tuple[str, ...], axis: "Axis", out: Path | None, as_json: bool) -> None:
    """Compare runs of slm train or slm finetune: their recipes, curves and figures.

    RUN is a run or an adapter: its directory, or its name as of slm list. Prints the values of the recipes that differ, and
    the figures, with the bundles of each run. Draws the losses of all runs in one picture. Notes say which losses are not
    comparable, and which runs are unfinished.

    \b
      slm compare tiny tiny-2
      slm compare tiny/pairs tiny/chats --axis updates --out curves.png
    """
    from slm.steps.past_runs import cautions, differing, past_run
    from slm.train.metrics import draw_losses

    if len(runs) < 2:
        raise click.UsageError("name two runs or more")
    picture = out or RUNS / "compare.png"
    if picture.suffix.lower() != ".png":
        raise click.UsageError(f"--out {picture} is not the name of a .png file")
    found = [past_run(name) for name in runs]
    twice = [
        run for number, run in enumerate(found) if run.path.resolve() in {e.path.resolve() for e in found[:number]}
    ]
    if twice:
        raise SlmError(f"{twice[0].path} is named twice", "name each run once")
    _check_picture(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    units = dict.fromkeys(run.unit for run in found)
    names = _names(found)
    draw_losses(
        [(name, run.train, run.held_out) for name, run in zip(names, found, strict=True)],
        picture,
        axis,
        " or ".join(units),
        _SOFTWARE,
        spikes=[run.spikes for run in found],
    )
    notes, values = cautions(found), differing(found)
    if as_json:
        described = [
            {"name": name, "path": str(run.path), **run.figures(), "bundles": [asdict(each) for each in run.bundles]}
            for name, run in zip(names, found, strict=True)
        ]
        print_json({"runs": described, "differing": values, "notes": notes, "picture": str(picture)})
        return
    if values:
        print_table("recipe", ("", *names), _recipe(values))
    elif len({run.kind == "train" for run in found}) == 1:
        say("The recipes are equal.")
    print_table("figures", ("", *names), _figures([run.figures() for run in found]))
    _print_bundles(found, names)
    for note in notes:
        say(f"note: {note}")
    say(f"curves: {picture}")


def _names(runs: "Sequence[PastRun]") -> list[str]:
    """Returns the runs' names; their paths where names repeat."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def _check_picture(path: Path) -> None:
    """Checks that the picture can be written: the file does not exist, or this command wrote it.

    Raises:
        SlmError: If it cannot.
    """
    check_writable(path)
    if not path.exists():
        return
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    if not (head.startswith(_PNG) and f"Software\0{_SOFTWARE}".encode() in head):
        raise SlmError(f"{path} exists and is not a picture of slm compare", ANOTHER)


def _recipe(values: Mapping[str, list[Any]]) -> list[tuple[str, ...]]:
    """Returns the rows of the table of settings; of hashes only the beginning."""
    shown = {name: [_value(value) for value in each] for name, each in values.items()}
    return [(name, *(c[:_HASH] if name.endswith("sha256") else c for c in cells)) for name, cells in shown.items()]


def _figures(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = {
        "kind": [f"slm {run['kind']}" for run in runs],
        "state": [run["state"] for run in runs],
        "best held-out loss": [_number(run["best_loss"], ".4f") for run in runs],
        "at update": [_number(run["best_at_update"], ",") for run in runs],
        "last held-out loss": [_number(run["last_loss"], ".4f") for run in runs],
        "bits per byte": [_number(run["bits_per_byte"], ".4f") for run in runs],
        "tokens": [
            _number(run["tokens"], ",") + (" learned" if run["kind"] != "train" and run["tokens"] else "")
            for run in runs
        ],
        "updates": [_number(run["updates"], ",") for run in runs],
        "time": [_number(run["seconds"], ",.1f", " s") for run in runs],
        "tokens/s": [_number(run["tokens_s"], ",.0f") for run in runs],
        "loss spikes": [_value(run["spikes"]) for run in runs],
        "slow or hung": [_number(run["slow_or_hung"], ",", " times") for run in runs],
        "trained parameters": [_number(run["parameters"], ",") for run in runs],
        "seed": [_number(run["seed"], "") for run in runs],
        "slm": [_value(run["slm_version"]) for run in runs],
    }
    return [(name, *cells) for name, cells in rows.items() if set(cells) != {_NONE}]


def _print_bundles(runs: "Sequence[PastRun]", names: Sequence[str]) -> None:
    rows = [
        (
            name,
            each.name,
            each.precision,
            f"{each.bytes / 1e6:,.1f}",
            _number(each.kl_nats, ".4f"),
            _number(each.same_top1, ".1%"),
        )
        for name, run in zip(names, runs, strict=True)
        for each in run.bundles
    ]
    if rows:
        print_table("bundles", ("run", "bundle", "precision", "MB", "KL, nats", "same top-1"), rows)


def _number(value: object, form: str, unit: str = "") -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:{form}}{unit}" if is_number else _NONE


def _value(value: object) -> str:
    if value is None:
        return _NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    return one_line(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
