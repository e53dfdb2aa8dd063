"""The metrics by name: the scores of one reply, and the score of all rows with its confidence interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slm.core.metrics.calls import calls_of, same_calls, same_names
from slm.core.metrics.intervals import Interval, bootstrap_mean, paired_means, paired_shares, wilson
from slm.core.metrics.objects import NotJson, fields_f1, parsed_json
from slm.core.metrics.words import exact, f1, rouge_1, rouge_l, squad_exact
from slm.core.task import MetricName, TaskRow
from slm.core.tools import JSON_STYLE, Style

# The scores of one row by name: "score" is the metric's own, and the other names are those of `Metric.others`.
Scores = Mapping[str, float]
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: The name on the command line.
        title: What the score is, for a report.
        is_share: Whether a row scores 0 or 1, so that the score is a share of the rows.
        others: Titles of the further figures, by name.
    """

    name: MetricName
    title: str
    is_share: bool
    others: Mapping[str, str]


METRICS: Mapping[MetricName, Metric] = {
    each.name: each
    for each in (
        Metric("exact", "exact match", True, {"squad_exact": "exact match, SQuAD"}),
        Metric("f1", "F1 of words", False, {"squad_exact": "exact match, SQuAD"}),
        Metric("rouge", "ROUGE-L", False, {"rouge_1": "ROUGE-1"}),
        Metric("choice", "correct choices", True, {"per_byte": "correct per byte"}),
        Metric("json", "equal JSON", True, {"valid": "valid JSON", "fields_f1": "F1 of fields"}),
        Metric("tool-call", "equal tool calls", True, {"names": "equal names", "valid": "valid calls"}),
    )
}


def reply_scores(metric: MetricName, row: TaskRow, reply: str, style: Style = JSON_STYLE) -> Scores:
    """Returns the scores of a generated reply; the metric "choice" compares log-probabilities instead.

    Args:
        metric: The metric.
        row: The row.
        reply: The reply; for "tool-call" with the marks of calls, which may be special tokens.
        style: How the reply spells calls.
    """
    return _calls(row, reply, style) if metric == "tool-call" else _OF_TEXTS[metric](row, reply)


def choice_scores(row: TaskRow, log_probabilities: Sequence[float]) -> tuple[str, Scores]:
    """Returns the most likely choice of a row and the scores.

    Args:
        row: The row.
        log_probabilities: The sum of the log-probabilities of each choice's tokens. NaN is less likely than any number.
    """
    known = [value if value == value else float("-inf") for value in log_probabilities]
    per_byte = [value / max(1, len(choice.encode())) for value, choice in zip(known, row.choices, strict=True)]
    chosen, by_length = (row.choices[max(range(len(known)), key=values.__getitem__)] for values in (known, per_byte))
    return chosen, {"score": float(chosen == row.expected), "per_byte": float(by_length == row.expected)}


def interval(metric: MetricName, scores: Sequence[float]) -> Interval:
    """Returns the 95 % interval of a score: Wilson's for a share, the bootstrap's for a mean."""
    if METRICS[metric].is_share:
        return wilson(round(sum(scores)), len(scores))
    return bootstrap_mean(scores)


def difference(metric: MetricName, before: Sequence[float], after: Sequence[float]) -> Interval:
    """Returns the 95 % interval of the difference of two models' scores on the same rows, after - before."""
    if METRICS[metric].is_share:
        return paired_shares([value == 1 for value in before], [value == 1 for value in after])
    return paired_means(before, after)


def reaches(score: float, limit: float) -> bool:
    """Returns whether a score is at least a limit, up to rounding: a mean such as 0.92 - 0.01 can be slightly below 0.91.

    NaN reaches no limit.
    """
    return score >= limit - _ROUNDING


def _exact(row: TaskRow, reply: str) -> Scores:
    return {"score": float(exact(row.expected, reply)), "squad_exact": float(squad_exact(row.expected, reply))}


def _f1(row: TaskRow, reply: str) -> Scores:
    return {"score": f1(row.expected, reply), "squad_exact": float(squad_exact(row.expected, reply))}


def _rouge(row: TaskRow, reply: str) -> Scores:
    return {"score": rouge_l(row.expected, reply), "rouge_1": rouge_1(row.expected, reply)}


def _json(row: TaskRow, reply: str) -> Scores:
    try:
        given = parsed_json(reply)
    except NotJson:
        return {"score": 0.0, "valid": 0.0, "fields_f1": 0.0}
    expected = parsed_json(row.expected)  # checked when the row was read
    return {"score": float(given == expected), "valid": 1.0, "fields_f1": fields_f1(expected, given)}


def _calls(row: TaskRow, reply: str, style: Style) -> Scores:
    given = calls_of(reply, style)
    if given is None:
        return {"score": 0.0, "names": 0.0, "valid": 0.0}
    return {
        "score": float(same_calls(row.calls, given)),
        "names": float(same_names(row.calls, given)),
        "valid": 1.0,
    }


_OF_TEXTS: Mapping[MetricName, Callable[[TaskRow, str], Scores]] = {
    "exact": _exact,
    "f1": _f1,
    "rouge": _rouge,
    "json": _json,
}
