"""`slm finetune`: trains an adapter, or all weights, on a file of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.calling import call
from slm.cli.console import one_line, print_json, print_lines, print_table
from slm.cli.finetune_foresight import foresee
from slm.cli.following import after_adapter, after_checkpoint, next_step
from slm.cli.options import (
    REPLACING,
    Artifact,
    ByteCount,
    FilePath,
    Percentage,
    Real,
    Whole,
    document_option,
    is_given,
    json_option,
    log_option,
    out_option_for,
    qat_option,
    seed_option,
    set_option,
)
from slm.core.artifacts import kind_of
from slm.core.metrics.intervals import Interval, score_text
from slm.core.metrics.scoring import METRICS
from slm.core.task import METRICS as METRIC_NAMES

if TYPE_CHECKING:
    from slm.finetune.run import FinetuneResult
    from slm.finetune.samples import Sample

_FILE = FilePath()


@click.command(epilog=REPLACING)
@click.option(
    "--recipe",
    type=_FILE,
    metavar="FILE",
    help="Take the settings from a .yaml file, such as the config.yaml of an adapter; other options override it.",
)
@set_option
@click.option("--lora", "lora", type=_FILE, metavar="FILE", help="Train a LoRA adapter on the rows of FILE.")
@click.option("--full", "full", type=_FILE, metavar="FILE", help="Train every weight on the rows of FILE instead.")
@click.option(
    "--base",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="Base to fine-tune. [default: the newest checkpoint in ./runs, or the bundled demo model]",
)
@click.option(
    "--val",
    type=_FILE,
    metavar="FILE",
    help="Held-out rows, on which the loss is measured.",
)
@click.option(
    "--hold-out",
    type=Percentage(),
    metavar="SHARE",
    help="Share of FILE's rows to hold out, drawn with the seed, such as 20%. [default: 10%; none of fewer than 200 rows]",
)
@click.option(
    "--teacher",
    type=Artifact(bundles=False),
    metavar="CHECKPOINT",
    help="Learn the predictions of this larger model with the same tokenizer; it also answers rows that end with a request.",
)
@click.option("--skip-bad", is_flag=True, help="Skip and count bad rows instead of failing.")
@out_option_for("adapter, or the run with --full", "RUN/adapters/FILE, or runs/RUN-FILE")
@click.option("--name", metavar="NAME", help="Name of the adapter in its run. [default: FILE's name]")
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing result; discard an interrupted run with other settings."
)
@click.option("--rank", type=Whole(1, 4096), default=8, show_default=True, help="Rank of the adapter's matrices.")
@click.option(
    "--alpha", type=Whole(1, 1_000_000), default=16, show_default=True, help="Scale of the adapter: alpha / rank."
)
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank) instead, for high ranks.")
@click.option("--dora", is_flag=True, help="Train magnitudes separately from directions (DoRA).")
@click.option(
    "--dropout",
    type=Real(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Dropout on the adapter's inputs.",
)
@click.option(
    "--targets",
    metavar="NAME,...",
    help="Projections that get an adapter. [default: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
)
@click.option(
    "--learning-rate",
    type=Real(0, 100, min_open=True),
    help="Peak learning rate. [default: depends on the model's width]",
)
@click.option("--epochs", type=Whole(1, 1_000_000), help="Passes over the rows. [default: depends on their number]")
@click.option(
    "--patience",
    type=Whole(0, 1_000_000),
    default=3,
    show_default=True,
    help="Stop after this many epochs without a new best; 0 disables early stopping, as --keep last does.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Keep the epoch with the best --metric, or without it the lowest held-out loss; or the last one.",
)
@click.option(
    "--metric",
    type=click.Choice(METRIC_NAMES),
    help="Score of the replies to the held-out rows after each epoch, as slm eval --task measures it.",
)
@click.option(
    "--metric-rows",
    type=Whole(1, 1_000_000),
    default=200,
    show_default=True,
    metavar="N",
    help="With --metric: most rows to answer, evenly spread.",
)
@click.option("--batch-size", type=Whole(1, 65_536), help="Rows per update. [default: 8, or 4 for fewer than 200 rows]")
@click.option(
    "--pack",
    is_flag=True,
    help="Pack several examples into each row of --max-length; they do not attend to each other.",
)
@click.option(
    "--max-length",
    type=Whole(2),
    help="Maximum tokens of a row. [default: 512, or the context if shorter]",
)
@document_option
@click.option(
    "--max-data-bytes",
    type=ByteCount(),
    metavar="SIZE",
    help="Limit on the memory of all rows. [default: 512MiB]",
)
@click.option(
    "--samples",
    type=Whole(0, 100),
    default=3,
    show_default=True,
    metavar="N",
    help="Number of held-out rows to answer at the end; one or two during training. 0 answers none.",
)
@qat_option
@click.option(
    "--beta",
    type=Real(0, 100, min_open=True),
    default=0.1,
    show_default=True,
    help="For rows with chosen and rejected: higher values keep the model nearer to the base.",
)
@seed_option
@log_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the inputs, show what would be trained, estimate time and memory, and warn; train and write nothing.",
)
@json_option
def finetune(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Fine-tune a checkpoint: train a LoRA adapter, or all weights into a new checkpoint.

    FILE is JSON lines, a JSON array, CSV with a header, Parquet or text, optionally compressed, or a directory of them.

    \b
    A row is one of
      {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
      {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
      {"instruction": "Name a colour.", "output": "Blue."}       with "input" if it needs one
      {"prompt": "The sky is", "completion": " blue."}
      {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}     trained with DPO, against the base
      {"prompt": "The sky is"}     with --teacher, which writes the answer
      {"text": "Once upon a time there was a blue sky."}

    The loss covers every assistant turn (unless its "weight" is 0), the output, the completion or the whole text, and the
    token that ends it. Conversations and instructions are rendered with the model's chat template. The same command
    resumes an interrupted run. The result contains the resolved recipe as config.yaml, which --recipe accepts again.

    \b
      slm finetune --lora pairs.jsonl                      -> RUN/adapters/pairs
      slm finetune --lora pairs.jsonl --dry-run            estimates time and memory
      slm finetune --recipe recipe.yaml --set training.rank=16
      slm export --onnx --adapter RUN/adapters/pairs       merges it and exports
      slm finetune --full pairs.jsonl                      -> runs/RUN-pairs/checkpoint/best
    """
    # Only these override a recipe.
    given = {name: value for name, value in options.items() if is_given(name)}
    if dry_run:
        foresee(given, as_json)
        return
    from slm.steps.finetuning import finetune as run

    _report(call(run, **given), as_json)


