"""`slm trim`."""

import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.choosing import default_checkpoint
from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import after_checkpoint, next_step
from slm.cli.options import (
    REPLACING,
    Artifact,
    Percentage,
    Whole,
    Word,
    collects,
    column_option,
    document_option,
    json_option,
    out_option_for,
    overwrite_option,
)
from slm.core.errors import SlmError
from slm.core.outputs import check_checkpoint_output
from slm.core.processes import peak_rss_mib
from slm.core.runs import trimmed_checkpoint
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slm.interchange.trim.checkpoint import Prove, Trimmed
    from slm.interchange.trim.choice import Wanted
    from slm.interchange.trim.texts import Texts


# The share of the text's tokens that may leave without advice. Text is then spelled with more tokens, which the model has
# rarely seen.
_MANY_LOST = 0.01


@dataclass(frozen=True)
class VocabularyOptions:
    """The options that choose the tokens. Exactly one of `keep` and `coverage` is required."""

    keep: int | None
    coverage: float | None
    also: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks that there is one size.

        Raises:
            click.UsageError: If there is none, or two.
        """
        if (self.keep is None) == (self.coverage is None):
            raise click.UsageError("pass --keep N or --coverage PERCENT, one of them")

    def wanted(self) -> "Wanted":
        """Returns the choice for `trim_checkpoint`."""
        from slm.interchange.trim.choice import Wanted

        return Wanted(self.keep, self.coverage, self.also)


@dataclass(frozen=True)
class TextOptions:
    """The options that choose the texts."""

    data: tuple[str, ...]
    held_out: str | None
    column: str | None
    max_document_bytes: int | None

    def open(self) -> "tuple[Texts, Texts]":
        """Opens the text whose tokens stay and the held-out text, and names both on the console."""
        from slm.interchange.trim.texts import Texts
        from slm.train.data.corpus import Reading, open_corpus

        reading = Reading(self.column or TEXT_COLUMN, limit=self.max_document_bytes or DOCUMENT_BYTES)
        corpus = open_corpus(self.data, self.held_out, reading)
        say(f"text: {corpus.about}")
        about, _, about_held_out = corpus.about.partition("; validation: ")
        held_out = Texts(corpus.validation, about_held_out or corpus.held_out, corpus.counts[1])
        return Texts(corpus.train, about, corpus.counts[0]), held_out


@click.command(epilog=REPLACING)
@click.argument("checkpoint", type=Artifact(bundles=False), required=False)
@click.option(
    "--data",
    type=Word(),
    multiple=True,
    required=True,
    metavar="PATH|NAME",
    help="Text whose tokens stay: files or directories (repeatable), or sample, tinystories or hf:OWNER/NAME.",
)
@click.option(
    "--keep", type=Whole(1), metavar="N", help="Tokens of the new vocabulary, rounded up to a multiple of 64."
)
@click.option(
    "--coverage",
    type=Percentage(),
    metavar="PERCENT",
    help="Instead of --keep: the share of the text's tokens that stay, such as 99.99%.",
)
@click.option(
    "--held-out",
    type=Word(),
    metavar="PATH",
    help="Text that the result is measured on. [default: the data's own split, or some of its documents, which are held out]",
)
@click.option(
    "--keep-token",
    "also",
    type=Word(),
    multiple=True,
    metavar="TOKEN",
    help="Keep this token too, such as a reserved one that a fine-tuning uses (repeatable).",
)
@column_option
@document_option
@out_option_for("checkpoint", "runs/NAME-trimmed/checkpoint/trimmed")
@overwrite_option
@json_option
@collects("vocabulary", VocabularyOptions)
@collects("texts", TextOptions)
def trim(
    checkpoint: Path | None,
    vocabulary: VocabularyOptions,
    texts: TextOptions,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint with only the tokens that a text needs; it runs, fine-tunes and exports as before.

    Bytes, characters, special tokens and turns of conversations always stay, so that any text can be encoded. Text whose
    tokens all stay is split as before, and gets the same logits: both are verified before the checkpoint is written.

    \b
      slm trim --data stories.txt --keep 32768
      slm trim gemma-3-270m --data german/ --coverage 99.99% --held-out german-test.txt
    """
    from slm.interchange.trim.checkpoint import trim_checkpoint

    started = time.perf_counter()
    source = checkpoint or default_checkpoint()
    path = out or trimmed_checkpoint(source)
    if path.resolve() == source.resolve():
        raise SlmError(f"{path} is the checkpoint itself", "choose another --out")
    check_checkpoint_output(path, overwrite=overwrite)
    data, held_out = texts.open()
    progress = RichProgress()
    done = trim_checkpoint(source, path, data, held_out, vocabulary.wanted(), _comparison(progress), progress)
    following = after_checkpoint(path)
    report = _report(source, done) | {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_mib": round(peak_rss_mib(), 1),
    }
    if as_json:
        print_json(report | {"next": following})
        return
    _print(report)
    if (lost := 1 - report["data"]["covered"]) > _MANY_LOST:
        say(
            f"{lost:.1%} of the text's tokens left the vocabulary; a larger --keep, or --coverage 99.9%, predicts text better"
        )
    for notice in done.notices:
        say(notice)
    next_step(following)


