"""`slm data`: text becomes a dataset of tokens once, for many runs to train on."""

from collections.abc import Mapping
from pathlib import Path

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import next_step, slm_command
from slm.cli.options import (
    REPLACING,
    FilePath,
    Whole,
    Word,
    column_option,
    document_option,
    json_option,
    overwrite_option,
)
from slm.cli.suggesting import Suggesting
from slm.core.errors import SlmError
from slm.core.machine import MAX_THREADS
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES

_OUT = Path("datasets")


@click.group(cls=Suggesting, short_help="Prepare datasets of tokens.")
def data() -> None:
    """Turn text into a dataset of tokens, once for many runs.

    \b
      slm data prepare --data stories.txt --out datasets/stories
      slm data info datasets/stories --json
      slm train --recipe stories-4m --data datasets/stories
    """


@data.command(epilog=REPLACING)
@click.option(
    "--data",
    "train",
    type=Word(),
    multiple=True,
    required=True,
    metavar="PATH|NAME",
    help="Text to train on: .txt, .jsonl, .parquet, a directory (may be repeated); or sample, tinystories or "
    "hf:OWNER/NAME.",
)
@click.option(
    "--val",
    type=Word(),
    metavar="PATH",
    help="Text to measure on. [default: the data's own, or some of its documents, which are held out]",
)
@click.option(
    "--tokenizer",
    type=Word(),
    default="bpe",
    show_default=True,
    metavar="gpt2|bpe|FILE",
    help="GPT-2's, one learned from the text, or a tokenizer.json.",
)
@click.option(
    "--vocab-size",
    type=Whole(260, 1_000_000),
    metavar="N",
    help="Tokens that bpe learns, special ones included. [default: 4096]",
)
@click.option("--out", type=FilePath(), metavar="DIR", help="Where to write. [default: datasets/NAME]")
@click.option("--workers", type=Whole(1, MAX_THREADS), metavar="N", help="Processes. [default: one a core]")
@click.option(
    "--shard-tokens",
    type=Whole(1),
    default=100_000_000,
    show_default=True,
    metavar="N",
    help="A file ends with the document that reaches so many tokens.",
)
@click.option(
    "--dedup", is_flag=True, help="Remove exact duplicates, and what is validation text from the training text."
)
@click.option(
    "--streaming", is_flag=True, help="Read a Hugging Face dataset over the network, without a copy on the disk."
)
@click.option("--split", metavar="NAME", help="Of a Hugging Face dataset, to train on. [default: train]")
@click.option("--config", metavar="NAME", help="Of a Hugging Face dataset that has several.")
@column_option
@document_option
@click.option("--licence", metavar="TEXT", help="Licence of the text. [default: what the dataset's card states]")
@overwrite_option
@json_option
def prepare(
    train: tuple[str, ...],
    val: str | None,
    tokenizer: str,
    vocab_size: int | None,
    out: Path | None,
    workers: int | None,
    shard_tokens: int,
    dedup: bool,
    streaming: bool,
    split: str | None,
    config: str | None,
    column: str | None,
    max_document_bytes: int | None,
    licence: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Tokenize text on all cores into memory-mapped files that slm train --data DIR takes as they are.

    \b
      slm data prepare --data books/ --val held-out.txt --tokenizer gpt2 --out datasets/books
      slm data prepare --data crawl.parquet --column content --dedup
      slm data prepare --data hf:OWNER/NAME --streaming --workers 8

    Interrupted, even killed, the same command goes on after the last whole file, and the result is the same, byte for
    byte, as it is for any number of workers.
    """
    from slm.core.machine import usable_cores
    from slm.train.data.corpus import Reading, is_named, open_corpus
    from slm.train.data.preparation import check_out, prepare_dataset

    hub = {"--streaming": streaming or None, "--split": split, "--config": config}
    given = [option for option, value in hub.items() if value is not None]
    if given and not is_named(train[0]):
        raise click.UsageError(f"{given[0]} is for Hugging Face datasets: name one as hf:OWNER/NAME")
    if vocab_size is not None and tokenizer != "bpe":
        raise click.UsageError(f"--vocab-size is for --tokenizer bpe: {tokenizer} has its vocabulary")
    progress = RichProgress()
    path = out or _OUT / _name(train[0])
    check_out(path, overwrite=overwrite)  # before all of the text is read
    if tokenizer not in ("gpt2", "bpe") and not Path(tokenizer).expanduser().exists():
        raise SlmError(f"tokenizer not found: {tokenizer}", "gpt2, bpe, or the path of a tokenizer.json")
    reading = Reading(
        column=column or TEXT_COLUMN,
        config=config,
        split=split or "train",
        streaming=streaming,
        limit=max_document_bytes or DOCUMENT_BYTES,
    )
    corpus = open_corpus(train, val, reading)
    say(f"data: {corpus.about}")
    prepare_dataset(
        corpus,
        path,
        progress,
        tokenizer=tokenizer,
        vocab_size=vocab_size or 4096,
        shard_tokens=shard_tokens,
        workers=workers or usable_cores(),
        deduplicate=dedup,
        licence=licence,
        overwrite=overwrite,
    )
    following = _training_on(path)
    _report(path, as_json, more={"next": following})
    if not as_json:
        next_step(following)


@data.command()
@click.argument("dataset", type=FilePath(), metavar="DIR")
@click.option("--check", is_flag=True, help="Read every file whole and compare it with the manifest.")
@json_option
def info(dataset: Path, check: bool, as_json: bool) -> None:
    """Say what a prepared dataset holds and where it came from.

    \b
      slm data info datasets/stories
      slm data info datasets/stories --check --json
    """
    from slm.train.data.dataset import check_files, open_dataset

    opened = open_dataset(dataset)
    if check:
        check_files(opened.path, opened.manifest)
    _report(dataset, as_json, checked=check)


def _training_on(path: Path) -> str:
    """Returns the command that trains on a dataset, with what must be set for it to go with the recipe that is taken."""
    from slm.cli.train import fitting_recipe
    from slm.train.data.dataset import open_dataset
    from slm.train.data.tokenizer import is_choice, vocabulary_for
    from slm.train.recipe import load_recipe

    recipe, tokenizer = load_recipe(fitting_recipe()), open_dataset(path).tokenizer
    config = recipe.model.config()
    command = ["train", "--data", str(path)]
    if not is_choice(recipe.data.tokenizer, tokenizer, config.max_position_embeddings):
        command += ["--tokenizer", "bpe"]
    if tokenizer.vocab_size > config.vocab_size:
        command += ["--set", vocabulary_for(tokenizer.vocab_size)]
    return slm_command(*command)


def _name(source: str) -> str:
    """Returns what to call a dataset after its first source: `stories` for `texts/stories.txt.gz`."""
    last = source.removeprefix("hf:").rstrip("/").rpartition("/")[2]
    return last.partition(".")[0] or "text"


def _report(path: Path, as_json: bool, *, checked: bool = False, more: Mapping[str, str] | None = None) -> None:
    from slm.train.data.dataset import open_dataset

    opened = open_dataset(path)
    manifest = opened.manifest
    if as_json:
        about = {"dataset": str(path)} | ({"checked": True} if checked else {})
        print_json(about | manifest.model_dump(mode="json") | dict(more or {}))
        return
    rows = []
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        size = sum(shard.bytes for shard in split.shards)
        removed = f", {split.duplicates_removed:,} duplicates removed" if manifest.deduplicated else ""
        rows.append(
            (
                name,
                f"{split.tokens:,} tokens, {split.documents:,} documents, {split.text_bytes / 1e6:,.1f} MB of text{removed}",
            )
        )
        files = f"{len(split.shards)} file{'' if len(split.shards) == 1 else 's'}"
        rows.append(("", f"{files}, {size / 1e6:,.1f} MB; text SHA-256 {split.text_sha256}"))
    rows += [
        ("held out", manifest.held_out),
        ("tokenizer", f"{manifest.vocab_size:,} tokens, SHA-256 {manifest.tokenizer_sha256}"),
        ("sources", ", ".join(f"{source.name} ({source.split})" for source in manifest.sources[:8])),
        ("licence", manifest.licence or "not stated"),
        ("made by", f"slm {manifest.slm_version}"),
    ]
    if len(manifest.sources) > 8:
        rows.append(("", f"and {len(manifest.sources) - 8} more"))
    if checked:
        rows.append(("checked", "every token file is as it was made, byte for byte"))
    print_table(str(opened.path), ("", ""), rows)
