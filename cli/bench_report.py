"""Tables and plots of `slm bench`, and the comparison with an earlier report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.cli.console import print_table
from slm.core.errors import SlmError
from slm.core.figures import new_figure
from slm.core.files import atomic_file
from slm.core.outputs import check_writable

Report = Mapping[str, Any]

# Increases when the meaning of a figure changes, so that `--compare` rejects older reports.
SCHEMA_VERSION = 1

# The program's name in a plot's PNG metadata, and how many bytes of a file are searched for it.
_SOFTWARE = "slm bench"
_HEAD = 4096

# The figures of a case that are compared, and whether higher is better.
_COMPARED = {"ttft_ms": False, "prefill_tok_s": True, "decode_tok_s": True}
# Other conditions that may change the figures.
_CONDITIONS = ("machine", "versions", "backend", "device", "threads", "weights_sha256", "new_tokens", "precision")


def read(path: Path) -> dict[str, Any]:
    """Reads an earlier report.

    Raises:
        SlmError: If the file is not a report, or has another schema.
    """
    hint = "create a report with slm bench --json > FILE"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise SlmError(f"cannot read {path}: {said}", hint) from None
    if not isinstance(report, dict) or not isinstance(report.get("results"), list):
        raise SlmError(f"{path} is not a report of slm bench", hint)
    if report.get("schema_version") != SCHEMA_VERSION:
        found = report.get("schema_version")
        raise SlmError(f"{path} has schema {found!r}, which is not comparable with schema {SCHEMA_VERSION}", hint)
    return report


def compare(new: Report, old: Report) -> dict[str, Any]:
    """Compares a report with an earlier one.

    Returns:
        `differences`: the conditions that differ. `ratios`: for each case in both reports, each figure's ratio of new to old,
        and whether the rounds overlap. `load_ms` and `peak_rss_mib`: ratios too.

    Raises:
        SlmError: If the reports have no case in common.
    """
    before = {(row["prompt"], row["batch"]): row for row in old["results"]}
    ratios = []
    for row in new["results"]:
        earlier = before.get((row["prompt"], row["batch"]))
        if earlier is None:
            continue
        figures: dict[str, Any] = {"prompt": row["prompt"], "batch": row["batch"]}
        for name in _COMPARED:
            if row[name] is not None and earlier[name] is not None:
                figures[name] = _ratio(row[name], earlier[name])
        ratios.append(figures)
    if not ratios:
        raise SlmError("the reports have no case in common", "use the same --prompt and --batch")
    memory = {row["prompt"]: row for row in old["memory"]}
    return {
        "differences": [name for name in _CONDITIONS if new.get(name) != old.get(name)],
        "ratios": ratios,
        "load_ms": round(new["load_ms"] / old["load_ms"], 3),
        "peak_rss_mib": {
            row["prompt"]: round(row["peak_rss_mib"] / memory[row["prompt"]]["peak_rss_mib"], 3)
            for row in new["memory"]
            if row["prompt"] in memory
        },
    }


def _ratio(new: Report, old: Report) -> dict[str, Any]:
    overlaps = new["min"] <= old["max"] and old["min"] <= new["max"]
    return {"ratio": round(new["median"] / old["median"], 3), "rounds_overlap": overlaps}


def print_report(report: Report) -> None:
    """Prints a report as tables."""
    rows = [
        (
            f"{row['prompt']:,}",
            str(row["batch"]),
            _figure(row["ttft_ms"]),
            _figure(row["prefill_tok_s"]),
            _figure(row["decode_tok_s"]),
            _figure(row["step_ms"], 2),
            _percent(row["memory_share"]),
        )
        for row in report["results"]
    ]
    print_table(
        f"{report['model']}: {report['backend']}; medians of {report['rounds']} rounds (min – max)",
        ("prompt", "rows", "TTFT ms", "prefill tokens/s", "decode tokens/s", "ms per step", "% of memory bandwidth"),
        rows,
    )
    rate = report["read_gb_s"]
    facts = [
        ("files", f"{report['file_bytes'] / 1e6:,.1f} MB"),
        ("load time", f"{report['load_ms']:,.0f} ms, with imports and file checks"),
        ("memory bandwidth", "not measured on a GPU" if rate is None else f"{_figure(rate, 1)} GB/s read"),
    ]
    for row in report["memory"]:
        now = "" if row["rss_mib"] is None else f"{row['rss_mib']:,.0f} MiB during decode, "
        peak = f"{row['peak_rss_mib']:,.0f} MiB peak"
        times = row["peak_rss_mib"] * (1 << 20) / report["file_bytes"]
        facts.append((f"memory, prompt {row['prompt']:,}", f"{now}{peak} ({times:.2f} × the files)"))
    print_table("", ("", ""), facts)


def print_comparison(compared: Report, old: str) -> None:
    """Prints the ratios to an earlier report."""
    rows = [
        (f"{row['prompt']:,}", str(row["batch"]), *(_change(row.get(name), more) for name, more in _COMPARED.items()))
        for row in compared["ratios"]
    ]
    print_table(
        f"ratio to {old}" + (f"; different: {', '.join(compared['differences'])}" if compared["differences"] else ""),
        ("prompt", "rows", "TTFT", "prefill tokens/s", "decode tokens/s"),
        rows,
    )
    facts = [("load time", f"× {compared['load_ms']:.2f}")]
    facts += [
        (f"peak memory, prompt {int(prompt):,}", f"× {ratio:.2f}") for prompt, ratio in compared["peak_rss_mib"].items()
    ]
    print_table("", ("", ""), facts)


def _change(found: Report | None, more_is_better: bool) -> str:
    if found is None:
        return ""
    if found["rounds_overlap"]:
        return f"× {found['ratio']:.2f} (rounds overlap)"
    return f"× {found['ratio']:.2f} {'better' if (found['ratio'] > 1) == more_is_better else 'worse'}"


def _figure(spread: Report | None, digits: int = 0) -> str:
    if spread is None:
        return ""
    return "{:,.{d}f} ({:,.{d}f} – {:,.{d}f})".format(*(spread[name] for name in ("median", "min", "max")), d=digits)


def _percent(spread: Report | None) -> str:
    return "" if spread is None else f"{spread['median']:.0%}"


def check_plot(path: Path) -> None:
    """Checks that a plot can be written: the path is free, or has an earlier plot.

    Raises:
        SlmError: If the path is not writable, or has another file.
    """
    check_writable(path)
    if path.exists() and _SOFTWARE.encode() not in path.read_bytes()[:_HEAD]:
        raise SlmError(f"{path} exists and is not a plot of slm bench", "name another --plot")


def plot(report: Report, old: Report | None, path: Path) -> None:
    """Draws prefill and decode speed over the prompt's length; an earlier report is dashed."""
    figure = new_figure(10, 4.5)
    panels = dict(zip(("prefill_tok_s", "decode_tok_s"), figure.subplots(1, 2), strict=True))
    for shown, style, when in ((report, "o-", ""), (old, "o--", " before")):
        for name, axes in panels.items():
            rows = [row for row in (shown["results"] if shown else ()) if row[name] is not None]
            for number, batch in enumerate(sorted({row["batch"] for row in rows})):
                own = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["prompt"])
                middle = [row[name]["median"] for row in own]
                below = [row[name]["median"] - row[name]["min"] for row in own]
                above = [row[name]["max"] - row[name]["median"] for row in own]
                prompts = [row["prompt"] for row in own]
                label = f"{batch} row{'s' * (batch > 1)}{when}"
                axes.errorbar(prompts, middle, (below, above), fmt=style, color=f"C{number}", label=label, capsize=3)
    for name, axes in panels.items():
        axes.set(xlabel="prompt (tokens)", ylabel=f"{name.partition('_')[0]} (tokens/s)")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{report['model']}: {report['backend']}", fontsize=9)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": _SOFTWARE})
