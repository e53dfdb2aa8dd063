"""`slm.finetune`: an adapter, or all weights, trained on rows."""

from collections.abc import Mapping, Sequence
from os import fspath
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
    LogName,
    PartialShare,
    PathArgument,
    Range,
    Seed,
    Two,
    as_names,
    as_optional_path,
    as_overrides,
    as_path,
    changed,
    check_input,
    passed,
    step,
)
from slm.steps.bars import shown
from slm.steps.choosing import Note, default_base, foreseen_base, named

if TYPE_CHECKING:
    from slm.finetune.foresight import Foresight
    from slm.finetune.recipe import FinetuneRecipe
    from slm.finetune.run import FinetuneResult

# Options of adapters only.
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dora", "dropout", "targets")

Million = Range(1, 1_000_000)


@step
def finetune(
    lora: PathArgument | None = None,
    *,
    recipe: PathArgument | None = None,
    set: Mapping[str, object] | Sequence[str] = (),
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
    log: Sequence[LogName] = (),
    progress: Progress | bool = True,
) -> "FinetuneResult":
    """Fine-tunes a checkpoint on rows (docs/finetune.md). The same call resumes an interrupted run.

    Args:
        lora: A file or directory of rows, for a LoRA adapter.
        recipe: A YAML file of settings, such as the config.yaml of an adapter. Arguments that are passed override it.
        set: Values that replace the recipe's: {"training.rank": 16}, or texts such as "training.rank=16".
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
        samples: Number of held-out rows to answer at the end, and one or two of them during training; 0 answers none.
        qat: Train with the rounded values of INT8 or INT4, so that `slm.quantize` changes no weight.
        beta: For rows with chosen and rejected: higher values keep the model nearer to the base.
        seed: The same seed gives the same result.
        log: Where metrics, recipe and samples go besides the result: "tensorboard", "wandb", "mlflow"; adds to the recipe's.
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Returns:
        The losses, figures and sample answers. The result stands for the path of the adapter or the checkpoint.

    Raises:
        SlmError: If an input is missing or wrong, options exclude each other, the result exists, or there is nothing to learn.
        KeyboardInterrupt: After the run was saved.
    """
    given = {each: value for each, value in locals().items() if each != "progress"}
    chosen = _recipe({name: given[name] for name in passed() if name in given})
    from slm.finetune.run import finetune as run

    display = shown(progress)
    start = _base(chosen, display.note) or default_base(display.note)
    place = _place(start, chosen)
    check_writable(place)
    teaching = None if chosen.teacher is None else named(chosen.teacher, ("checkpoint",), display.note)
    return run(
        start,
        chosen.files(),
        place,
        chosen.training,
        display,
        overwrite=overwrite,
        samples=chosen.samples,
        log=chosen.log,
        teacher=teaching,
    )


def foresee(*, overwrite: bool = False, progress: Progress | bool = True, **given: Any) -> "Foresight":
    """Returns what `finetune` with these arguments would do, with its time and memory. Writes nothing; see `finetune`."""
    recipe = _recipe(given)
    from slm.finetune.foresight import foresee as measure

    display = shown(progress)
    with foreseen_base(_base(recipe, display.note), display.note) as (base, planned):
        out = _place(planned, recipe)
        check_writable(out)
        teacher = None if recipe.teacher is None else named(recipe.teacher, ("checkpoint",), display.note)
        return measure(recipe, base, planned, out, display, overwrite=overwrite, teacher=teacher)


def _base(recipe: "FinetuneRecipe", note: Note) -> Path | None:
    return None if recipe.base is None else named(recipe.base, ("checkpoint",), note)


def _recipe(given: Mapping[str, Any]) -> "FinetuneRecipe":
    """Returns the recipe with the arguments that were passed, and checks that its files exist, before anything is loaded.

    Raises:
        ArgumentError: If arguments contradict each other.
        SlmError: If a value is wrong, or a file is missing or unreadable.
    """
    file = as_optional_path(given.get("recipe"))
    for one, other in (("lora", "full"), ("val", "hold_out"), ("out", "name")):
        if given.get(one) is not None and given.get(other) is not None:
            raise ArgumentError(f"give either --{one} or --{other.replace('_', '-')}, not both")
    if given.get("name") is not None:
        _checked_name(given["name"])
    from slm.finetune.recipe import load_recipe
    from slm.train.logs.logs import check_packages

    recipe = load_recipe(file, as_overrides(given.get("set", ())), _values(given))
    if recipe.data.train is None and file is None:
        raise ArgumentError("give --lora FILE, --full FILE or --recipe FILE")
    if recipe.training.keep == "last" and given.get("patience"):
        raise ArgumentError("--patience requires --keep best: --keep last trains all epochs")
    if recipe.training.metric is None and given.get("metric_rows") is not None:
        raise ArgumentError("--metric-rows requires --metric")
    chosen = changed(finetune, {name: value for name, value in given.items() if value is not None})
    if recipe.training.method == "full" and (others := [name for name in _OF_ADAPTERS if name in chosen]):
        raise ArgumentError(f"--{others[0]} is an option of adapters, and --full trains none")
    for each in (recipe.train, as_optional_path(recipe.data.validation)):
        if each is not None:
            check_input(each, "fine-tuning data", directories=True)
    recipe = recipe.model_copy(update={"log": tuple(dict.fromkeys((*recipe.log, *given.get("log", ()))))})
    check_packages(recipe.log)
    return recipe


# Arguments with other names in the recipe. The other arguments are fields of `FinetuneSettings`, or not values of a recipe.
_PLACES = {
    "full": "data.train",
    "lora": "data.train",
    "val": "data.validation",
    "hold_out": "data.hold_out",
    "skip_bad": "data.skip_bad",
    "max_document_bytes": "data.max_document_bytes",
    "max_data_bytes": "data.max_data_bytes",
    "base": "base",
    "teacher": "teacher",
    "out": "out",
    "name": "name",
    "samples": "samples",
    "targets": "training.target_modules",
}


def _values(given: Mapping[str, Any]) -> dict[str, object]:
    """Returns arguments as values of a recipe, by their dotted names."""
    from slm.finetune.settings import FinetuneSettings

    values: dict[str, object] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _PLACES:
            path = name in ("lora", "full", "val", "base", "teacher", "out")
            values[_PLACES[name]] = fspath(as_path(value)) if path else value
        elif name in FinetuneSettings.model_fields:
            values[f"training.{name}"] = value
    for method in ("lora", "full"):
        if given.get(method) is not None:
            values["training.method"] = method
    if given.get("targets") is not None:
        values["training.target_modules"] = as_names(given["targets"])
    return values


def _place(base: Path, recipe: "FinetuneRecipe") -> Path:
    """Returns the output: by default a directory in the base's run for an adapter, a new run for a checkpoint."""
    if recipe.out is not None:
        return Path(recipe.out).expanduser()
    rows = recipe.train.resolve() if recipe.train.name in ("", "..") else recipe.train  # "." has the directory's name
    name, run = _checked_name(bare_name(rows) if recipe.name is None else recipe.name), run_of(base)
    if recipe.training.method == "lora":
        return run / "adapters" / name
    return RUNS / f"{run.name if run.parent == RUNS else base.resolve().name}-{name}"


def _checked_name(name: str) -> str:
    """Returns a name after checking that it is a single path component."""
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise SlmError(f"{name!r} cannot name an adapter", "a name has no / in it and does not begin with a dot")
    return name
