"""`slm train`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

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
    column_option,
    document_option,
    json_option,
    overwrite_option,
    set_option,
)
from slm.core.errors import SlmError
from slm.core.outputs import check_writable
from slm.core.runs import RUNS, free_run, newest_run

if TYPE_CHECKING:
    from slm.train.recipe import Recipe
    from slm.train.run import TrainResult


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
@set_option
@json_option
def train(
    recipe_name: str | None,
    data: tuple[str, ...],
    val: str | None,
    column: str | None,
    max_document_bytes: int | None,
    tokenizer: str | None,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    seed: int | None,
    dry_run: bool,
    gpu: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a model from scratch on text.

    \b
      slm train                                           on the sample stories of slm
      slm train --data stories.txt --val held-out.txt     on your own text
      slm train --data books/ --tokenizer gpt2 --recipe stories-4m
      slm train --set schedule.learning_rate=1e-3 --set model.num_hidden_layers=8
      slm train --resume                                  resume after Ctrl-C
      slm train --recipe modern --dry-run --on t4         estimate time and memory on a T4
      torchrun --nproc-per-node 4 -m slm train --recipe modern

    In a .txt file, a line <|endoftext|> ends a document; in a .jsonl file, every row is {"text": "..."}. The recipe sets
    everything else. The run directory contains the resolved recipe as config.yaml, which --recipe accepts again.

    Writes checkpoint/best and checkpoint/last (Hugging Face format), metrics.jsonl, loss.png and tensorboard/. Ctrl-C
    saves the run and stops; kill -USR1 saves it and continues.
    """
    if gpu is not None and not dry_run:
        raise click.UsageError("--on requires --dry-run")
    if resume:
        given = {
            "--recipe": recipe_name,
            "--data": data,
            "--val": val,
            "--column": column,
            "--max-document-bytes": max_document_bytes,
            "--tokenizer": tokenizer,
            "--seed": seed,
            "--set": overrides,
            "--dry-run": dry_run or None,
            "--on": gpu,
            "--overwrite": overwrite or None,
        }
        unwanted = [option for option, value in given.items() if value not in (None, ())]
        if unwanted:
            raise click.UsageError(f"--resume uses the run's own settings: leave out {', '.join(unwanted)}")
        out = _run_named(out)
        if "RANK" not in os.environ:
            out = out or newest_run()
    elif "RANK" not in os.environ:  # torchrun's processes check together, and report an error once
        _check_recipe(recipe_name, overrides)
        _check_inputs(data, val, tokenizer)
        if not dry_run:
            check_writable(out or RUNS / "run")
    from slm.train import run
    from slm.train.parallel import by_first, joined
    from slm.train.recipe import Recipe

    progress = RichProgress()
    with joined() as processes:
        if resume:
            path = Path(by_first(processes, lambda: str(out or newest_run())))
            if processes.rank == 0:
                say(f"Resuming {path}.")
            result = run.resume(path, progress, processes)
        else:
            reading = {"column": column, "max_document_bytes": max_document_bytes}
            options = (recipe_name, data, val, reading, tokenizer, seed, overrides)
            recipe = Recipe.model_validate(by_first(processes, lambda: _recipe(*options).model_dump(mode="json")))
            if dry_run:
                foresee(recipe, out, gpu, as_json, processes, overwrite=overwrite)
                return
            path = Path(by_first(processes, lambda: str(out or free_run(recipe.name))))
            result = run.train(recipe, path, progress, processes, overwrite=overwrite)
        if processes.rank == 0:
            _report(result, as_json)


def _recipe(
    name: str | None,
    data: tuple[str, ...],
    val: str | None,
    reading: dict[str, str | int | None],
    tokenizer: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
) -> "Recipe":
    """Loads the recipe and applies the options; reports the defaults."""
    from slm.train.recipe import load_recipe

    recipe = load_recipe(name or _chosen_recipe(), overrides)
    options = {"train": data or None, "validation": val, "tokenizer": tokenizer} | reading
    chosen = recipe.data.model_copy(update={key: value for key, value in options.items() if value is not None})
    if not data:
        say(f"Using the data {', '.join(chosen.train)} (of the recipe {recipe.name}; --data names other text).")
    if seed is not None and seed < 0:
        raise SlmError(f"--seed {seed} is negative")
    return recipe.model_copy(update={"data": chosen} | ({} if seed is None else {"seed": seed}))


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


def _check_inputs(data: tuple[str, ...], val: str | None, tokenizer: str | None) -> None:
    """Checks the named files before PyTorch is imported.

    Raises:
        SlmError: When a file is missing or of a kind that cannot be read.
    """
    from slm.core.text.files import find_files, is_dataset
    from slm.train.data.corpus import is_named

    for name in (*data, *([] if val is None else [val])):
        path = Path(name).expanduser()
        if not is_named(name) and not (name in data and is_dataset(path)):
            find_files(path)
    if tokenizer not in (None, "gpt2", "bpe") and not Path(str(tokenizer)).expanduser().exists():
        raise SlmError(f"tokenizer not found: {tokenizer}", "gpt2, bpe, or the path of a tokenizer.json")


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
