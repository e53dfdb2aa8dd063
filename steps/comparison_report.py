"""The results of a comparison on a task: as data, as a table, and as an HTML page."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.core.files import atomic_directory
from slm.core.metrics.intervals import difference_text, score_text
from slm.core.metrics.scoring import METRICS
from slm.core.report_page import one_line, page, table, texts_table
from slm.core.report_plots import Range, ranges
from slm.steps.comparison import Comparison, Result

if TYPE_CHECKING:
    from slm.runtime.answers import Answer, Measured

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
FILES = frozenset((REPORT_FILE, PAGE_FILE))
# Examples of each model in the page and in `as_dict`.
_MANY = 20


def as_dict(compared: Comparison, *, rows: bool) -> dict[str, Any]:
    """Returns the results for `report.json` and --json.

    Args:
        compared: The results.
        rows: Whether to include the reply to every row; otherwise the worst examples of each model.
    """
    task, first = compared.task, compared.results[0].measured
    found: dict[str, Any] = {
        "task": task.name,
        "rows": len(task.rows),
        "rows_in_file": compared.total,
        "metric": task.metric,
        "metric_chosen_because": task.why or None,
        "minimum": compared.minimum,
        "passed": not compared.failed,
        "models": [
            _model(result, None if result.measured is first else first, examples=not rows)
            for result in compared.results
        ],
    }
    if rows:
        found["replies"] = [
            {"place": row.place, "prompt": row.prompt, "expected": row.expected}
            | ({"choices": row.choices} if row.choices else {})
            | {"replies": [_reply(result.measured.answers[number]) for result in compared.results]}
            for number, row in enumerate(task.rows)
        ]
    return found


def _model(result: Result, first: "Measured | None", *, examples: bool) -> dict[str, Any]:
    measured = result.measured
    found: dict[str, Any] = {
        "model": result.name,
        "backend": result.backend,
        "bytes": result.bytes,
        "score": measured.score,
        "low": measured.interval.low,
        "high": measured.interval.high,
        "further": dict(measured.others),
        "difference": None,
        "seconds": round(measured.seconds, 3),
        "seconds_per_row": round(measured.seconds_per_row, 5),
        "new_tokens": measured.tokens,
        "tokens_s": round(measured.tokens_s, 1),
        "batch": measured.batch,
        "max_tokens": measured.max_tokens,
        "tool_choice": measured.tool_choice,
        "cut": measured.cut,
        "too_long": measured.too_long,
    }
    if first is not None:
        between = measured.difference(first)
        found["difference"] = {"score": measured.score - first.score, "low": between.low, "high": between.high}
    if examples:
        found["worst"] = [
            {"place": each.row.place, "prompt": each.row.prompt, "expected": each.row.expected} | _reply(each)
            for each in measured.worst(_MANY)
        ]
    return found


def _reply(answer: "Answer") -> dict[str, Any]:
    return {"reply": answer.reply, "stopped": answer.stopped, "scores": dict(answer.scores)}


def write_report(directory: Path, compared: Comparison) -> None:
    """Writes `report.json`, which has every reply, and `report.html`. Replaces an earlier report."""
    with atomic_directory(directory, FILES) as made:
        text = json.dumps(as_dict(compared, rows=True), ensure_ascii=False, indent=1)
        for name, content in ((REPORT_FILE, text + "\n"), (PAGE_FILE, report_page(compared))):
            (made / name).write_text(content, encoding="utf-8", errors="backslashreplace", newline="")


def notes(compared: Comparison) -> list[str]:
    """Returns sentences about the constraint of calls, and models whose replies were cut or whose context is too short."""
    choice = compared.results[0].measured.tool_choice
    found = [] if choice is None else [f"calls were constrained to the schemas of the tools (--tool-choice {choice})"]
    for each in compared.results:
        measured, rows = each.measured, len(each.measured.answers)
        if measured.cut:
            limit = f"{measured.max_tokens:,} tokens (--max-tokens) or of the context"
            found.append(f"{each.name}: {measured.cut:,} of {rows:,} replies end at the limit of {limit}")
        if measured.too_long:
            found.append(f"{each.name}: {measured.too_long:,} of {rows:,} rows do not fit the context and score 0")
    return found


def report_page(compared: Comparison) -> str:
    """Returns the HTML page of the results."""
    task, title = compared.task, title_of(compared)
    first = compared.results[0]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_explained(compared))}</p>",
        ranges(
            [
                Range(
                    each.name if len(each.name) <= _LABEL else f"…{each.name[-_LABEL:]}",
                    each.measured.score,
                    each.measured.interval.low,
                    each.measured.interval.high,
                    _score(each.measured),
                )
                for each in compared.results
            ],
            "scores with 95 % confidence intervals",
        ),
        table(*summary(compared, narrow=False)),
        *(f"<p>{escape(note)}.</p>" for note in notes(compared)),
    ]
    got = "choice" if task.metric == "choice" else "reply"
    for each in compared.results:
        parts.append(f"<h2>{escape(each.name)}</h2>")
        worst = each.measured.worst(_MANY)
        if not worst:
            parts.append("<p>Every reply has the full score.</p>")
            continue
        wrong = sum(score < 1 for score in each.measured.scores)
        parts.append(f"<h3>Worst replies ({len(worst)} of {wrong:,} below the full score)</h3>")
        parts.append(
            texts_table(
                ("row", "prompt", "expected", got, "score"), [(*reply_texts(a), f"{a.score:.1%}") for a in worst]
            )
        )
        if each is not first and (lost := _lost(first, each)):
            parts.append(f"<h3>Lower than {escape(first.name)} ({len(lost[:_MANY])} of {len(lost):,} rows)</h3>")
            rows = [(*reply_texts(old)[:3], old.reply, new.reply) for old, new in lost[:_MANY]]
            parts.append(texts_table(("row", "prompt", "expected", f"{got} of the first", got), rows))
    return page(title, parts)


# The longest label in the plot, in characters.
_LABEL = 36


def _lost(first: Result, other: Result) -> "list[tuple[Answer, Answer]]":
    """Returns the answers of both models where the second one's score is lower, the largest difference first."""
    pairs = zip(first.measured.answers, other.measured.answers, strict=True)
    return sorted(
        (pair for pair in pairs if pair[1].score < pair[0].score), key=lambda pair: pair[1].score - pair[0].score
    )