def _report(result: "FinetuneResult", as_json: bool) -> None:
    lora = kind_of(result.made) == "adapter"
    made = "adapter" if lora else "checkpoint"
    following = after_adapter(result.made) if lora else after_checkpoint(result.made)
    if as_json:
        report = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(result).items()}
        print_json({made: report.pop("made"), **report, "next": following})
        return
    print_table(f"{made} {result.made}", ("", ""), _lines(asdict(result), result.keep))
    _show(result.samples)
    next_step(following)


def _show(samples: "Sequence[Sample]") -> None:
    """Prints the sample answers."""
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
    before, after = result["preferred_before"], result["preferred_after"]
    unit = "token" if after is None else "pair"
    preferred = [] if after is None else [("chosen answer likelier", f"{before:.1%} -> {after:.1%} {measured}")]
    bad = f", {result['bad']} bad" if result["bad"] else ""
    name = "loss" if result["teacher"] is None else "divergence"
    return [
        (name, f"{result['loss_before']:.3f} -> {result['loss_after']:.3f} nats a {unit} {measured}"),
        *_scored(result, measured),
        *preferred,
        ("rows", f"{result['rows']} ({result['truncated']} cut, {result['skipped']} left out{bad})"),
        ("learned tokens", f"{result['trained_tokens']:,} an epoch"),
        ("kept", f"epoch {result['kept_epoch']} of {result['epochs']}, {_why(result, keep)}"),
        ("parameters", f"{result['trainable_parameters']:,}"),
        ("time", f"{result['seconds']:.1f} s"),
    ]


def _scored(result: Mapping[str, Any], measured: str) -> list[tuple[str, str]]:
    """Returns the row of the metric, if there is one."""
    if result["metric"] is None:
        return []
    after = score_text(result["score_after"], Interval(result["score_low"], result["score_high"]))
    if result["metric_rows"] != (result["validation_rows"] or result["rows"]):
        measured = measured.replace("on ", f"on {result['metric_rows']} of ", 1)
    return [(METRICS[result["metric"]].title, f"{result['score_before']:.1%} -> {after} {measured}, 95 % confidence")]


def _why(result: Mapping[str, Any], keep: str) -> str:
    """Returns the reason why an epoch is kept."""
    which = "held-out" if result["validation_rows"] else "training rows'"
    if keep == "best" and result["metric"] is not None:
        return f"the one with the highest {METRICS[result['metric']].title} (of equal ones, the lowest loss)"
    if keep == "best":
        return f"the one with the lowest {which} loss"
    return "the last" + (
        "" if result["best_epoch"] == result["kept_epoch"] else f" (the best was {result['best_epoch']})"
    )
