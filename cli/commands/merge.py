"""`slm merge`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slm.cli.choosing import base_of
from slm.cli.console import RichProgress, print_json, say
from slm.cli.following import after_checkpoint, next_step
from slm.cli.options import REPLACING, Artifact, FilePath, Real, adapter_type, collects, json_option, overwrite_option
from slm.core.errors import SlmError
from slm.core.outputs import check_checkpoint_output

if TYPE_CHECKING:
    from slm.finetune.combine import Combination, Method


@dataclass(frozen=True)
class Inputs:
    """What is combined.

    Attributes:
        checkpoints: Checkpoints.
        adapters: LoRA adapters of the base, each of which counts as a checkpoint.
        base: The base of the methods that add differences.
    """

    checkpoints: tuple[Path, ...]
    adapters: tuple[Path, ...]
    base: Path | None

    @property
    def count(self) -> int:
        """The number of models to combine."""
        return len(self.checkpoints) + len(self.adapters)


@dataclass(frozen=True)
class MethodOptions:
    """How the inputs are combined; None where the user did not choose."""

    method: "Method | None"
    weights: str | None
    density: float | None
    scale: float | None


@click.command(epilog=REPLACING)
@click.argument("checkpoints", type=Artifact(bundles=False), nargs=-1)
@click.option(
    "--method",
    type=click.Choice(["linear", "slerp", "task", "ties"]),
    help="Weighted mean; spherical interpolation of two; sum of differences from --base; the same, trimmed and by majority "
    "sign. [default: linear; task with --adapter]",
)
@click.option("--base", type=Artifact(bundles=False), metavar="CHECKPOINT",
              help="Base of task and ties. [default: the base of the first adapter]")  # fmt: skip
@click.option(
    "--adapter",
    "adapters",
    type=adapter_type,
    multiple=True,
    metavar="ADAPTER",
    help="LoRA adapter of --base, which counts as a checkpoint (repeatable).",
)
@click.option(
    "--weights",
    metavar="W,W",
    help="Weights, first of the checkpoints, then of the adapters. [default: equal; 1 each for task and ties]",
)
@click.option(
    "--density",
    type=Real(0, 1, min_open=True),
    help="With ties: share of each difference to keep. [default: 0.2]",
)
@click.option(
    "--scale", type=Real(-100, 100), help="With task and ties: factor of the combined difference. [default: 1]"
)
@click.option("--out", type=FilePath(), required=True, metavar="DIR", help="The checkpoint to write.")
@overwrite_option
@json_option
@collects("inputs", Inputs)
@collects("chosen", MethodOptions)
def merge(inputs: Inputs, chosen: MethodOptions, out: Path, overwrite: bool, as_json: bool) -> None:
    """Combine checkpoints of one shape, or several adapters of one base, into one checkpoint.

    To merge a single adapter, use slm export --onnx --adapter DIR.

    \b
      slm merge runs/a/checkpoint/best runs/b/checkpoint/best --out runs/soup/checkpoint/best
      slm merge A B --method slerp --weights 0.7,0.3 --out runs/ab/checkpoint/best
      slm merge A B --method ties --base BASE --density 0.3 --out runs/ties/checkpoint/best
      slm merge --base BASE --adapter one --adapter two --weights 1,0.5 --out runs/both/checkpoint/best
    """
    combination = _combination(inputs, chosen)
    checkpoints, adapters, base = inputs.checkpoints, inputs.adapters, inputs.base
    if any(out.resolve() == path.resolve() for path in (*checkpoints, *adapters, *([base] if base else []))):
        raise SlmError(f"{out} is one of the inputs", "choose another --out")
    check_checkpoint_output(out, overwrite=overwrite)
    if adapters and base is None:
        base = base_of(adapters[0])
    from slm.finetune.combine import combine

    started = time.perf_counter()
    combine(checkpoints, out, combination, base, adapters, RichProgress())
    seconds = time.perf_counter() - started
    following, method, shares = after_checkpoint(out), combination.method, combination.weights
    if as_json:
        report = {"checkpoint": str(out), "method": method, "weights": shares, "seconds": round(seconds, 2)}
        print_json(report | {"next": following})
        return
    say(
        f"{out}: {method} of {inputs.count} models, weights {', '.join(f'{share:g}' for share in shares)}; {seconds:.1f} s"
    )
    next_step(following)


def _combination(inputs: Inputs, chosen: MethodOptions) -> "Combination":
    """Returns the method with its parameters.

    Raises:
        click.UsageError: If the options contradict each other or the inputs.
    """
    method = chosen.method or ("task" if inputs.adapters else "linear")
    relative = method in ("task", "ties")
    if inputs.count < (1 if relative else 2):
        raise click.UsageError("name what to combine: checkpoints, or --base and --adapter")
    if method == "slerp" and inputs.count != 2:
        raise click.UsageError("slerp combines exactly two models")
    if relative and inputs.base is None and not inputs.adapters:
        raise click.UsageError(f"{method} needs --base")
    if not relative and (inputs.base is not None and not inputs.adapters):
        raise click.UsageError(f"{method} has no base")
    if chosen.scale is not None and not relative:
        raise click.UsageError("--scale requires --method task or ties")
    if chosen.density is not None and method != "ties":
        raise click.UsageError("--density requires --method ties")
    from slm.finetune.combine import Combination

    weights = _weights(chosen.weights, inputs.count, relative)
    density = 0.2 if chosen.density is None else chosen.density
    return Combination(method, weights, density, 1.0 if chosen.scale is None else chosen.scale)


def _weights(said: str | None, count: int, relative: bool) -> tuple[float, ...]:
    if said is None:
        return (1.0,) * count if relative else (1 / count,) * count
    try:
        weights = tuple(float(part) for part in said.split(","))
    except ValueError:
        raise click.UsageError(f"--weights {said} is not a list of numbers separated by commas") from None
    if len(weights) != count:
        raise click.UsageError(f"--weights has {len(weights)} numbers for {count} models")
    if not all(abs(weight) < float("inf") for weight in weights) or (not relative and not sum(weights) > 0):
        raise click.UsageError(f"--weights {said}: their sum must be above 0")
    return weights
