"""`slm.train`: a model trained from scratch on text."""

import glob
import os
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slm.core.errors import ArgumentError, SlmError
from slm.core.outputs import check_writable
from slm.core.progress import Progress
from slm.core.runs import RUNS, free_run, newest_run
from slm.steps.arguments import Bytes, LogName, PathArgument, Seed, as_optional_path, as_overrides, changed, step
from slm.steps.bars import shown
from slm.steps.choosing import Note

if TYPE_CHECKING:
    from slm.train.parallel import Processes
    from slm.train.recipe import Recipe
    from slm.train.run import TrainResult

# What a resumed run does not take from its own recipe.
_OF_A_RESUMED_RUN = ("resume", "out")


@step
def train(
    *,
    recipe: PathArgument | None = None,
    data: PathArgument | Sequence[PathArgument] = (),
    val: PathArgument | None = None,
    column: str | None = None,
    max_document_bytes: Bytes | None = None,
    tokenizer: PathArgument | None = None,
    out: PathArgument | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: Seed | None = None,
    qat: Literal["int8", "int4"] | None = None,
    set: Mapping[str, object] | Sequence[str] = (),
    log: Sequence[LogName] = (),
    progress: Progress | bool = True,
) -> "TrainResult":
    """Trains a model from scratch on text (docs/training.md).

    Args:
        recipe: The name of a recipe that ships with slm, or a YAML file; by default documented with a GPU, else tiny.
        data: Files, directories, a prepared dataset, addresses such as s3://bucket/stories, or sample, tinystories or
            hf:OWNER/NAME; by default the recipe's text.
        val: Validation text; by default the data's own split, or its last documents, which are held out.
        column: The name of the text column in rows; "text" by default.
        max_document_bytes: Limit of a row or document; by default 16 MiB.
        tokenizer: "gpt2", "bpe" to learn one from the text, or a tokenizer.json; by default the recipe's.
        out: The run's directory; by default a new runs/RECIPE. With `resume`, the run, or the newest one.
        overwrite: Whether another run in `out` may be replaced.
        resume: Whether to resume a run, with its own settings.
        seed: The random seed; by default the recipe's.
        qat: Train with the rounded values of INT8 or INT4, so that `slm.quantize` changes no weight.
        set: Values that replace the recipe's: {"schedule.epochs": 2}, or texts such as "schedule.epochs=2".
        log: Where metrics, recipe and samples go besides the run's directory: "wandb", "mlflow"; adds to the recipe's.
        progress: True shows a bar, False nothing; or an object with the methods of `slm.core.progress.Progress`.

    Returns:
        The losses and figures. The result stands for the path of the best checkpoint.

    Raises:
        SlmError: If the recipe, the text, the tokenizer or the directory is not usable, or a loss is not finite.
        KeyboardInterrupt: After the run was saved.
    """
    given = {each: value for each, value in locals().items() if each != "progress"}
    display, place = shown(progress), as_optional_path(out)
    if resume:
        _check_resumed(given)
        place = _run_named(place)
        if not launched():
            place = place or newest_run()
    elif not launched():
        check(given)
        check_writable(place or RUNS / "run")
    from slm.train.parallel import by_first, joined
    from slm.train.run import resume as resume_run
    from slm.train.run import train as run

    with joined() as processes:
        if resume:
            path = Path(by_first(processes, lambda: str(place or newest_run())))
            if processes.rank == 0:
                display.note(f"Resuming {path}.")
            return resume_run(path, display, processes)
        chosen = recipe_for(given, processes, display.note)
        begun = by_first(processes, lambda: _begun(place, chosen.name))
        if begun is not None:
            if processes.rank == 0:
                display.note(f"Resuming {begun}, which this call of torchrun began.")
            return resume_run(Path(begun), display, processes)
        path = Path(by_first(processes, lambda: str(place or free_run(chosen.name))))
        return run(chosen, path, display, processes, overwrite=overwrite)


def _begun(out: Path | None, name: str) -> str | None:
    """Returns the run that torchrun began before it restarted its processes; None if it began none."""
    from slm.train.parallel import launch_id
    from slm.train.prepare import begun_by

    launch = launch_id()
    runs = [out] if out is not None else [run for run in sorted(RUNS.glob(f"{glob.escape(name)}*")) if run.is_dir()]
    found = begun_by(launch, runs)
    return None if found is None else str(found)


def launched() -> bool:
    """Returns whether torchrun started this process; its processes check together, and report an error once."""
    return "RANK" in os.environ


def check(given: Mapping[str, Any]) -> None:
    """Checks the recipe and the files of `train` before PyTorch is imported.

    Raises:
        SlmError: If a value of the recipe is wrong, or a file is missing or of a kind that cannot be read.
    """
    from slm.train.logs.logs import check_packages

    _check_recipe(_recipe_name(given), _values(given))
    check_packages(given["log"])
    _check_files(given)


