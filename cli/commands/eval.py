"""`slm eval`: evaluates a model on text or on tasks."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from slm.cli.choosing import default_model
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_adapter, after_model, next_step
from slm.cli.options import (
    Artifact,
    FilePath,
    Whole,
    allow_slow_option,
    collects,
    column_option,
    document_option,
    json_option,
    threads_option,
    trust_option,
)
from slm.cli.sampling import warn_of_conversions
from slm.cli.task_run import RowLimits, RowOptions, compare, task_options
from slm.core.artifacts import kind_of
from slm.core.errors import SlmError
from slm.core.install import install_hint
from slm.core.outputs import check_output
from slm.core.sample import validation_path
from slm.core.text.documents import TEXT_COLUMN, read_documents, text_files
from slm.core.text.streams import DOCUMENT_BYTES

if TYPE_CHECKING:
    from slm.runtime.evaluate import Measurement
    from slm.runtime.model import Model

_SHIPPED = "the bundled held-out stories"


@dataclass(frozen=True)
class TextOptions:
    """The evaluation text; the bundled stories without --data."""

    data: tuple[Path, ...]
    column: str | None
    max_document_bytes: int | None


@dataclass(frozen=True)
class ProtocolOptions:
    """How the text is cut into rows of tokens."""

    protocol: str
    context: int | None
    stride: int | None
    tokens: int | None


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness, and how many examples to take of them or of --task."""

    tasks: str | None
    limit: int | None

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class ModelOptions:
    """The options of `slm.load` that evaluation has."""

    device: Literal["cpu", "cuda"]
    threads: int | None
    trust: bool
    allow_slow: bool


@click.command(name="eval")
@click.argument("models", metavar="[MODEL]...", type=Artifact(adapters=True), nargs=-1)
@click.option(
    "--data",
    multiple=True,
    type=FilePath(),
    metavar="PATH",
    help="Text: .txt, .jsonl, .parquet, .csv or a directory; may be repeated. [default: the bundled held-out stories]",
)
@column_option
@document_option
@click.option(
    "--protocol",
    type=click.Choice(["documents", "windows"]),
    default="documents",
    show_default=True,
    help="Evaluate each document separately, or windows of one stream, as training does.",
)
@click.option(
    "--context",
    type=Whole(2),
    metavar="N",
    help="Longest row of tokens. [default: the model's context up to 4,096; for windows, training's]",
)
@click.option(
    "--stride",
    type=Whole(1),
    metavar="N",
    help="New tokens in each further row of a long document. [default: half of the context]",
)
@click.option(
    "--tokens",
    type=Whole(1),
    metavar="N",
    help="Stop after about N predicted tokens. [default: all; for windows, as in training]",
)
@click.option(
    "--tasks",
    metavar="A,B",
    help="Tasks of lm-evaluation-harness, or YAML files that define a task. Such a file can run Python: use only files that "
    "you trust.",
)
@click.option("--limit", type=Whole(1), metavar="N", help="Examples per task, or rows of --task. [default: all]")
@task_options
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@threads_option
@trust_option
@allow_slow_option
@json_option
@collects("text", TextOptions)
@collects("protocol", ProtocolOptions)
@collects("tasks", TaskOptions)
@collects("rows", RowOptions)
@collects("loading", ModelOptions)
def eval(
    models: tuple[Path, ...],
    text: TextOptions,
    protocol: ProtocolOptions,
    tasks: TaskOptions,
    rows: RowOptions,
    loading: ModelOptions,
    as_json: bool,
) -> None:
    """Evaluate checkpoints (PyTorch) and bundles (onnxruntime) on text, on a task's rows, or on tasks of a harness.

    Without MODEL, evaluates the newest finished model under ./runs, or the bundled demo model if there is none. With --tasks
    and without --data, runs only the tasks. With --task, compares any number of models and adapters on rows of requests and
    expected replies, and writes report.html; --min makes it a check.

    \b
      slm eval
      slm eval runs/tiny/checkpoint/best --data valid.txt --json
      slm eval runs/tiny/onnx-int8 --protocol windows     the figure in metrics.jsonl, for the same text
      slm eval --tasks lambada_openai,hellaswag --limit 200
      slm eval runs/tiny/onnx runs/tiny/onnx-int8 --task rows.jsonl --metric exact --min 90%

    docs/evaluation.md has the formulas, and says which figures are comparable.
    """
    _check(models, text, protocol, tasks, rows)
    if rows.task is not None:
        _compare(models, rows, RowLimits(tasks.limit, text.max_document_bytes), loading, as_json)
        return
    documents = None if tasks.names and not text.data else _Text(text)
    path, loaded = _load(models[0] if models else default_model(), loading)
    say(f"{path}: {loaded.decoder.description}")
    warn_of_conversions(loaded.decoder, loading.device)
    report: dict[str, Any] = {"model": str(path), "backend": loaded.decoder.description}
    if documents is not None:
        say(f"text: {documents.about}")
        measured = _measure(loaded, path, documents, protocol)
        report |= {"data": documents.about} | _figures(measured)
        if not as_json:
            _print_measurement(path, measured)
    if tasks.names:
        report["tasks"] = _run_tasks(loaded, tasks)
        if not as_json:
            _print_tasks(path, report["tasks"])
    following = _after(path)
    if as_json:
        print_json(report | {"next": following})
    else:
        next_step(following)


