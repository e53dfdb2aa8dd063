"""`slm eval`: evaluates a model on text or on tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.calling import call
from slm.cli.console import print_json, print_table, say
from slm.cli.following import after_adapter, after_model, next_step
from slm.cli.options import (
    Artifact,
    FilePath,
    Whole,
    allow_slow_option,
    column_option,
    document_option,
    json_option,
    threads_option,
    trust_option,
)
from slm.cli.task_options import task_options
from slm.core.artifacts import kind_of

if TYPE_CHECKING:
    from slm.runtime.evaluate import Measurement
    from slm.steps.comparison import Comparison
    from slm.steps.evaluating import TextResult


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
def eval(as_json: bool, **options: Any) -> None:
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
    from slm.steps.comparison import BelowMinimum
    from slm.steps.evaluating import TextResult, evaluate

    try:
        result = call(evaluate, **options)
    except BelowMinimum as failed:
        _print_comparison(failed.comparison, as_json)
        raise
    if isinstance(result, TextResult):
        _print(result, as_json)
    else:
        _print_comparison(result, as_json)


def _print(result: "TextResult", as_json: bool) -> None:
    following = _after(result.path)
    if as_json:
        report: dict[str, Any] = {"model": str(result.path), "backend": result.backend}
        if result.text is not None:
            report |= {"data": result.data} | _figures(result.text)
        if result.tasks:
            report["tasks"] = dict(result.tasks)
        print_json(report | {"next": following})
        return
    if result.text is not None:
        _print_measurement(result.path, result.text)
    if result.tasks:
        _print_tasks(result.path, result.tasks)
    next_step(following)


def _print_comparison(compared: "Comparison", as_json: bool) -> None:
    """Prints the results; of a failed check too, without a next command."""
    from slm.cli.task_results import print_results
    from slm.steps.comparison_report import as_dict

    following = {} if compared.failed else {"next": _after(compared.best.path)}
    if as_json:
        print_json(as_dict(compared, rows=False) | {"report": str(compared.page)} | following)
        return
    print_results(compared)
    say(f"report: {compared.page}")
    if following:
        next_step(following["next"])


def _after(path: Path) -> str:
    """Returns the next command for a model or an adapter."""
    return after_adapter(path) if kind_of(path) == "adapter" else after_model(path)


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


def _print_tasks(path: Path, tasks: Mapping[str, dict[str, Any]]) -> None:
    rows = []
    for name, figures in tasks.items():
        for metric, value in figures["metrics"].items():
            error = figures["stderr"].get(metric)
            spread = "" if error is None else f"± {error:.4f}"
            counts = ("" if figures[key] is None else str(figures[key]) for key in ("examples", "shots"))
            rows.append((name, metric, f"{value:.4f}", spread, *counts))
    print_table(f"{path}: tasks", ("task", "metric", "value", "stderr", "examples", "shots"), rows)
