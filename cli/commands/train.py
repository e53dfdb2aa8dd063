"""`slm train`."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import RichProgress, one_line, print_json, print_lines, print_table, say
from slm.cli.following import after_checkpoint, next_step
from slm.cli.foresight import foresee
from slm.cli.options import (
    MAX_SEED,
    REPLACING,
    FilePath,
    Whole,
    Word,
    check_logs,
    check_tokenizer,
    collects,
    column_option,
    document_option,
    json_option,
    log_option,
    overwrite_option,
    qat_option,
    set_option,
)
from slm.core.errors import SlmError
from slm.core.outputs import check_writable
from slm.core.runs import RUNS, free_run, newest_run

if TYPE_CHECKING:
    from slm.train.choices import LogName
    from slm.train.parallel import Processes
    from slm.train.recipe import Recipe
    from slm.train.run import TrainResult


@dataclass(frozen=True)
class RecipeOptions:
    """The recipe, and changes of it."""

    recipe_name: str | None
    overrides: tuple[str, ...]
    qat: str | None
    seed: int | None
    logs: tuple["LogName", ...]

    @property
    def values(self) -> tuple[str, ...]:
        """The values that replace the recipe's, as of --set."""
        return self.overrides if self.qat is None else (*self.overrides, f"qat.precision={self.qat}")


@dataclass(frozen=True)
class TextOptions:
    """The text that replaces the recipe's, and how it is read."""

    data: tuple[str, ...]
    val: str | None
    column: str | None
    max_document_bytes: int | None
    tokenizer: str | None


@dataclass(frozen=True)
class RunOptions:
    """The run directory, and whether it may be replaced or is resumed."""

    out: Path | None
    overwrite: bool
    resume: bool


@dataclass(frozen=True)
class EstimateOptions:
    """Whether to estimate only, and for which GPU; None for this machine."""

    dry_run: bool
    gpu: str | None


