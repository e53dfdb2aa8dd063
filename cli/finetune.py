"""`slm finetune`: LoRA on a file of rows."""

from dataclasses import asdict
from pathlib import Path

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.options import Artifact, json_option, out_option, seed_option
from slm.core.errors import SlmError
from slm.core.runs import newest_checkpoint, run_of


@click.command()
@click.option(
    "--lora",
    "data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Rows to learn, as JSON lines or one JSON array.",
)
@click.option(
    "--base",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="What to fine-tune; the newest when left out.",
)
@click.option(
    "--val",
    "validation",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rows to measure the loss on; the last tenth of FILE when left out.",
)
@out_option
@click.option("--name", metavar="NAME", help="The adapter's name in its run; the file's when left out.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that is already there.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Rank of the adapter's matrices.")
@click.option("--alpha", type=click.IntRange(1), default=16, show_default=True, help="Scale: alpha / rank.")
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="On the adapter's inputs.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="Peak rate; chosen by the model's width when left out.",
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the rows; chosen by their number when left out.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Rows in an update.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Tokens of a row; 512 or the context when left out.",
)
@seed_option
@json_option
def finetune(
    data: Path,
    base: Path | None,
    validation: Path | None,
    out: Path | None,
    name: str | None,
    overwrite: bool,
    rank: int,
    alpha: int,
    dropout: float,
    learning_rate: float | None,
    epochs: int | None,
    batch_size: int,
    max_length: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune a checkpoint with LoRA: a small adapter beside it, the checkpoint itself unchanged.

    \b
    A row is one of
      {"instruction": "Name a colour.", "output": "Blue."}       with "input" if it needs one
      {"prompt": "The sky is", "completion": " blue."}
      {"text": "Once upon a time there was a blue sky."}

    Only the answer is learned: the output, the completion or the whole text, and always the token that ends it. An
    instruction is put into Gemma's turns, the form in which a chat will ask.

    \b
      slm finetune --lora pairs.jsonl                      -> RUN/adapters/pairs
      slm export --onnx --adapter RUN/adapters/pairs       merges it and exports
    """
    if out is not None and name is not None:
        raise click.UsageError("--out is the adapter's directory and --name a name in the run: give one of them")
    if base is None:
        base = newest_checkpoint()
        say(f"no --base named: the newest, {base}")
    if out is None:
        out = run_of(base) / "adapters" / _checked(data.stem if name is None else name)

    from slm.finetune.lora import finetune as run
    from slm.finetune.settings import LoraSettings

    settings = LoraSettings.checked(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    result = run(base, data, out, settings, RichProgress(), validation=validation, overwrite=overwrite)
    if as_json:
        print_json({key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()})
        return
    measured = f"on {result.validation_rows} rows held out" if result.validation_rows else "on the training rows"
    rows = [
        ("loss", f"{result.loss_before:.3f} -> {result.loss_after:.3f} nats a token {measured}"),
        ("rows", f"{result.rows} ({result.truncated} cut, {result.skipped} left out)"),
        ("learned tokens", f"{result.trained_tokens:,} an epoch"),
        ("kept", f"epoch {result.best_epoch} of {result.epochs}"),
        ("parameters", f"{result.trainable_parameters:,}"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    print_table(f"adapter {result.adapter}", ("", ""), rows)


def _checked(name: str) -> str:
    """Returns a name that is one directory in the run."""
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise SlmError(f"{name!r} cannot name an adapter", "a name has no / in it and does not begin with a dot")
    return name