def _check(
    models: tuple[Path, ...], text: TextOptions, protocol: ProtocolOptions, tasks: TaskOptions, rows: RowOptions
) -> None:
    if rows.task is not None:
        given = (
            text.data,
            text.column,
            protocol.protocol != "documents",
            protocol.context,
            protocol.stride,
            protocol.tokens,
        )
        if tasks.tasks is not None or any(given):
            raise click.UsageError("--task is evaluated alone: omit --data, --tasks and the options of a text")
        return
    if len(models) > 1:
        raise click.UsageError("several models require --task")
    if rows.unused:
        raise click.UsageError(f"{rows.unused[0]} requires --task")
    if protocol.stride is not None and protocol.protocol == "windows":
        raise click.UsageError("windows do not overlap: use --stride with --protocol documents")
    if tasks.tasks is not None and not tasks.names:
        raise click.UsageError("--tasks is empty")
    if tasks.limit is not None and not tasks.names:
        raise click.UsageError("--limit applies to --tasks and --task; use --tokens for text")
    if tasks.names and find_spec("lm_eval") is None:
        raise SlmError("--tasks needs lm-evaluation-harness, which is not installed", install_hint("eval"))


def _load(path: Path, loading: ModelOptions) -> "tuple[Path, Model]":
    """Returns a model and its path; for an adapter, its base with the adapter."""
    from slm.loading import load

    if kind_of(path) != "adapter":
        return path, load(path, **asdict(loading))
    from slm.cli.commands.export import base_of

    return path, load(base_of(path), adapter=path, **asdict(loading))


def _compare(
    models: tuple[Path, ...], rows: RowOptions, limits: RowLimits, loading: ModelOptions, as_json: bool
) -> None:
    """Compares models on the rows of a task, and writes the report.

    Raises:
        SlmError: If a model scores less than --min, after the report was written.
    """
    from slm.cli.task_results import FILES, PAGE_FILE, as_dict, below_limit, print_results, write_report

    check_output(rows.directory, FILES)
    compared = compare(models or (default_model(),), rows, limits, asdict(loading))
    write_report(rows.directory, compared)
    page = rows.directory / PAGE_FILE
    following = {} if compared.failed else {"next": _after(compared.best.path)}
    if as_json:
        print_json(as_dict(compared, rows=False) | {"report": str(page)} | following)
    else:
        print_results(compared)
        say(f"report: {page}")
    if compared.failed:
        raise SlmError(below_limit(compared), f"{page} has the worst replies")
    if not as_json:
        next_step(following["next"])


def _after(path: Path) -> str:
    """Returns the next command for a model or an adapter."""
    return after_adapter(path) if kind_of(path) == "adapter" else after_model(path)


def _run_tasks(model: "Model", tasks: TaskOptions) -> dict[str, dict[str, Any]]:
    """Returns the figures of each task."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # disables the harness's progress bars
    from slm.interchange.harness import run_tasks

    return run_tasks(model, tasks.names, limit=tasks.limit, progress=RichProgress())


class _Text:
    """The evaluation text: files of documents, which are checked before a model is loaded."""

    def __init__(self, options: TextOptions) -> None:
        self._column, self._limit = options.column or TEXT_COLUMN, options.max_document_bytes or DOCUMENT_BYTES
        paths = options.data
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


def _measure(model: "Model", path: Path, text: _Text, options: ProtocolOptions) -> "Measurement":
    from slm.runtime.evaluate import evaluate_documents, evaluate_windows

    progress, context, tokens = RichProgress(), options.context, options.tokens
    if options.protocol == "documents":
        return evaluate_documents(model, text.read(), progress, context=context, stride=options.stride, tokens=tokens)
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


def _figures(measured: "Measurement") -> dict[str, Any]:
    return {
        "protocol": measured.protocol,
        "context": measured.context,
        "stride": measured.stride,
        "windows": measured.windows,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "tokens": measured.tokens,
        "documents": measured.documents,
        "bytes": measured.bytes,
        "end_of_text": {
            "id": measured.end_of_text,
            "tokens": measured.end_of_text_tokens,
            "nats": measured.end_of_text_nats,
        },
        "seconds": round(measured.seconds, 3),
        "tokens_s": round(measured.tokens_s, 1),
    }


def _print_measurement(path: Path, measured: "Measurement") -> None:
    bits = measured.bits_per_byte
    if measured.windows is None:
        cut = f"documents, rows of {measured.context:,} tokens, {measured.stride:,} new in each after the first"
    else:
        cut = f"{measured.windows:,} windows of {measured.context:,} tokens"
    ends = f"{measured.end_of_text_tokens:,} of them end-of-text ({measured.end_of_text_nats:,.1f} nats, 0 bytes)"
    rows = [
        ("loss", f"{measured.loss:.4f} nats per token"),
        ("perplexity", f"{measured.perplexity:.3f}"),
        (
            "bits per byte",
            "unknown, see docs/evaluation.md" if bits is None else f"{bits:.4f}",
        ),
        ("tokens predicted", f"{measured.tokens:,}; {ends}"),
        ("documents", f"{measured.documents:,}"),
        ("bytes", "unknown" if measured.bytes is None else f"{measured.bytes:,}"),
        ("speed", f"{measured.tokens_s:,.0f} tokens/s, {measured.seconds:.1f} s"),
    ]
    print_table(f"{path}: {cut}", ("", ""), rows)


def _print_tasks(path: Path, tasks: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, figures in tasks.items():
        for metric, value in figures["metrics"].items():
            error = figures["stderr"].get(metric)
            spread = "" if error is None else f"± {error:.4f}"
            counts = ("" if figures[key] is None else str(figures[key]) for key in ("examples", "shots"))
            rows.append((name, metric, f"{value:.4f}", spread, *counts))
    print_table(f"{path}: tasks", ("task", "metric", "value", "stderr", "examples", "shots"), rows)