def recipe_for(given: Mapping[str, Any], processes: "Processes", note: Note) -> "Recipe":
    """Returns the recipe for the arguments of `train`, the same in every process.

    Raises:
        SlmError: If a value is wrong.
    """
    from slm.train.parallel import by_first
    from slm.train.recipe import Recipe

    return Recipe.model_validate(by_first(processes, lambda: _recipe(given, note).model_dump(mode="json")))


def fitting_recipe() -> str:
    """Returns the default recipe, which depends on the machine."""
    import torch

    return "documented" if torch.cuda.is_available() else "tiny"


def check_tokenizer(choice: str) -> None:
    """Checks that the file of a tokenizer exists, before anything is loaded.

    Raises:
        SlmError: If the choice is neither gpt2 nor bpe, and no file.
    """
    if choice not in ("gpt2", "bpe") and not Path(choice).expanduser().exists():
        raise SlmError(f"tokenizer not found: {choice}", "gpt2, bpe, or the path of a tokenizer.json")


def _check_resumed(given: Mapping[str, Any]) -> None:
    """Rejects arguments that a resumed run would ignore."""
    unwanted = [name for name in changed(train, given) if name not in _OF_A_RESUMED_RUN]
    if unwanted:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unwanted)
        raise ArgumentError(f"--resume uses the run's own settings: leave out {options}")


def _recipe_name(given: Mapping[str, Any]) -> str | None:
    return None if given["recipe"] is None else fspath(given["recipe"])


def _texts(given: Mapping[str, Any]) -> tuple[str, ...]:
    data = given["data"]
    return tuple(map(fspath, [data] if isinstance(data, str | PathLike) else data))


def _values(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the values that replace the recipe's, as of --set."""
    return (*as_overrides(given["set"]), *([] if given["qat"] is None else [f"qat.precision={given['qat']}"]))


def _recipe(given: Mapping[str, Any], note: Note) -> "Recipe":
    """Loads the recipe and applies the arguments; reports the defaults."""
    from slm.train.recipe import load_recipe

    recipe = load_recipe(_recipe_name(given) or _chosen_recipe(note), _values(given))
    texts, files = _texts(given), {name: given[name] for name in ("val", "tokenizer")}
    options = {
        "train": texts or None,
        "validation": None if files["val"] is None else fspath(files["val"]),
        "tokenizer": None if files["tokenizer"] is None else fspath(files["tokenizer"]),
        "column": given["column"],
        "max_document_bytes": given["max_document_bytes"],
    }
    data = recipe.data.model_copy(update={key: value for key, value in options.items() if value is not None})
    if not texts:
        note(f"Using the data {', '.join(data.train)} (of the recipe {recipe.name}; --data names other text).")
    seed, logs = given["seed"], tuple(dict.fromkeys((*recipe.log, *given["log"])))
    return recipe.model_copy(update={"data": data, "log": logs} | ({} if seed is None else {"seed": seed}))


def _chosen_recipe(note: Note) -> str:
    """Returns the default recipe, and reports the reason."""
    name = fitting_recipe()
    if name == "documented":
        note("Using the recipe documented (this machine has a GPU).")
    else:
        note(
            "Using the recipe tiny (this machine has no GPU). slm train --recipe documented --dry-run estimates how long the "
            "270M model would take here."
        )
    return name


def _run_named(out: Path | None) -> Path | None:
    """Returns the run to resume: a path, or the name of a run under ./runs."""
    if out is None or out.exists() or out.is_absolute() or not (RUNS / out).is_dir():
        return out
    return RUNS / out


def _check_files(given: Mapping[str, Any]) -> None:
    from slm.core.text.files import find_files, is_dataset
    from slm.train.data.corpus import is_named
    from slm.train.data.remote.locations import file_system, is_remote, without_file_protocol

    texts, validation = _texts(given), given["val"]
    for name in (*texts, *([] if validation is None else [fspath(validation)])):
        path = Path(without_file_protocol(name)).expanduser()
        if is_remote(name):
            file_system(name)
        elif not is_named(name) and not (name in texts and is_dataset(path)):
            find_files(path)
    if given["tokenizer"] is not None:
        check_tokenizer(fspath(given["tokenizer"]))


def _check_recipe(name: str | None, overrides: tuple[str, ...]) -> None:
    """Checks the recipe.

    The default recipe depends on the GPU, which only PyTorch can find: without a name, this rejects values that neither of
    the two recipes accepts.
    """
    from slm.train.recipe import load_recipe

    if name is not None:
        load_recipe(name, overrides)
        return
    try:
        load_recipe("tiny", overrides)
    except SlmError as error:
        try:
            load_recipe("documented", overrides)
        except SlmError:
            raise error from None