def title_of(compared: Comparison) -> str:
    """Returns the title: the file, the metric and the number of rows."""
    task = compared.task
    rows = f"{len(task.rows):,} {'rows' if len(task.rows) != 1 else 'row'}"
    some = f"{rows} of {compared.total:,}" if len(task.rows) < compared.total else rows
    return f"{one_line(task.name)}: {METRICS[task.metric].title}, {some}"


def _explained(compared: Comparison) -> str:
    metric = METRICS[compared.task.metric]
    interval = "Wilson's interval" if metric.is_share else "the percentile bootstrap of 2,000 resamples"
    said = f"The 95 % confidence interval of a score is {interval}."
    if len(compared.results) > 1:
        said += f" Differences are from {compared.results[0].name}, on the same rows."
    if compared.minimum is not None:
        below = ", ".join(each.name for each in compared.failed)
        said += f" Required score: {compared.minimum:.1%}; {f'not reached by {below}' if below else 'reached'}."
    return said


def summary(compared: Comparison, *, narrow: bool) -> tuple[tuple[str, ...], list[list[str]]]:
    """Returns columns and rows of the table of models; for a terminal without the least important columns."""
    metric, first = METRICS[compared.task.metric], compared.results[0].measured
    several = len(compared.results) > 1
    columns = ["model", "score (95 %)"]
    columns += ["difference (95 %)"] if several else []
    columns += [*metric.others.values(), "s per row", "tokens/s", "MB"]
    columns += [] if narrow else ["batch", "backend"]
    rows = []
    for result in compared.results:
        measured = result.measured
        row = [result.name, _score(measured)]
        if several:
            row.append("" if measured is first else _difference(measured, first))
        row += [f"{measured.others[name]:.1%}" for name in metric.others]
        row += [f"{measured.seconds_per_row:.3g}", f"{measured.tokens_s:,.0f}", f"{result.bytes / 1e6:,.1f}"]
        rows.append(row if narrow else [*row, str(measured.batch), result.backend])
    return tuple(columns), rows


def _score(measured: "Measured") -> str:
    return score_text(measured.score, measured.interval)


def _difference(measured: "Measured", first: "Measured") -> str:
    return difference_text(measured.score - first.score, measured.difference(first))


def reply_texts(answer: "Answer") -> tuple[str, str, str, str]:
    """Returns place, prompt, expected reply and reply of an answer."""
    row = answer.row
    reply = "(the row does not fit the context)" if answer.stopped == "error" else answer.reply
    return row.place.rpartition(", ")[2], row.prompt, row.expected, reply


def below_limit(compared: Comparison) -> str:
    """Returns the message for models below the limit."""
    named: Sequence[str] = [f"{each.name} has {each.measured.score:.1%}" for each in compared.failed]
    assert compared.minimum is not None
    return f"the score is below --min {compared.minimum:.1%}: {', '.join(named)}"
