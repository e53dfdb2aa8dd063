"""`slm.evaluate`: models measured on text, on the rows of a task, or on tasks of lm-evaluation-harness."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack, overload

from slm.core.artifacts import kind_of
from slm.core.errors import ArgumentError, SlmError
from slm.core.install import install_hint
from slm.core.machine import MAX_THREADS
from slm.core.outputs import check_output
from slm.core.progress import Progress
from slm.core.runs import RUNS
from slm.core.sample import validation_path
from slm.core.task import MetricName
from slm.core.text.documents import TEXT_COLUMN, read_documents, text_files
from slm.core.text.streams import DOCUMENT_BYTES
from slm.steps.arguments import (
    Bytes,
    PathArgument,
    Positive,
    Range,
    Share,
    Two,
    as_names,
    as_optional_path,
    as_path,
    as_paths,
    check_input,
    step,
)
from slm.steps.bars import shown
from slm.steps.choosing import Note, base_of, default_model, named
from slm.steps.comparison import BelowMinimum, Comparison, Rows, compare
from slm.steps.comparison_report import FILES, PAGE_FILE, below_limit, write_report

if TYPE_CHECKING:
    from slm.runtime.evaluate import Measurement
    from slm.runtime.model import Model

Paths = PathArgument | Sequence[PathArgument]

_SHIPPED = "the bundled held-out stories"
# The arguments of --task alone, and those of a text.
_OF_TASKS = ("metric", "adapter", "min", "max_tokens", "batch", "tool_choice", "out")
_OF_TEXTS = ("data", "column", "context", "stride", "tokens")


class TaskOptions(TypedDict, total=False):
    """The further arguments of `evaluate` with `task`."""

    metric: MetricName | None
    adapter: Paths
    min: float | None
    max_tokens: int | None
    batch: int | None
    tool_choice: Literal["auto", "required"] | None
    limit: int | None
    max_document_bytes: int | None
    out: PathArgument | None
    device: Literal["cpu", "cuda"]
    threads: int | None
    trust: bool
    allow_slow: bool
    progress: Progress | bool


class TextOptions(TypedDict, total=False):
    """The further arguments of `evaluate` without `task`."""

    data: Paths
    column: str | None
    max_document_bytes: int | None
    protocol: Literal["documents", "windows"]
    context: int | None
    stride: int | None
    tokens: int | None
    tasks: str | Sequence[str] | None
    limit: int | None
    device: Literal["cpu", "cuda"]
    threads: int | None
    trust: bool
    allow_slow: bool
    progress: Progress | bool


@dataclass(frozen=True)
class TextResult:
    """The measurement of one model on a text, and on tasks of lm-evaluation-harness.

    Attributes:
        path: The model, or the adapter.
        backend: The backend, device and precision.
        data: The name of the text; None if only tasks were measured.
        text: Loss, perplexity and bits per byte; None if only tasks were measured.
        tasks: The figures of each task by its name; empty without `tasks`.
    """

    path: Path
    backend: str
    data: str | None
    text: "Measurement | None"
    tasks: Mapping[str, dict[str, Any]]


@overload
def evaluate(models: Paths = ..., *, task: PathArgument, **options: Unpack[TaskOptions]) -> Comparison: ...


@overload
def evaluate(models: Paths = ..., *, task: None = None, **options: Unpack[TextOptions]) -> TextResult: ...


@step
def evaluate(
    models: Paths = (),
    *,
    data: Paths = (),
    column: str | None = None,
    max_document_bytes: Bytes | None = None,
    protocol: Literal["documents", "windows"] = "documents",
    context: Two | None = None,
    stride: Positive | None = None,
    tokens: Positive | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: Positive | None = None,
    task: PathArgument | None = None,
    metric: MetricName | None = None,
    adapter: Paths = (),
    min: Share | None = None,
    max_tokens: Positive | None = None,
    batch: Annotated[int, Range(1, 64)] | None = None,
    tool_choice: Literal["auto", "required"] | None = None,
    out: PathArgument | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: Annotated[int, Range(1, MAX_THREADS)] | None = None,
    trust: bool = False,
    allow_slow: bool = False,
    progress: Progress | bool = True,
) -> Comparison | TextResult:
    """Evaluates a model on text, or several models on the rows of a task (docs/evaluation.md).

    Args:
        models: A checkpoint, a bundle or an adapter, or a list of them; by default the newest model under ./runs.
        data: Text: files or directories; by default the held-out stories that ship.
        column: The name of the text column in rows; "text" by default.
        max_document_bytes: Limit of a row or document; by default 16 MiB.
        protocol: Whether to evaluate each document separately, or windows of one stream, as training does.
        context: Longest row of tokens; by default the model's context up to 4,096, or with windows that of training.
        stride: New tokens in each further row of a long document; by default half of the context.
        tokens: Stop after about this many predicted tokens; by default all, or with windows as in training.
        tasks: Tasks of lm-evaluation-harness, as a list or with commas.
        limit: Examples of each of `tasks`, or rows of `task`; by default all.
        task: Rows that `slm.finetune` reads: score the models' replies to them.
        metric: With `task`: the score of a reply; by default chosen by the rows.
        adapter: With `task`: adapters to apply to the first model, each as a further one.
        min: With `task`: the lowest score that passes.
        max_tokens: With `task`: the longest reply; by default twice the longest expected one, from 32 to 1,024.
        batch: With `task`: rows that a fused bundle answers together; 8 by default.
        tool_choice: With `task`: calls follow the schemas of the row's tools, as in `slm serve`, and with "required" there is
            nothing but calls; by default nothing constrains replies.
        out: With `task`: the directory of report.html and report.json; by default runs/eval-NAME.
        device: The device that runs the models.
        threads: Number of threads; by default the usable physical cores.
        trust: Whether to run a bundle whose graph slm did not write.
        allow_slow: Whether to run a bundle for the CPU on "cuda".
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Returns:
        With `task` a `Comparison`, otherwise a `TextResult`.

    Raises:
        SlmError: If an input is missing or wrong, options exclude each other, or a model scores less than `min`; the report is
            written before.
    """
    given = {each: value for each, value in locals().items() if each != "progress"}
    display = shown(progress)
    names = [models] if isinstance(models, str | os.PathLike) else list(models)
    _check(names, given)
    loading = {"device": device, "threads": threads, "trust": trust, "allow_slow": allow_slow}
    paths = [named(each, ("checkpoint", "bundle", "adapter"), display.note) for each in names]
    if task is not None:
        rows = Rows(as_path(task), metric, min, max_tokens, batch, limit, max_document_bytes, tool_choice)
        compared = _compare(paths, rows, given, loading, display)
        if compared.failed:
            raise BelowMinimum(below_limit(compared), f"{compared.page} has the worst replies", compared)
        return compared
    harness = as_names(tasks)
    texts = None if harness and not given["data"] else _Text(given)
    path = paths[0] if paths else default_model(display.note)
    from slm.runtime.placement import conversion_notes

    model = _load(path, loading, display.note)
    backend = model.decoder.description
    display.note(f"{path}: {backend}")
    for line in conversion_notes(model.decoder, device):
        display.note(line)
    measured = None
    if texts is not None:
        display.note(f"text: {texts.about}")
        measured = _measure(model, path, texts, given, display)
    figures = _run_harness(model, harness, limit, display) if harness else {}
    return TextResult(path, backend, None if texts is None else texts.about, measured, figures)


def _check(models: Sequence[PathArgument], given: Mapping[str, Any]) -> None:
    """Checks the arguments against each other.

    Raises:
        ArgumentError: If they contradict each other.
        SlmError: If the harness is not installed.
    """
    names = as_names(given["tasks"])
    if given["task"] is not None:
        text = given["protocol"] != "documents" or any(given[name] not in (None, ()) for name in _OF_TEXTS)
        if given["tasks"] is not None or text:
            raise ArgumentError("--task is evaluated alone: omit --data, --tasks and the options of a text")
        check_input(as_path(given["task"]), "rows", directories=True)
        return
    if len(models) > 1:
        raise ArgumentError("several models require --task")
    if unused := [name for name in _OF_TASKS if given[name] not in (None, ())]:
        raise ArgumentError(f"--{unused[0].replace('_', '-')} requires --task")
    if given["stride"] is not None and given["protocol"] == "windows":
        raise ArgumentError("windows do not overlap: use --stride with --protocol documents")
    if given["tasks"] is not None and not names:
        raise ArgumentError("--tasks is empty")
    if given["limit"] is not None and not names:
        raise ArgumentError("--limit applies to --tasks and --task; use --tokens for text")
    if names and find_spec("lm_eval") is None:
        raise SlmError("--tasks needs lm-evaluation-harness, which is not installed", install_hint("eval"))


def _compare(
    paths: Sequence[Path], rows: Rows, given: Mapping[str, Any], loading: Mapping[str, Any], display: Progress
) -> Comparison:
    """Compares models on the rows of a task, and writes the report."""
    name = rows.task.resolve().name.partition(".")[0] or "task"
    directory = as_optional_path(given["out"]) or RUNS / f"eval-{name}"
    check_output(directory, FILES)
    adapters = [named(each, ("adapter",), display.note) for each in as_paths(given["adapter"])]
    compared = compare(paths or (default_model(display.note),), adapters, rows, loading, display)
    compared = replace(compared, page=directory / PAGE_FILE)
    write_report(directory, compared)
    return compared


def _load(path: Path, loading: Mapping[str, Any], note: Note) -> "Model":
    """Returns a model; for an adapter, its base with the adapter."""
    from slm.loading import load

    if kind_of(path) != "adapter":
        return load(path, **loading)
    return load(base_of(path, note), adapter=path, **loading)


def _run_harness(
    model: "Model", tasks: Sequence[str], limit: int | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Returns the figures of each task."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # disables the harness's progress bars
    from slm.interchange.harness import run_tasks

    return run_tasks(model, list(tasks), limit=limit, progress=progress)


class _Text:
    """The evaluation text: files of documents, which are checked before a model is loaded."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._column, self._limit = given["column"] or TEXT_COLUMN, given["max_document_bytes"] or DOCUMENT_BYTES
        paths = as_paths(given["data"])
        self.files = text_files(paths or (validation_path(),))
        self.about = ", ".join(map(str, paths)) if paths else _SHIPPED

    def read(self) -> Iterator[str]:
        """Yields the documents."""
        for file in self.files:
            empty = True
            for document in read_documents(file, self._column, self._limit):
                empty = False
                yield document
            if empty:
                raise SlmError(f"no text in {file}", "omit it, or check that it is the right file")


