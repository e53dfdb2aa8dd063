"""A task as rows with one request and its expected reply each, and the same rows as token ids for one model."""

from dataclasses import dataclass
from typing import Literal, get_args

from slm.core.tools import JSON_STYLE, Call, Style, Tool

MetricName = Literal["exact", "f1", "rouge", "choice", "json", "tool-call"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)


@dataclass(frozen=True)
class TaskRow:
    """One row of a task.

    Attributes:
        prompt: What is asked, for a report: the last message before the reply, or the prompt.
        expected: The expected reply.
        place: The place of the row, for messages.
        choices: The possible replies, for the metric "choice".
        calls: The expected calls, for the metric "tool-call"; empty if none is expected.
    """

    prompt: str
    expected: str
    place: str
    choices: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Question:
    """One row of a task as token ids for one model.

    Attributes:
        row: The row.
        ids: The prompt. These are the ids that fine-tuning puts before the reply.
        reply: The expected reply, with the token that ends it.
        choices: The possible replies in the same form.
        style: How the model's replies spell calls of tools.
        tools: The tools that the request declares.
    """

    row: TaskRow
    ids: tuple[int, ...]
    reply: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    style: Style = JSON_STYLE
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Task:
    """The rows of a task and how replies are scored.

    Attributes:
        name: The name of the file.
        metric: The metric.
        why: Why the metric was chosen, in a few words; empty if the caller chose it.
        rows: The rows.
    """

    name: str
    metric: MetricName
    why: str
    rows: tuple[TaskRow, ...]
