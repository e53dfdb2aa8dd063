"""Several models measured on the rows of a task, one after the other."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slm.core.artifacts import kind_of, read_artifact
from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.manifest import Bundle, is_bundle
from slm.core.metrics.scoring import reaches
from slm.core.progress import Progress
from slm.core.task import MetricName, Task
from slm.steps.choosing import Note, base_of

if TYPE_CHECKING:
    from slm.finetune.task import TaskFile
    from slm.runtime.answers import Measured
    from slm.runtime.model import Model


@dataclass(frozen=True)
class Rows:
    """The rows of a task, and how they are answered.

    Attributes:
        task: The file or directory of rows.
        metric: The score of a reply; None chooses one by the rows.
        minimum: The lowest score that passes; None for no limit.
        max_tokens: The longest reply; None for the default.
        batch: Number of rows answered together; None for the default.
        limit: Number of rows to use; None for all.
        row_bytes: Maximum bytes of a row; None for the default.
        tool_choice: "auto" or "required" constrains calls to the schemas of the row's tools; None does not.
    """

    task: Path
    metric: MetricName | None = None
    minimum: float | None = None
    max_tokens: int | None = None
    batch: int | None = None
    limit: int | None = None
    row_bytes: int | None = None
    tool_choice: Literal["auto", "required"] | None = None


@dataclass(frozen=True)
class Result:
    """The measurement of one model.

    Attributes:
        name: The model's path; with an adapter, also the adapter's.
        backend: The backend, device and precision.
        path: The adapter, or the model without one.
        bytes: Size of the weights, and of the graph or the adapter, on disk.
        measured: The measurement.
    """

    name: str
    path: Path
    backend: str
    bytes: int
    measured: "Measured"


@dataclass(frozen=True, repr=False)
class Comparison:
    """The measurements of a task.

    Attributes:
        task: The task.
        total: The number of rows in the file.
        results: The models in the order of the command.
        minimum: The lowest score that passes; None for no limit.
        page: The HTML report, with report.json beside it.
    """

    task: Task
    total: int
    results: tuple[Result, ...]
    minimum: float | None
    page: Path | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(metric={self.task.metric!r}, rows={len(self.task.rows)}, scores={self.scores})"

    def _repr_html_(self) -> str:
        """Returns the table of the models, which a notebook shows."""
        from slm.core.report_page import table
        from slm.steps.comparison_report import summary

        return table(*summary(self, narrow=True))

    @property
    def scores(self) -> dict[str, float]:
        """The score of each model, from 0 to 1, by its name."""
        return {each.name: each.measured.score for each in self.results}

    @property
    def best(self) -> Result:
        """The model with the highest score; of several, the smallest."""
        return max(self.results, key=lambda each: (each.measured.score, -each.bytes))

    @property
    def failed(self) -> list[Result]:
        """The models below the limit."""
        limit = self.minimum
        return [] if limit is None else [each for each in self.results if not reaches(each.measured.score, limit)]


@dataclass(frozen=True)
class _Candidate:
    """A model to measure: a checkpoint or a bundle, with or without an adapter."""

    path: Path
    adapter: Path | None
    name: str


class BelowMinimum(SlmError):
    """A model scores less than the required minimum; the report was written.

    Attributes:
        comparison: The measurements.
    """

    def __init__(self, message: str, hint: str | None, comparison: Comparison) -> None:
        super().__init__(message, hint)
        self.comparison = comparison

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint, self.comparison)


def compare(
    models: Sequence[Path], adapters: Sequence[Path], rows: Rows, loading: Mapping[str, Any], progress: Progress
) -> Comparison:
    """Measures models on a task, one after the other.

    Args:
        models: Checkpoints, bundles and adapters. An adapter runs on the checkpoint that it was trained on.
        adapters: Adapters to apply to the first model.
        rows: The task.
        loading: The options of `slm.load`.
        progress: Receives progress and notes.

    Raises:
        SlmError: If a row or a model cannot be used.
    """
    from slm.finetune.rows import Limits
    from slm.finetune.task import read_task

    note = progress.note
    bounds = Limits.checked(rows.row_bytes, None)
    file = read_task(rows.task, rows.metric, limit=rows.limit, limits=bounds)
    task = file.task
    if rows.tool_choice is not None:
        _check_choice(rows.tool_choice, file)
    if task.why:
        note(f"metric: {task.metric} ({task.why}); --metric chooses another")
    candidates = [_candidate(path, note) for path in models]
    first = candidates[0]
    if adapters and first.adapter is not None:
        raise SlmError(f"{first.adapter} is an adapter, to which --adapter cannot be applied", "name its base first")
    candidates += [_Candidate(first.path, each, f"{first.path} + {each}") for each in adapters]
    trained = None if rows.task.is_dir() else sha256_file(rows.task)
    for each in candidates:
        if trained is not None and _trained_on(_record(each), trained):
            note(f"note: {each.name} was tuned on this file; its score on rows that it has learned says little")
    results = []
    for each in candidates:
        results.append(_measure(each, file, rows, loading, progress))
        gc.collect()  # the memory of one model, before the next is loaded
    return Comparison(task, file.total, tuple(results), rows.minimum)


def _check_choice(choice: str, file: "TaskFile") -> None:
    """Checks that a choice of tools can constrain the replies.

    Raises:
        SlmError: If the metric is another than tool-call, no row declares tools, or llguidance is missing.
    """
    from slm.finetune.rows import ChatRow
    from slm.runtime.tool_choice import require_grammar

    if file.task.metric != "tool-call":
        raise SlmError(
            f"--tool-choice constrains calls, and the metric is {file.task.metric}", "use --metric tool-call"
        )
    if not any(isinstance(row, ChatRow) and row.tools for row in file.rows):
        raise SlmError(
            "--tool-choice requires rows that declare tools", 'add "tools" to the rows, or omit --tool-choice'
        )
    require_grammar(choice)


def _candidate(path: Path, note: Note) -> _Candidate:
    if kind_of(path) != "adapter":
        return _Candidate(path, None, str(path))
    if not path.is_dir():
        raise SlmError(f"{path} does not record its base", "slm eval BUNDLE --adapter FILE --task ROWS")
    return _Candidate(base_of(path, note), path, str(path))


def _measure(each: _Candidate, file: "TaskFile", rows: Rows, loading: Mapping[str, Any], progress: Progress) -> Result:
    from slm.finetune.examples import Renderer
    from slm.finetune.task import questions
    from slm.loading import load
    from slm.runtime.scheduler import SLOTS
    from slm.runtime.task import measure_task

    model: Model = load(each.path, adapter=each.adapter, **loading)
    progress.note(f"{each.name}: {model.decoder.description}")
    found = questions(file, Renderer(model.tokenizer, model))
    measured = measure_task(
        model,
        found,
        file.task.metric,
        progress,
        max_tokens=rows.max_tokens,
        batch=rows.batch or SLOTS,
        tool_choice=rows.tool_choice,
    )
    return Result(each.name, each.adapter or each.path, model.decoder.description, _bytes(each), measured)


def _bytes(each: _Candidate) -> int:
    """Returns the size of weights, graph and adapter on disk."""
    from slm.core.weights import bytes_on_disk

    own = Bundle.open(each.path, trust=True).model_bytes if is_bundle(each.path) else bytes_on_disk(each.path)
    if each.adapter is None:
        return own
    files = [each.adapter] if each.adapter.is_file() else each.adapter.glob("adapter_model.*")
    return own + sum(file.stat().st_size for file in files)


def _record(each: _Candidate) -> Any:
    """Returns the `slm.json` of a model or its adapter; empty if there is none."""
    found = read_artifact(each.adapter or each.path)
    if found is None:
        return {}
    return (found.record.get("provenance") or {}).get(INFO_FILE) if found.kind == "bundle" else found.record


def _trained_on(record: Any, sha256: str) -> bool:
    """Returns whether a record names a file with this hash as training data, at any depth."""
    if not isinstance(record, Mapping):
        return False
    data = record.get("data")
    own = isinstance(data, Mapping) and data.get("sha256") == sha256
    return own or any(_trained_on(each, sha256) for each in record.values())
