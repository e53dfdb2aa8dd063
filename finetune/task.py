"""The rows of a task for `slm eval --task`: one request and its expected reply of each row, in text and in a model's tokens.

The token ids of a request are those that fine-tuning puts before the reply, because both come from `Renderer`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm.core.chat import tool_form
from slm.core.errors import SlmError
from slm.core.metrics.objects import NotJson, parsed_json
from slm.core.metrics.words import rouge_words
from slm.core.task import MetricName, Question, Task, TaskRow
from slm.core.text.json_rows import parse
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.tools import JSON_STYLE, parsed_calls, with_calls
from slm.finetune.examples import Example, Renderer
from slm.finetune.rows import ChatRow, CompletionRow, Limits, PreferenceRow, Row, read_rows

# Default metric by the median number of words of the expected replies: up to the first number "exact", up to the second "f1",
# above "rouge".
_SHORT, _MEDIUM = 3, 20
# Without a column `choices`, the replies of all rows are the choices, if there are at most this many different ones.
_MOST_DISTINCT = 50
_MOST_CHOICES = 1000
_FORM = '"choices" is an array of two or more different texts: {"prompt": ..., "completion": "yes", "choices": ["yes", "no"]}'


@dataclass(frozen=True)
class TaskFile:
    """A task and its rows as they were read.

    Attributes:
        task: The task.
        rows: The rows, in the same order.
        total: The number of rows in the file.
    """

    task: Task
    rows: tuple[ChatRow | CompletionRow, ...]
    total: int


def read_task(
    path: Path, metric: MetricName | None = None, *, limit: int | None = None, limits: Limits | None = None
) -> TaskFile:
    """Reads the rows of a task from files of any kind that `slm finetune` reads.

    Args:
        path: A file, or a directory of files.
        metric: The metric; None chooses one by the rows.
        limit: The number of rows to use, evenly spread over the file; None uses all.
        limits: Limits of reading; the defaults when None.

    Raises:
        SlmError: When a file or a row cannot be read, a row has no request and reply, or a row does not fit the metric; the
            message names the row.
    """
    choices: list[Any] = []
    read = read_rows(path, limits=limits, choices=choices)
    return task_of(
        [row.chosen if isinstance(row, PreferenceRow) else row for row in read], choices, path, metric, limit
    )


def task_of(
    rows: Sequence[Row], choices: Sequence[Any], path: Path, metric: MetricName | None = None, limit: int | None = None
) -> TaskFile:
    """Returns the task of rows that were read from a file.

    Args:
        rows: The rows.
        choices: The column `choices` of each row, unchecked; None for a row without it.
        path: The file or directory.
        metric: The metric; None chooses one by the rows.
        limit: The number of rows to use, evenly spread; None uses all.

    Raises:
        SlmError: As `read_task`.
    """
    asked, calling = ([_asked(row) for row in each] for each in (rows, map(_up_to_calls, rows)))
    why = ""
    if metric is None:
        metric, why = _default_metric(asked, calling, choices)
    if metric == "tool-call":
        rows, asked = [_up_to_calls(row) for row in rows], calling
        if not any(row.calls for row in asked):
            raise SlmError(f"no reply of {path} calls a tool", "choose another --metric")
    if metric == "choice":
        asked = _with_choices(asked, choices)
    if metric == "json":
        for row in asked:
            _check_json(row)
    chosen = range(len(rows)) if limit is None else _spread(len(rows), limit)
    kept = [source for i in chosen if isinstance(source := rows[i], ChatRow | CompletionRow)]
    return TaskFile(Task(path.name, metric, why, tuple(asked[i] for i in chosen)), tuple(kept), len(rows))


def questions(file: TaskFile, renderer: Renderer) -> list[Question]:
    """Converts the rows of a task to the token ids of a model.

    Args:
        file: The rows.
        renderer: Converts rows to token ids.

    Raises:
        SlmError: When the model has no turn tokens, or its chat template rejects a conversation; the message names the row.
    """
    # One call each, because a foreign template is rendered in a process of its own.
    examples = renderer.uncut(file.rows)
    others = renderer.uncut(
        [
            _with_reply(source, choice)
            for row, source in zip(file.task.rows, file.rows, strict=True)
            for choice in row.choices
        ]
    )
    style = tool_form(renderer.tokenizer).style if file.task.metric == "tool-call" else JSON_STYLE
    found = []
    for row, source, example in zip(file.task.rows, file.rows, examples, strict=True):
        ids, reply = _divided(_good(example, row), renderer)
        choices = tuple(_divided(_good(next(others), row), renderer)[1] for _ in row.choices)
        tools = source.tools if isinstance(source, ChatRow) else ()
        found.append(Question(row, ids, reply, choices, style, tools))
    return found


def _asked(row: Row) -> TaskRow:
    """Returns the request and the expected reply of a row: the last answer of a conversation that counts in the loss."""
    match row:
        case ChatRow():
            *before, last = row.messages
            text, calls = last["content"].strip(), tuple(last.get("calls", ()))
            prompt = with_calls(before[-1]["content"], before[-1].get("calls", ())) if before else ""
            return TaskRow(prompt, with_calls(text, calls), row.place, calls=calls or tuple(parsed_calls(text)[1]))
        case CompletionRow():
            if not row.prompt.strip():
                raise SlmError(f"{row.place}: the prompt is empty, so nothing is asked", "remove the row")
            calls = tuple(parsed_calls(row.completion)[1])
            return TaskRow(row.prompt, row.completion.strip(), row.place, calls=calls)
    raise SlmError(
        f"{row.place}: a row of text has no request and no reply to compare",
        "use rows with prompt and completion, or messages; slm eval --data measures the loss of texts",
    )


def _up_to_calls(row: Row) -> Row:
    """Returns a conversation up to its last answer with calls that counts in the loss; without one, the whole conversation.

    What follows such an answer are results, and an answer with what they say.
    """
    if not isinstance(row, ChatRow):
        return row
    calling = [i for i, message in enumerate(row.messages) if message.get("calls") and i not in row.only_read]
    return replace(row, messages=row.messages[: calling[-1] + 1]) if calling else row


def _default_metric(
    rows: Sequence[TaskRow], calling: Sequence[TaskRow], choices: Sequence[Any]
) -> tuple[MetricName, str]:
    """Returns the metric that fits the rows, and the reason.

    Args:
        rows: The rows with their last answers.
        calling: The rows with their last answers that call tools.
        choices: The column `choices` of each row.
    """
    if any(row.calls for row in calling):
        return "tool-call", "replies call tools"
    if any(choices):
        return "choice", "rows have choices"
    if all(_is_structure(row.expected) for row in rows):
        return "json", "all replies are JSON"
    words = statistics.median(len(rouge_words(row.expected)) for row in rows)
    return (
        "exact" if words <= _SHORT else "f1" if words <= _MEDIUM else "rouge"
    ), f"the median reply has {words:g} word{'s' if words != 1 else ''}"


def _is_structure(text: str) -> bool:
    """Returns whether a text is a JSON object or array."""
    if not text.startswith(("{", "[")):
        return False
    try:
        parsed_json(text)
    except NotJson:
        return False
    return True


def _check_json(row: TaskRow) -> None:
    try:
        parsed_json(row.expected)
    except NotJson as error:
        raise SlmError(f"{row.place}: the expected reply is not JSON: {error}", "choose another --metric") from None


def _with_choices(rows: Sequence[TaskRow], choices: Sequence[Any]) -> list[TaskRow]:
    if not any(choices):
        return _among_replies(rows)
    return [replace(row, choices=_checked(row, given)) for row, given in zip(rows, choices, strict=True)]


def _among_replies(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Returns rows whose choices are the different replies of all rows, in alphabetical order."""
    replies = tuple(sorted({row.expected for row in rows}))
    if not 2 <= len(replies) <= _MOST_DISTINCT:
        raise SlmError(
            f"rows have no 'choices'; their expected replies are the choices if 2 to {_MOST_DISTINCT} of them differ, and "
            f"{len(replies):,} do",
            _FORM,
        )
    return [replace(row, choices=replies) for row in rows]


