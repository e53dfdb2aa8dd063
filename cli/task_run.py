"""`slm eval --task`: which models are measured on which rows, one model after the other."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import RichProgress, say
from slm.cli.options import FilePath, Share, Whole, adapter_type
from slm.cli.task_results import Comparison, Result
from slm.core.artifacts import kind_of, read_artifact
from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.files import sha256_file
from slm.core.manifest import Bundle, is_bundle
from slm.core.runs import RUNS
from slm.core.task import METRICS, MetricName

if TYPE_CHECKING:
    from slm.finetune.task import TaskFile
    from slm.runtime.model import Model


@dataclass(frozen=True)
class RowOptions:
    """The options of --task."""

    task: Path | None
    metric: MetricName | None
    adapters: tuple[Path, ...]
    minimum: float | None
    max_tokens: int | None
    rows_at_once: int | None
    tool_choice: str | None
    out: Path | None

    @property
    def unused(self) -> list[str]:
        """The options that were given and apply to --task only."""
        given = {
            "--metric": self.metric,
            "--adapter": self.adapters,
            "--min": self.minimum,
            "--max-tokens": self.max_tokens,
            "--batch": self.rows_at_once,
            "--tool-choice": self.tool_choice,
            "--out": self.out,
        }
        return [name for name, value in given.items() if value not in (None, ())]

    @property
    def directory(self) -> Path:
        """The directory of the report."""
        assert self.task is not None
        name = self.task.resolve().name.partition(".")[0] or "task"
        return self.out or RUNS / f"eval-{name}"


@dataclass(frozen=True)
class RowLimits:
    """How many rows are used, and the maximum bytes of one; None for all, and for the default."""

    rows: int | None
    row_bytes: int | None


def task_options(command: Any) -> Any:
    """Adds the options of --task to a command."""
    options = (
        click.option(
            "--task",
            type=FilePath(),
            metavar="ROWS",
            help="Rows that slm finetune reads: score the models' replies to them.",
        ),
        click.option(
            "--metric",
            type=click.Choice(METRICS),
            help="Score of a reply to --task: docs/evaluation.md has the definitions. [default: by the rows]",
        ),
        click.option(
            "--adapter",
            "adapters",
            type=adapter_type,
            multiple=True,
            metavar="ADAPTER",
            help="With --task: also evaluate the first MODEL with this adapter; may be repeated.",
        ),
        click.option(
            "--min", "minimum", type=Share(), metavar="SCORE", help="With --task: exit with 1 if a model scores less."
        ),
        click.option(
            "--max-tokens",
            type=Whole(1),
            metavar="N",
            help="With --task: longest reply. [default: twice the longest expected one, from 32 to 1024]",
        ),
        click.option(
            "--batch",
            "rows_at_once",
            type=Whole(1, 64),
            metavar="N",
            help="With --task: rows that a fused bundle answers together; 1 to measure the time of single ones. [default: 8]",
        ),
        click.option(
            "--tool-choice",
            type=click.Choice(["auto", "required"]),
            help="With --task: calls follow the schemas of the row's tools, as in slm serve; required allows only calls. "
            "[default: no constraint]",
        ),
        click.option(
            "--out",
            type=FilePath(),
            metavar="DIR",
            help="With --task: directory of report.html and report.json. [default: runs/eval-NAME, of ROWS]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class _Candidate:
    """A model to measure: a checkpoint or a bundle, with or without an adapter."""

    path: Path
    adapter: Path | None
    name: str


def compare(models: Sequence[Path], options: RowOptions, limits: RowLimits, loading: Mapping[str, Any]) -> Comparison:
    """Measures models on a task, one after the other.

    Args:
        models: Checkpoints, bundles and adapters. An adapter runs on the checkpoint that it was trained on.
        options: The options.
        limits: Limits of the rows.
        loading: The options of `slm.load`.

    Raises:
        SlmError: If a row or a model cannot be used.
    """
    from slm.finetune.rows import Limits
    from slm.finetune.task import read_task

    assert options.task is not None
    bounds = Limits.checked(limits.row_bytes, None)
    file = read_task(options.task, options.metric, limit=limits.rows, limits=bounds)
    task = file.task
    if options.tool_choice is not None:
        _check_choice(options.tool_choice, file)
    if task.why:
        say(f"metric: {task.metric} ({task.why}); --metric chooses another")
    candidates = [_candidate(path) for path in models]
    first = candidates[0]
    if options.adapters and first.adapter is not None:
        raise SlmError(f"{first.adapter} is an adapter, to which --adapter cannot be applied", "name its base first")
    candidates += [_Candidate(first.path, each, f"{first.path} + {each}") for each in options.adapters]
    trained = None if options.task.is_dir() else sha256_file(options.task)
    for each in candidates:
        if trained is not None and _trained_on(_record(each), trained):
            say(f"note: {each.name} was tuned on this file; its score on rows that it has learned says little")
    results = []
    for each in candidates:
        results.append(_measure(each, file, options, loading))
        gc.collect()  # the memory of one model, before the next is loaded
    return Comparison(task, file.total, tuple(results), options.minimum)


def _check_choice(choice: str, file: "TaskFile") -> None:
    """Checks that --tool-choice can constrain the replies.

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


def _candidate(path: Path) -> _Candidate:
    if kind_of(path) != "adapter":
        return _Candidate(path, None, str(path))
    from slm.cli.commands.export import base_of

    if not path.is_dir():
        raise SlmError(f"{path} does not record its base", "slm eval BUNDLE --adapter FILE --task ROWS")
    return _Candidate(base_of(path), path, str(path))


def _measure(each: _Candidate, file: "TaskFile", options: RowOptions, loading: Mapping[str, Any]) -> Result:
    from slm.finetune.examples import Renderer
    from slm.finetune.task import questions
    from slm.loading import load
    from slm.runtime.scheduler import SLOTS
    from slm.runtime.task import measure_task

    model: Model = load(each.path, adapter=each.adapter, **loading)
    say(f"{each.name}: {model.decoder.description}")
    found = questions(file, Renderer(model.tokenizer, model))
    measured = measure_task(
        model,
        found,
        file.task.metric,
        RichProgress(),
        max_tokens=options.max_tokens,
        batch=options.rows_at_once or SLOTS,
        tool_choice=options.tool_choice,
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
