"""`slm.finetune`: an adapter, or all weights, trained on rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slm.core.errors import ArgumentError, SlmError
from slm.core.outputs import check_writable
from slm.core.progress import Progress
from slm.core.runs import RUNS, run_of
from slm.core.task import MetricName
from slm.core.text.files import bare_name
from slm.steps.arguments import (
    Bytes,
    PartialShare,
    PathArgument,
    Range,
    Seed,
    Two,
    as_names,
    as_optional_path,
    changed,
    check_input,
    step,
)
from slm.steps.bars import shown
from slm.steps.choosing import default_base, named

if TYPE_CHECKING:
    from slm.finetune.run import FinetuneResult
    from slm.finetune.settings import FinetuneSettings

# Options of adapters only.
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dora", "dropout", "targets")

Million = Range(1, 1_000_000)


@step
def finetune(
    lora: PathArgument | None = None,
    *,
    full: PathArgument | None = None,
    base: PathArgument | None = None,
    val: PathArgument | None = None,
    hold_out: PartialShare | None = None,
    teacher: PathArgument | None = None,
    skip_bad: bool = False,
    out: PathArgument | None = None,
    name: str | None = None,
    overwrite: bool = False,
    rank: Annotated[int, Range(1, 4096)] = 8,
    alpha: Annotated[int, Million] = 16,
    rslora: bool = False,
    dora: bool = False,
    dropout: Annotated[float, Range(0, 1, most_open=True)] = 0.0,
    targets: str | Sequence[str] | None = None,
    learning_rate: Annotated[float, Range(0, 100, least_open=True)] | None = None,
    epochs: Annotated[int, Million] | None = None,
    patience: Annotated[int, Range(0, 1_000_000)] = 3,
    keep: Literal["best", "last"] = "best",
    metric: MetricName | None = None,
    metric_rows: Annotated[int, Million] = 200,
    batch_size: Annotated[int, Range(1, 65_536)] | None = None,
    pack: bool = False,
    max_length: Two | None = None,
    max_document_bytes: Bytes | None = None,
    max_data_bytes: Bytes | None = None,
    samples: Annotated[int, Range(0, 100)] = 3,
    qat: Literal["int8", "int4"] | None = None,
    beta: Annotated[float, Range(0, 100, least_open=True)] = 0.1,
    seed: Seed = 0,
    progress: Progress | bool = True,
) -> "FinetuneResult":
    """Fine-tunes a checkpoint on rows (docs/finetune.md). The same call resumes an interrupted run.

    Args:
        lora: A file or directory of rows, for a LoRA adapter.
        full: A file or directory of rows, to train all weights instead.
        base: The checkpoint; by default the newest one under ./runs, or the bundled demo model.
        val: Held-out rows, on which the loss is measured.
        hold_out: The share of the rows to hold out, drawn with the seed; by default a tenth, or none of fewer than 200 rows.
        teacher: A checkpoint with the same tokenizer, usually a larger model: its predictions are learned, and it answers rows
            that end with a request.
        skip_bad: Whether to skip and count bad rows instead of raising an error.
        out: The adapter's directory, or the run with `full`; by default RUN/adapters/FILE, or runs/RUN-FILE.
        name: The name of the adapter in its run, instead of the file's.
        overwrite: Whether to replace an existing result, and to discard an interrupted run with other settings.
        rank: Rank of the adapter's matrices.
        alpha: Scale of the adapter: alpha / rank.
        rslora: Whether to scale by alpha / sqrt(rank) instead.
        dora: Whether to train magnitudes separately from directions (DoRA).
        dropout: Dropout on the adapter's inputs.
        targets: Projections that get an adapter, as a list or with commas; by default all seven.
        learning_rate: Peak learning rate; by default it depends on the model's width.
        epochs: Passes over the rows; by default it depends on their number.
        patience: Epochs without a new best after which training ends; 0 disables early stopping.
        keep: The epoch to keep: the one with the best `metric`, or without it the lowest held-out loss; or the last one.
        metric: Score of the replies to the held-out rows after each epoch, as `slm.evaluate` measures it.
        metric_rows: With `metric`: the most rows to answer, evenly spread.
        batch_size: Rows per update; by default 8, or 4 for fewer than 200 rows.
        pack: Whether to pack several examples into each row of `max_length` tokens.
        max_length: Maximum tokens of a row; by default 512, or the context if shorter.
        max_document_bytes: Limit of a row; by default 16 MiB.
        max_data_bytes: Limit of the memory of all rows; by default 512 MiB.
        samples: Number of held-out rows to answer at the end.
        qat: Train with the rounded values of INT8 or INT4, so that `slm.quantize` changes no weight.
        beta: For rows with chosen and rejected: higher values keep the model nearer to the base.
        seed: The same seed gives the same result.
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Returns:
        The losses, figures and sample answers. The result stands for the path of the adapter or the checkpoint.

    Raises:
        SlmError: If an input is missing or wrong, options exclude each other, the result exists, or there is nothing to learn.
        KeyboardInterrupt: After the run was saved.
    """
    given = {each: value for each, value in locals().items() if each != "progress"}
    data = _check(given)
    from slm.finetune.preparation import RowFiles
    from slm.finetune.rows import Limits
    from slm.finetune.run import finetune as run

    limits = Limits.checked(max_document_bytes, max_data_bytes)
    files = RowFiles(data, as_optional_path(val), hold_out, skip_bad, limits)
    display = shown(progress)
    start = default_base(display.note) if base is None else named(base, ("checkpoint",), display.note)
    place = as_optional_path(out)
    if place is None:
        place = _place(start, _checked_name(bare_name(data) if name is None else name), full=full is not None)
    check_writable(place)
    teaching = None if teacher is None else named(teacher, ("checkpoint",), display.note)
    settings = _settings(given)
    return run(start, files, place, settings, display, overwrite=overwrite, samples=samples, teacher=teaching)


def _settings(given: Mapping[str, Any]) -> "FinetuneSettings":
    """Returns the hyperparameters: every argument of `finetune` that is a field of the settings, under the same name."""
    from slm.finetune.settings import FinetuneSettings

    fields = {name: value for name, value in given.items() if name in FinetuneSettings.model_fields}
    fields |= {"method": "lora" if given["full"] is None else "full"}
    fields |= {"patience": given["patience"] or None, "qat": given["qat"] or "none"}
    if given["targets"] is not None:
        fields["target_modules"] = as_names(given["targets"])
    return FinetuneSettings.checked(**fields)


def _check(given: Mapping[str, Any]) -> Path:
    """Checks the options against each other, and that the files exist, before anything is loaded; returns the rows' path.

    Raises:
        ArgumentError: If options contradict each other.
        SlmError: If a file is missing or unreadable.
    """
    lora, full, validation = (as_optional_path(given[name]) for name in ("lora", "full", "val"))
    if validation is not None and given["hold_out"] is not None:
        raise ArgumentError("give --val FILE or --hold-out SHARE, not both")
    data = lora or full
    if data is None or (lora is not None and full is not None):
        raise ArgumentError("give --lora FILE or --full FILE")
    if given["out"] is not None and given["name"] is not None:
        raise ArgumentError("give --out DIR or --name NAME, not both")
    chosen = changed(finetune, given)
    if given["keep"] == "last" and given["patience"] and "patience" in chosen:
        raise ArgumentError("--patience requires --keep best: --keep last trains all epochs")
    if given["metric"] is None and "metric_rows" in chosen:
        raise ArgumentError("--metric-rows requires --metric")
    if full is not None and (others := [name for name in _OF_ADAPTERS if name in chosen]):
        raise ArgumentError(f"--{others[0]} is an option of adapters, and --full trains none")
    for each in (data, validation):
        if each is not None:
            check_input(each, "fine-tuning data", directories=True)
    return data


def _place(base: Path, name: str, *, full: bool) -> Path:
    """Returns the default output: a directory in the base's run for an adapter, a new run for a checkpoint."""
    run = run_of(base)
    if not full:
        return run / "adapters" / name
    return RUNS / f"{run.name if run.parent == RUNS else base.resolve().name}-{name}"


def _checked_name(name: str) -> str:
    """Returns a name after checking that it is a single path component."""
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise SlmError(f"{name!r} cannot name an adapter", "a name has no / in it and does not begin with a dot")
    return name