def _checked(row: TaskRow, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) and given.lstrip().startswith("["):  # a cell of a table
        given = parse(given, DOCUMENT_BYTES)
    if not isinstance(given, list) or not all(isinstance(each, str) and each.strip() for each in given):
        raise SlmError(f"{row.place}: 'choices' is missing or is not an array of texts", _FORM)
    choices = tuple(each.strip() for each in given)
    try:
        "".join(choices).encode()
    except UnicodeEncodeError:
        raise SlmError(f"{row.place}: 'choices' holds half of a surrogate pair", "write the character itself") from None
    if not 2 <= len(set(choices)) == len(choices) <= _MOST_CHOICES:
        raise SlmError(
            f"{row.place}: 'choices' has {len(choices):,} texts, {len(set(choices)):,} of them different; 2 to "
            f"{_MOST_CHOICES:,} different ones are supported",
            _FORM,
        )
    if row.expected not in choices:
        raise SlmError(f"{row.place}: the expected reply {row.expected!r:.60} is not among the choices", _FORM)
    return choices


def _spread(count: int, limit: int) -> list[int]:
    """Returns the numbers of at most `limit` rows, evenly spread."""
    kept = min(count, limit)
    return [number * count // kept for number in range(kept)]


def _good(example: Example | SlmError, row: TaskRow) -> Example:
    if isinstance(example, SlmError):
        raise SlmError(f"{row.place}: {example.message}", example.hint)
    return example


def _divided(example: Example, renderer: Renderer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids before the reply, and those of the reply with the token that ends it.

    Fine-tuning also learns end-of-text after the end of the last turn; generation stops before it.
    """
    start, end = example.spans[-1]
    ids = example.ids[:end]
    if len(ids) - start > 1 and ids[-1] == renderer.end_of_text and ids[-2] in renderer.ends:
        ids = ids[:-1]
    return example.ids[:start], ids[start:]


def _with_reply(row: ChatRow | CompletionRow, reply: str) -> ChatRow | CompletionRow:
    """Returns the row with another reply. White space that joins prompt and completion stays."""
    if isinstance(row, ChatRow):
        return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": reply}))
    begins = row.completion[: len(row.completion) - len(row.completion.lstrip())]
    ends = row.completion[len(row.completion.rstrip()) :]
    return replace(row, completion=begins + reply + ends)
