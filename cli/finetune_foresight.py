"""`slm finetune --dry-run`: shows what would be trained, with estimates of time and memory."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slm.cli.calling import call
from slm.cli.console import STDOUT, print_json, print_lines, print_table, say

if TYPE_CHECKING:
    from slm.finetune.foresight import Foresight

_MIB = 1 << 20


def foresee(given: Mapping[str, Any], as_json: bool) -> None:
    """Runs the checks of fine-tuning; prints the recipe, what would be trained, the estimate and the warnings.

    Args:
        given: The options on the command line.
        as_json: Whether to print one JSON object.

    Raises:
        click.UsageError: If options contradict each other.
        SlmError: As fine-tuning would raise it.
    """
    from slm.steps.finetuning import foresee as measure

    foresight = call(measure, **given)
    if as_json:
        print_json(_report(foresight))
        return
    STDOUT.print(foresight.recipe.to_yaml(), markup=False)
    print_table("what would be trained", ("", ""), _lines(foresight))
    for number, parts in enumerate(foresight.rendered, 1):
        for learned, text in parts:
            print_lines(f"row {number}, {'learned:  ' if learned else 'read only:'} {text}")
    for sentence in foresight.warnings:
        say(f"warning: {sentence}")


def _report(foresight: "Foresight") -> dict[str, object]:
    fields = {key: value for key, value in asdict(foresight).items() if key != "recipe"}
    rendered = [[{"learned": learned, "text": text} for learned, text in parts] for parts in foresight.rendered]
    return {
        **fields,
        "base": str(foresight.base),
        "out": str(foresight.out),
        "rendered": rendered,
        "recipe": foresight.recipe.model_dump(mode="json"),
    }


def _lines(foresight: "Foresight") -> list[tuple[str, str]]:
    from slm.train.loop import duration

    settings, measured = foresight.recipe.training, foresight.measured
    per_epoch = foresight.updates // foresight.epochs
    bad = f", {foresight.bad} bad" if foresight.bad else ""
    at_most = "at most " if settings.keep == "best" and settings.patience else ""
    held_out = f"{foresight.validation_rows:,}" if foresight.validation_rows else "none"
    lines = [
        ("base", str(foresight.base)),
        ("result", f"{foresight.out}{', resumes an interrupted run there' if foresight.resumes else ''}"),
        (
            "rows",
            f"{foresight.rows:,} to train on, {held_out} held out ({foresight.truncated} cut, {foresight.skipped} left "
            f"out{bad})",
        ),
        ("tokens", f"{foresight.tokens:,} an epoch, {foresight.trained_tokens:,} of them learned"),
        (
            "run",
            f"{at_most}{foresight.updates:,} updates of {settings.batch_size} rows: {foresight.epochs} epochs of "
            f"{per_epoch:,}",
        ),
        ("learned", _learned(foresight)),
        ("device", f"{foresight.device}, {foresight.precision}"),
        (
            "time",
            f"about {duration(foresight.seconds)}: {measured.update_seconds:.2g} s an update, "
            f"{measured.evaluation_seconds:.2g} s an evaluation ({measured.updates} updates, timed now)",
        ),
        (
            "memory",
            f"about {measured.memory / _MIB:,.0f} MiB at the peak, with Python and PyTorch "
            f"({'the largest batch, measured now' if measured.complete else 'extrapolated from smaller batches'})",
        ),
    ]
    if measured.memory_available is not None:
        fits = "yes" if measured.memory < measured.memory_available else "no"
        share = 100 * measured.memory / measured.memory_available
        lines.append(
            (
                "fits",
                f"{fits}: {measured.memory / _MIB:,.0f} of {measured.memory_available / _MIB:,.0f} MiB ({share:.0f} %)",
            )
        )
    return lines


def _learned(foresight: "Foresight") -> str:
    settings = foresight.recipe.training
    parameters = f"{foresight.trainable_parameters:,} parameters"
    if settings.method == "full":
        return f"every weight, {parameters}"
    rows = foresight.embedding_rows
    embedding = f", and {rows} row{'s' * (rows != 1)} of the embedding" if rows else ""
    return (
        f"an adapter of rank {settings.rank} on {foresight.modules} modules ({', '.join(settings.target_modules)})"
        f"{embedding}: {parameters}"
    )