def _comparison(progress: RichProgress) -> "Prove | None":
    """Returns the comparison of both models in PyTorch; None, with a message, if PyTorch is not installed."""
    if find_spec("torch") is None:
        say("PyTorch is not installed: logits and bits per byte are not compared, only tensors and pieces.")
        return None

    def compare(source: Path, trimmed: Path, tokenizers: Any, kept: Any, sample: list[str]) -> "Mapping[str, Any]":
        from slm.export.trimmed import compare_trimmed

        return asdict(compare_trimmed(source, trimmed, tokenizers, kept, sample, progress))

    return compare


def _report(source: Path, done: "Trimmed") -> dict[str, Any]:
    choice = done.choice
    texts = {
        name: {
            "bytes": counted.bytes,
            "tokens": [counted.tokens, compared.tokens],
            "tokens_per_byte": [counted.tokens / counted.bytes, compared.tokens / counted.bytes],
            "covered": compared.covered,
            "pieces_changed": compared.changed,
            "texts": counted.parts,
            "texts_changed": compared.parts_changed,
        }
        for name, counted, compared in (
            ("data", done.data, done.data_compared),
            ("held_out", done.held_out, done.held_out_compared),
        )
    }
    return {
        "checkpoint": str(done.path),
        "source": str(source),
        "vocab_size": done.vocab_size,
        "tokens": {
            "required": choice.required,
            "used": choice.used,
            "parts": choice.parts,
            "filled": choice.filled,
            "wanted": choice.wanted,
        },
        "parameters": done.parameters,
        "bytes": done.bytes,
        **texts,
        "proof": dict(done.proof) or None,
        "notices": done.notices,
    }


def _print(report: dict[str, Any]) -> None:
    tokens, held_out, data, proof = (report[name] for name in ("tokens", "held_out", "data", "proof"))
    columns = ("", "before", "after")
    rows = [
        ("tokens in the vocabulary", *(f"{size:,}" for size in report["vocab_size"])),
        ("parameters", *(f"{count:,}" for count in report["parameters"])),
        ("weights, MB", *(f"{size / 1e6:,.1f}" for size in report["bytes"])),
        ("held-out tokens per byte", *(f"{rate:.4f}" for rate in held_out["tokens_per_byte"])),
    ]
    if proof is not None and None not in proof["bits_per_byte"]:
        rows.append(("held-out bits per byte", *(f"{bits:.4f}" for bits in proof["bits_per_byte"])))
    print_table(report["checkpoint"], columns, rows)
    kept = (
        f"{tokens['required']:,} always stay, {tokens['used']:,} of the text, {tokens['parts']:,} that merges pass through, "
        f"{tokens['filled']:,} to fill"
    )
    facts = [("kept tokens", kept)]
    for name, text in (("data", data), ("held-out text", held_out)):
        facts.append(
            (
                name,
                f"{text['bytes']:,} bytes, {text['tokens'][0]:,} tokens: {text['covered']:.4%} covered, "
                f"{text['pieces_changed']:,} pieces changed",
            )
        )
    facts.append(("logits of kept tokens", _said(proof)))
    facts.append(("time, peak memory", f"{report['seconds']:.0f} s, {report['peak_rss_mib']:,.0f} MiB"))
    print_table("verified", ("", ""), facts)


def _said(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "not compared; all tensors are equal bit for bit"
    if proof["equal"]:
        return f"equal bit for bit at {proof['positions']:,} positions"
    return (
        f"equal at {proof['positions']:,} positions within the rounding of float32 sums: largest difference "
        f"{proof['max_abs_difference']:.2g}, {proof['limit_share']:.1%} of the limit"
    )
