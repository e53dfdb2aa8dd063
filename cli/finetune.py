"""`slm finetune`: an adapter, or all weights, on a file of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from slm.cli.choosing import default_checkpoint
from slm.cli.console import RichProgress, one_line, print_json, print_lines, print_table
from slm.cli.following import after_adapter, after_checkpoint, next_step
from slm.cli.options import (
    REPLACING,
    Artifact,
    ByteCount,
    FilePath,
    Real,
    Whole,
    check_input,
    document_option,
    json_option,
    out_option_for,
    seed_option,
)
from slm.core.errors import SlmError
from slm.core.outputs import check_writable
from slm.core.runs import RUNS, run_of
from slm.core.text.files import bare_name

if TYPE_CHECKING:
    from slm.finetune.samples import Sample

_FILE = FilePath()
# What only an adapter has.
_OF_ADAPTERS = ("rank", "alpha", "rslora", "dora", "dropout", "targets")


@click.command(epilog=REPLACING)
@click.option("--lora", "lora", type=_FILE, metavar="FILE", help="Train a LoRA adapter on the rows of FILE.")
@click.option("--full", "full", type=_FILE, metavar="FILE", help="Train every weight on the rows of FILE instead.")
@click.option(
    "--base",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="What to fine-tune; the newest when left out.",
)
@click.option(
    "--val",
    "validation",
    type=_FILE,
    metavar="FILE",
    help="Rows to measure the loss on. [default: a tenth of FILE's rows, drawn with the seed]",
)
@click.option("--skip-bad", is_flag=True, help="Leave rows out that are not as they should be, and count them.")
@out_option_for("adapter, or the run with --full", "RUN/adapters/FILE, or runs/RUN-FILE")
@click.option("--name", metavar="NAME", help="The adapter's name in its run; the file's when left out.")
@click.option(
    "--overwrite", is_flag=True, help="Replace what is already there; drop an interrupted run of other values."
)
@click.option("--rank", type=Whole(1, 4096), default=8, show_default=True, help="Rank of the adapter's matrices.")
@click.option("--alpha", type=Whole(1, 1_000_000), default=16, show_default=True, help="Scale: alpha / rank.")
@click.option("--rslora", is_flag=True, help="Scale: alpha / sqrt(rank), for high ranks.")
@click.option("--dora", is_flag=True, help="Learn magnitudes beside directions (DoRA).")
@click.option(
    "--dropout",
    type=Real(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="On the adapter's inputs.",
)
@click.option(
    "--targets",
    metavar="NAME,...",
    help="Projections with an adapter. [default: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
)
@click.option(
    "--learning-rate",
    type=Real(0, 100, min_open=True),
    help="Peak rate; chosen by the model's width when left out.",
)
@click.option("--epochs", type=Whole(1, 1_000_000), help="Passes over the rows; chosen by their number when left out.")
@click.option(
    "--patience",
    type=Whole(0, 1_000_000),
    default=3,
    show_default=True,
    help="End after so many passes without a new best; 0 goes on to the end, as --keep last does.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Keep the epoch with the lowest held-out loss, or the last one.",
)
@click.option("--batch-size", type=Whole(1, 65_536), default=8, show_default=True, help="Rows in an update.")
@click.option("--pack", is_flag=True, help="Fill every row up to --max-length with several examples, kept apart.")
@click.option(
    "--max-length",
    type=Whole(2),
    help="Tokens of a row; 512 or the context when left out.",
)
@document_option
@click.option(
    "--max-data-bytes",
    type=ByteCount(),
    metavar="SIZE",
    help="Refuse more rows than take so much memory. [default: 512MiB]",
)
@click.option(
    "--samples",
    type=Whole(0, 100),
    default=3,
    show_default=True,
    metavar="N",
    help="Answer N held-out rows at the end and show the answers; 0 shows none.",
)
@seed_option
@json_option
def finetune(
    lora: Path | None,
    full: Path | None,
    base: Path | None,
    validation: Path | None,
    skip_bad: bool,
    out: Path | None,
    name: str | None,
    overwrite: bool,
    targets: str | None,
    patience: int,
    max_document_bytes: int | None,
    max_data_bytes: int | None,
    samples: int,
    as_json: bool,
    **values: Any,
) -> None:
    """Fine-tune a checkpoint: with LoRA a small adapter beside it, in full another checkpoint; itself unchanged.

    FILE has JSON lines, one JSON array, CSV with a line of names, Parquet or text, compressed or not; or is a directory.

    \b
    A row is one of
      {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
      {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
      {"instruction": "Name a colour.", "output": "Blue."}       with "input" if it needs one
      {"prompt": "The sky is", "completion": " blue."}
      {"text": "Once upon a time there was a blue sky."}

    Only the answers are learned: every turn of the assistant's (unless its "weight" is 0), the output, the completion or
    the whole text, and always the token that ends it. Conversations and instructions are put into the turns in which a
    chat will ask. A run that was interrupted goes on when the same command is given again.

    \b
      slm finetune --lora pairs.jsonl                      -> RUN/adapters/pairs
      slm export --onnx --adapter RUN/adapters/pairs       merges it and exports
      slm finetune --full pairs.jsonl                      -> runs/RUN-pairs/checkpoint/best
    """
    data = lora or full
    if data is None or (lora is not None and full is not None):
        raise click.UsageError("give --lora FILE or --full FILE")
    if out is not None and name is not None:
        raise click.UsageError("--out is the directory and --name a name in the run: give one of them")
    source = click.get_current_context().get_parameter_source
    if values["keep"] == "last" and patience and source("patience") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--patience goes with --keep best: --keep last trains all epochs")
    if full is not None:
        given = [option for option in _OF_ADAPTERS if source(option) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"--{given[0]} is an adapter's, and --full trains none")
    for each in (data, validation):
        if each is not None:
            check_input(each, "fine-tuning data")
    if base is None:
        base = default_checkpoint()
    if out is None:
        out = _place(base, _checked(bare_name(data) if name is None else name), full=full is not None)
    check_writable(out)

    from slm.finetune.rows import Limits
    from slm.finetune.run import finetune as run
    from slm.finetune.settings import FinetuneSettings

    chosen = {} if targets is None else {"target_modules": [each.strip() for each in targets.split(",")]}
    settings = FinetuneSettings.checked(
        method="lora" if full is None else "full", patience=patience or None, **chosen, **values
    )
    result = run(
        base,
        data,
        out,
        settings,
        RichProgress(),
        validation=validation,
        overwrite=overwrite,
        skip_bad=skip_bad,
        limits=Limits.checked(max_document_bytes, max_data_bytes),
        samples=samples,
    )
    made = "adapter" if full is None else "checkpoint"
    following = after_adapter(result.made) if full is None else after_checkpoint(result.made)
    if as_json:
        report = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}
        print_json({made: report.pop("made"), **report, "next": following})
        return
    print_table(f"{made} {result.made}", ("", ""), _lines(asdict(result), settings.keep))
    _show(result.samples)
    next_step(following)


def _show(samples: "Sequence[Sample]") -> None:
    """Prints what the result answers."""
    if not samples:
        return
    which = "held-out rows" if samples[0].held_out else "rows that were trained on"
    print_lines(f"greedy answers to {which}")
    for sample in samples:
        texts = (("prompt", sample.prompt), ("wanted", sample.wanted), ("answered", sample.answered))
        print_lines("", *(f"  {name + ':':9} {one_line(text)}" for name, text in texts))


def _lines(result: Mapping[str, Any], keep: str) -> list[tuple[str, str]]:
    held_out = result["validation_rows"]
    measured = f"on {held_out} rows held out" if held_out else "on the training rows"
    bad = f", {result['bad']} bad" if result["bad"] else ""
    return [
        ("loss", f"{result['loss_before']:.3f} -> {result['loss_after']:.3f} nats a token {measured}"),
        ("rows", f"{result['rows']} ({result['truncated']} cut, {result['skipped']} left out{bad})"),
        ("learned tokens", f"{result['trained_tokens']:,} an epoch"),
        ("kept", f"epoch {result['kept_epoch']} of {result['epochs']}, {_why(result, keep)}"),
        ("parameters", f"{result['trainable_parameters']:,}"),
        ("time", f"{result['seconds']:.1f} s"),
    ]


def _why(result: Mapping[str, Any], keep: str) -> str:
    """Says why an epoch is kept."""
    which = "held-out" if result["validation_rows"] else "training rows'"
    if keep == "best":
        return f"the one with the lowest {which} loss"
    return "the last" + (
        "" if result["best_epoch"] == result["kept_epoch"] else f" (the best was {result['best_epoch']})"
    )


def _place(base: Path, name: str, *, full: bool) -> Path:
    """Returns where an adapter lies in the base's run, or another run with a checkpoint beside it."""
    run = run_of(base)
    if not full:
        return run / "adapters" / name
    return RUNS / f"{run.name if run.parent == RUNS else base.resolve().name}-{name}"


def _checked(name: str) -> str:
    """Returns a name that is one directory in the run."""
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise SlmError(f"{name!r} cannot name an adapter", "a name has no / in it and does not begin with a dot")
    return name