@click.command(epilog=REPLACING)
@click.option(
    "--recipe",
    "recipe_name",
    type=Word(),
    metavar="NAME|FILE",
    help="documented, modern, stories-4m, tiny, or a .yaml file. [default: documented with a GPU, else tiny]",
)
@click.option(
    "--data",
    type=Word(),
    multiple=True,
    metavar="PATH|NAME",
    help="Training text: .txt, .jsonl or .parquet files or directories (repeatable), a dataset of slm data prepare, or "
    "sample, tinystories or hf:OWNER/NAME. [default: the recipe's]",
)
@click.option(
    "--val",
    type=Word(),
    metavar="PATH",
    help="Validation text. [default: the data's own split, or its last documents, which are held out]",
)
@column_option
@document_option
@click.option(
    "--tokenizer",
    type=Word(),
    metavar="gpt2|bpe|FILE",
    help="GPT-2's tokenizer, one learned from the text, or a tokenizer.json. [default: the recipe's]",
)
@click.option("--out", type=FilePath(), metavar="DIR", help="Run directory. [default: a new runs/RECIPE]")
@overwrite_option
@click.option("--resume", is_flag=True, help="Resume the run in --out, or the newest run in ./runs.")
@click.option(
    "--seed", type=Whole(0, MAX_SEED), help="Random seed; the same seed gives the same model. [default: the recipe's]"
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the inputs, estimate time and memory, and warn about settings; train nothing.",
)
@click.option("--on", "gpu", metavar="GPU", help="With --dry-run: estimate for another GPU: t4, l4, a100, h100, …")
@qat_option
@set_option
@log_option
@json_option
@collects("chosen", RecipeOptions)
@collects("text", TextOptions)
@collects("run", RunOptions)
@collects("estimate", EstimateOptions)
def train(chosen: RecipeOptions, text: TextOptions, run: RunOptions, estimate: EstimateOptions, as_json: bool) -> None:
    """Train a model from scratch on text.

    \b
      slm train                                           on the sample stories of slm
      slm train --data stories.txt --val held-out.txt     on your own text
      slm train --data books/ --tokenizer gpt2 --recipe stories-4m
      slm train --set schedule.learning_rate=1e-3 --set model.num_hidden_layers=8
      slm train --qat int4                                for slm quantize --int4, without loss
      slm train --resume                                  resume after Ctrl-C
      slm train --recipe modern --dry-run --on t4         estimate time and memory on a T4
      torchrun --nproc-per-node 4 -m slm train --recipe modern

    In a .txt file, a line <|endoftext|> ends a document; in a .jsonl file, every row is {"text": "..."}. The recipe sets
    everything else. The run directory contains the resolved recipe as config.yaml, which --recipe accepts again.

    Writes checkpoint/best and checkpoint/last (Hugging Face format), metrics.jsonl, loss.png and tensorboard/. --log wandb
    and --log mlflow log to Weights & Biases and MLflow as well, offline if there is no network. Ctrl-C
    saves the run and stops; kill -USR1 saves it and continues.
    """
    if estimate.gpu is not None and not estimate.dry_run:
        raise click.UsageError("--on requires --dry-run")
    out = run.out
    if run.resume:
        _check_resumed(chosen, text, run, estimate)
        out = _run_named(out)
        if not _launched():
            out = out or newest_run()
    elif not _launched():
        _check_recipe(chosen.recipe_name, chosen.values)
        check_logs(chosen.logs)
        _check_inputs(text)
        if not estimate.dry_run:
            check_writable(out or RUNS / "run")
    from slm.train.parallel import by_first, joined
    from slm.train.recipe import Recipe

    with joined() as processes:
        if run.resume:
            result = _resume(out, processes)
        else:
            fields = by_first(processes, lambda: _recipe(chosen, text).model_dump(mode="json"))
            recipe = Recipe.model_validate(fields)
            if estimate.dry_run:
                foresee(recipe, out, estimate.gpu, as_json, processes, overwrite=run.overwrite)
                return
            result = _train(recipe, out, processes, overwrite=run.overwrite)
        if processes.rank == 0:
            _report(result, as_json)


def _launched() -> bool:
    """Returns whether torchrun started this process; its processes check together, and report an error once."""
    return "RANK" in os.environ


def _check_resumed(chosen: RecipeOptions, text: TextOptions, run: RunOptions, estimate: EstimateOptions) -> None:
    """Rejects options that a resumed run would ignore."""
    given: dict[str, Any] = {
        "--recipe": chosen.recipe_name,
        "--data": text.data,
        "--val": text.val,
        "--column": text.column,
        "--max-document-bytes": text.max_document_bytes,
        "--tokenizer": text.tokenizer,
        "--seed": chosen.seed,
        "--qat": chosen.qat,
        "--set": chosen.overrides,
        "--log": chosen.logs,
        "--dry-run": estimate.dry_run or None,
        "--on": estimate.gpu,
        "--overwrite": run.overwrite or None,
    }
    unwanted = [option for option, value in given.items() if value not in (None, ())]
    if unwanted:
        raise click.UsageError(f"--resume uses the run's own settings: leave out {', '.join(unwanted)}")


def _resume(out: Path | None, processes: "Processes") -> "TrainResult":
    from slm.train.parallel import by_first
    from slm.train.run import resume

    path = Path(by_first(processes, lambda: str(out or newest_run())))
    if processes.rank == 0:
        say(f"Resuming {path}.")
    return resume(path, RichProgress(), processes)


def _train(recipe: "Recipe", out: Path | None, processes: "Processes", *, overwrite: bool) -> "TrainResult":
    from slm.train.parallel import by_first
    from slm.train.run import train

    path = Path(by_first(processes, lambda: str(out or free_run(recipe.name))))
    return train(recipe, path, RichProgress(), processes, overwrite=overwrite)


