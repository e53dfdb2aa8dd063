"""What `make test-gpu` leaves: one JSON file, and a table in Markdown to paste into docs."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slm.version import __version__

Figure = dict[str, Any]


def write_report(
    directory: Path, about: Mapping[str, Any], figures: Sequence[Figure], tests: Sequence[Mapping[str, Any]]
) -> tuple[Path, Path]:
    """Writes `report.json` and `report.md`.

    Args:
        directory: Made where it does not exist.
        about: The machine.
        figures: What was measured, each with `check`, `what`, `value`, `unit` and `limit`.
        tests: Each with `name`, `outcome`, `seconds` and, where it was skipped or failed, `reason`.

    Returns:
        The two files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "slm": __version__, "machine": dict(about)}
    report = made | {"tests": list(tests), "figures": list(figures)}
    data, table = directory / "report.json", directory / "report.md"
    data.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    table.write_text(to_markdown(report), encoding="utf-8")
    return data, table


def to_markdown(report: Mapping[str, Any]) -> str:
    """Returns a report as one line about the machine, what failed or was skipped, and a table of figures."""
    outcomes = [test["outcome"] for test in report["tests"]]
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in ("passed", "failed", "skipped") if each in outcomes)
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items())
    seconds = sum(test["seconds"] for test in report["tests"])
    lines = [
        f"`make test-gpu`, {report['date'][:10]}, slm {report['slm']}: {counts} in {seconds:.0f} s.",
        "",
        machine,
        "",
    ]
    for test in report["tests"]:
        if test["outcome"] != "passed":
            lines.append(f"- {test['outcome']}: {test['name']}: {_cell(test['reason'])}")
    lines += ["", "| check | what | value | limit |", "|---|---|---|---|"]
    for figure in report["figures"]:
        unit = f" {figure['unit']}" if figure["unit"] else ""
        limit = "" if figure["limit"] is None else f"{figure['limit']:.4g}{unit}"
        value = figure["value"]
        shown = f"{value:.4g}{unit}" if isinstance(value, float) else f"{value}{unit}"
        lines.append(f"| {_cell(figure['check'])} | {_cell(figure['what'])} | {_cell(shown)} | {limit} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
