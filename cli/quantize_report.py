"""The results of `slm quantize` in the terminal: the report of a bundle, and the table of a sweep."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.console import print_json, print_table, say
from slm.cli.following import after_bundle, next_step
from slm.core.manifest import Bundle
from slm.quantize.defaults import MAX_KL_NATS

if TYPE_CHECKING:
    from slm.quantize.results import Report, Sweep

# The number of least accurate layers in the table.
_WORST = 5


def print_report(made: Bundle, report: "Report", as_json: bool) -> None:
    """Prints the report of a quantized bundle, as tables or as one JSON object."""
    from slm.quantize.page import figures
    from slm.quantize.report import as_dict
    from slm.quantize.results import PAGE_FILE

    if as_json:
        print_json({"bundle": str(made.path)} | as_dict(report) | {"next": after_bundle(made)})
        return
    change, quality = report.change, made.manifest.quality
    assert quality is not None
    if quality.max_kl_nats is not None:
        say(f"Quality check passed: KL {change.kl_nats:.5f} nats (limit {quality.max_kl_nats:g}).")
    if (task := report.task) is not None:
        say(f"Task check passed: {task.before.score:.1%} before, {task.after.score:.1%} after (limit {task.limit}).")
    if report.head is not None:
        say(
            f"Single-token steps from halves: KL {report.head.kl_nats:.5f} nats from the whole head, "
            f"same most likely token {report.head.same_top1:.1%}."
        )
    print_table(f"{made.path}: {report.in_words}", ("", "before", "after"), figures(report))
    print_table(
        "least accurate layers",
        ("weight", "stored as", "MB", "signal-to-noise ratio"),
        [
            (each.path, each.scheme, f"{each.bytes / 1e6:,.1f}", f"{each.snr_db:.1f} dB")
            for each in report.worst[:_WORST]
        ],
    )
    say(f"measured over {change.tokens:,} tokens of {quality.text}; {report.seconds:.1f} s; {made.path / PAGE_FILE}")
    next_step(after_bundle(made))


def print_sweep(sweep: "Sweep", directory: Path, bundle: Path, as_json: bool) -> None:
    """Prints the trials of a sweep, as a table or as one JSON object.

    Args:
        sweep: The sweep.
        directory: The directory of its files.
        bundle: The bundle that was quantized.
        as_json: Whether to print JSON.
    """
    from slm.quantize.page import SWEEP_COLUMNS, sweep_rows
    from slm.quantize.sweep import SWEEP_PAGE, as_dict

    following = _after_sweep(sweep, bundle)
    if as_json:
        print_json({"out": str(directory)} | as_dict(sweep) | ({"next": following} if following else {}))
        return
    # Enough for a narrow terminal; the page has the rest.
    kept = [SWEEP_COLUMNS.index(name) for name in ("slm quantize", "MB", "KL, nats", "decode ×", "frontier")]
    rows = [[row[i] for i in kept] for row in sweep_rows(sweep)]
    print_table(
        f"{sweep.bundle}: {sweep.bytes_before / 1e6:,.1f} MB in float32", [SWEEP_COLUMNS[i] for i in kept], rows
    )
    say(f"measured over {sweep.tokens:,} tokens of {sweep.text}; {directory / SWEEP_PAGE}")
    if following:
        next_step(following)


def _after_sweep(sweep: "Sweep", bundle: Path) -> str | None:
    """Returns the command for the smallest bundle of the sweep within the default limit of its precision."""
    good = [
        trial
        for trial in sweep.trials
        if trial.change.kl_nats <= MAX_KL_NATS["int4" if "--int4" in trial.options else "int8"]
    ]
    best = min(good, key=lambda trial: trial.bytes, default=None)
    return None if best is None else f"slm quantize {best.options} {shlex.quote(str(bundle))}"