def _recipe(chosen: RecipeOptions, text: TextOptions) -> "Recipe":
    """Loads the recipe and applies the options; reports the defaults."""
    from slm.train.recipe import load_recipe

    recipe = load_recipe(chosen.recipe_name or _chosen_recipe(), chosen.values)
    options = {
        "train": text.data or None,
        "validation": text.val,
        "tokenizer": text.tokenizer,
        "column": text.column,
        "max_document_bytes": text.max_document_bytes,
    }
    data = recipe.data.model_copy(update={key: value for key, value in options.items() if value is not None})
    if not text.data:
        say(f"Using the data {', '.join(data.train)} (of the recipe {recipe.name}; --data names other text).")
    logs = tuple(dict.fromkeys((*recipe.log, *chosen.logs)))
    seed = {} if chosen.seed is None else {"seed": chosen.seed}
    return recipe.model_copy(update={"data": data, "log": logs} | seed)


def fitting_recipe() -> str:
    """Returns the default recipe, which depends on the machine."""
    import torch

    return "documented" if torch.cuda.is_available() else "tiny"


def _chosen_recipe() -> str:
    """Returns the default recipe, and reports the reason."""
    name = fitting_recipe()
    if name == "documented":
        say("Using the recipe documented (this machine has a GPU).")
    else:
        say(
            "Using the recipe tiny (this machine has no GPU). slm train --recipe documented --dry-run estimates how long the "
            "270M model would take here."
        )
    return name


def _run_named(out: Path | None) -> Path | None:
    """Returns the run to resume: a path, or the name of a run under ./runs."""
    if out is None or out.exists() or out.is_absolute() or not (RUNS / out).is_dir():
        return out
    return RUNS / out


def _check_inputs(text: TextOptions) -> None:
    """Checks the named files before PyTorch is imported.

    Raises:
        SlmError: When a file is missing or of a kind that cannot be read.
    """
    from slm.core.text.files import find_files, is_dataset
    from slm.train.data.corpus import is_named

    for name in (*text.data, *([] if text.val is None else [text.val])):
        path = Path(name).expanduser()
        if not is_named(name) and not (name in text.data and is_dataset(path)):
            find_files(path)
    if text.tokenizer is not None:
        check_tokenizer(text.tokenizer)


def _check_recipe(name: str | None, overrides: tuple[str, ...]) -> None:
    """Checks the recipe before PyTorch is imported.

    The default recipe depends on the GPU, which only PyTorch can find: without a name, this rejects values that neither of
    the two recipes accepts.

    Raises:
        SlmError: When there is no such recipe, or a value is wrong.
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


def _report(result: "TrainResult", as_json: bool) -> None:
    from slm.train.closing import closing_samples

    samples = closing_samples(result.run, result.checkpoint)
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}
    following = after_checkpoint(result.checkpoint)
    if as_json:
        print_json(fields | {"samples": [asdict(sample) for sample in samples], "next": following})
        return
    rows = [
        ("checkpoint", str(result.checkpoint)),
        ("validation loss", f"{result.loss_before:.4f} before, {result.loss:.4f} now (nats a token)"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("trained", f"{result.updates:,} updates, {result.tokens:,} tokens"),
        ("text read", _read(result.passes)),
        ("speed", f"{result.tokens_s:,.0f} tokens/s over {result.elapsed_s:,.1f} s"),
        ("peak memory", f"{result.peak_rss_mib:,.0f} MiB"),
    ]
    print_table("trained", ("", ""), rows)
    if samples:
        first = samples[0]
        print_lines(
            f"sample text of the best checkpoint (prompt | text, temperature {first.temperature}, seed {first.seed})"
        )
        for sample in samples:
            print_lines(f"  {one_line(sample.prompt)} | {one_line(sample.text.removeprefix(sample.prompt))}")
    else:
        say("No sample text: loading the model again would take too much memory or time.")
    next_step(following)


def _read(passes: float) -> str:
    return f"{passes:.0%} of the training text" if passes < 0.99 else f"{passes:,.1f} passes over the training text"