def _measure(model: "Model", path: Path, text: _Text, given: Mapping[str, Any], progress: Progress) -> "Measurement":
    from slm.runtime.evaluate import evaluate_documents, evaluate_windows

    context, stride, tokens = given["context"], given["stride"], given["tokens"]
    if given["protocol"] == "documents":
        return evaluate_documents(model, text.read(), progress, context=context, stride=stride, tokens=tokens)
    trained_context, windows = _as_trained(path)
    if context is None and trained_context is not None:
        context = min(trained_context, model.decoder.context)
    return evaluate_windows(model, text.read(), progress, context=context, windows=windows, tokens=tokens)


def _as_trained(path: Path) -> tuple[int | None, int | None]:
    """Returns the context and number of windows of evaluations during training; None if they are not recorded."""
    from slm.core.checkpoint import INFO_FILE, read_info
    from slm.core.manifest import Bundle, is_bundle

    recorded: Any = (
        Bundle.open(path, trust=True).manifest.provenance.get(INFO_FILE) if is_bundle(path) else read_info(path)
    )
    try:
        recipe = recorded["recipe"]
        evaluation = recipe["evaluation"]
        return int(evaluation.get("context") or recipe["batch"]["context"]), int(evaluation["windows"])
    except (KeyError, TypeError, ValueError):
        return None, None
