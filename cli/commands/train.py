"""`slm train`."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.calling import call
from slm.cli.console import one_line, print_json, print_lines, print_table, say
from slm.cli.following import after_checkpoint, next_step
from slm.cli.foresight import foresee
from slm.cli.options import (
    REPLACING,
    FilePath,
    Whole,
    Word,
    column_option,
    document_option,
    json_option,
    log_option,
    overwrite_option,
    qat_option,
    set_option,
)
from slm.steps.arguments import MAX_SEED

if TYPE_CHECKING:
    from slm.train.run import TrainResult


@click.command(epilog=REPLACING)
@click.option(
    "--recipe",
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
@click.option("--on", metavar="GPU", help="With --dry-run: estimate for another GPU: t4, l4, a100, h100, …")
@qat_option
@set_option
@log_option
@json_option
def train(dry_run: bool, on: str | None, as_json: bool, **options: Any) -> None:
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
    if on is not None and not dry_run:
        raise click.UsageError("--on requires --dry-run")
    if dry_run:
        _foresee(on, as_json, options)
        return
    from slm.steps.training import train as run

    result = call(run, **options)
    if int(os.environ.get("RANK", "0")) == 0:  # the other processes of torchrun print nothing
        _report(result, as_json)


def _foresee(gpu: str | None, as_json: bool, options: Mapping[str, Any]) -> None:
    """Checks the inputs, and prints the estimate.

    Raises:
        click.UsageError: With --resume.
        SlmError: As training would raise it.
    """
    from slm.steps.training import check, launched, recipe_for
    from slm.train.parallel import joined

    if options["resume"]:
        raise click.UsageError("--resume uses the run's own settings: leave out --dry-run")
    if not launched():
        check(options)
    with joined() as processes:
        recipe = recipe_for(options, processes, say)
        foresee(recipe, options["out"], gpu, as_json, processes, overwrite=options["overwrite"])


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
