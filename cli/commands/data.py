"""`slm data`: converts text to a dataset of tokens once, for many training runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slm.cli.console import RichProgress, print_json, print_table, say
from slm.cli.following import next_step, slm_command
from slm.cli.options import (
    REPLACING,
    FilePath,
    Real,
    Whole,
    Word,
    collects,
    column_option,
    document_option,
    json_option,
    overwrite_option,
)
from slm.cli.suggesting import Suggesting
from slm.core.machine import MAX_THREADS
from slm.core.text.documents import TEXT_COLUMN
from slm.core.text.streams import DOCUMENT_BYTES
from slm.steps.training import check_tokenizer

if TYPE_CHECKING:
    from slm.core.tokenizer import Tokenizer
    from slm.train.data.corpus import Corpus, Scan
    from slm.train.data.preparation import DatasetSettings

_OUT = Path("datasets")


class Place(FilePath):
    """A path, or an address such as s3://bucket/stories, which stays a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path or the address."""
        from slm.train.data.remote.locations import check_path, is_remote, without_file_protocol

        if isinstance(value, str):
            if is_remote(value):
                return value.rstrip("/")
            value = without_file_protocol(value)
            check_path(value)
        return super().convert(value, param, ctx)


@dataclass(frozen=True)
class CorpusOptions:
    """The text, and how it is read."""

    train: tuple[str, ...]
    val: str | None
    column: str | None
    max_document_bytes: int | None
    streaming: bool
    split: str | None
    config: str | None

    def check(self, ray: str | None) -> None:
        """Rejects options of Hugging Face datasets for other text, and named datasets on a cluster."""
        from slm.train.data.corpus import is_named

        if ray is not None and is_named(self.train[0]):
            raise click.UsageError("--ray requires files or addresses, such as --data hf://datasets/OWNER/NAME")

        hub = {"--streaming": self.streaming or None, "--split": self.split, "--config": self.config}
        given = [option for option, value in hub.items() if value is not None]
        if given and not is_named(self.train[0]):
            raise click.UsageError(f"{given[0]} requires a Hugging Face dataset, such as --data hf:OWNER/NAME")

    def open(self, scan: "Scan | None" = None) -> "Corpus":
        """Opens the text; `scan` reads it once, by default on this machine."""
        from slm.train.data import corpus
        from slm.train.data.corpus import Reading, open_corpus

        reading = Reading(
            column=self.column or TEXT_COLUMN,
            config=self.config,
            split=self.split or "train",
            streaming=self.streaming,
            limit=self.max_document_bytes or DOCUMENT_BYTES,
        )
        return open_corpus(self.train, self.val, reading, scan or corpus.scan)


@dataclass(frozen=True)
class DatasetOptions:
    """What the dataset contains, besides the text."""

    tokenizer: str
    vocab_size: int | None
    shard_tokens: int
    dedup: bool
    near_dedup: float | None
    language: tuple[str, ...]
    quality: bool
    licence: str | None

    def check(self) -> None:
        """Rejects a vocabulary size for a tokenizer that has one, and options whose packages are missing."""
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise click.UsageError(f"--vocab-size requires --tokenizer bpe: {self.tokenizer} has a fixed vocabulary")
        self.settings().selection.check()

    def settings(self) -> "DatasetSettings":
        """Returns the settings of the preparation."""
        from slm.train.data.preparation import DatasetSettings

        return DatasetSettings(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size or 4096,
            shard_tokens=self.shard_tokens,
            deduplicate=self.dedup,
            near_duplicates=self.near_dedup,
            languages=tuple(sorted(set(self.language))),
            quality=self.quality,
            licence=self.licence,
        )


@dataclass(frozen=True)
class WorkOptions:
    """The place of the dataset, and the processes or machines that prepare it."""

    out: Path | str | None
    workers: int | None
    ray: str | None
    overwrite: bool

    def prepare(self, text: CorpusOptions, path: Path | str, settings: "DatasetSettings") -> "Tokenizer":
        """Prepares the dataset on this machine or on a cluster, and returns its tokenizer."""
        from slm.train.data.cluster.preparation import prepare_on_cluster, scanning
        from slm.train.data.cluster.ray_cluster import ray_cluster

        progress = RichProgress()
        if self.ray is None:
            return self._prepare_here(_opened(text), path, settings, progress)
        with ray_cluster(self.ray) as cluster:
            corpus = _opened(text, scanning(cluster, progress, self.workers))
            _, tokenizer = prepare_on_cluster(
                corpus, path, settings, cluster, progress, most=self.workers, overwrite=self.overwrite
            )
        return tokenizer

    def _prepare_here(
        self, corpus: "Corpus", path: Path | str, settings: "DatasetSettings", progress: RichProgress
    ) -> "Tokenizer":
        from slm.core.machine import usable_cores
        from slm.train.data.dataset import open_dataset
        from slm.train.data.preparation import prepare_dataset
        from slm.train.data.remote.preparation import prepare_remote_dataset

        workers = self.workers or usable_cores()
        if isinstance(path, str):
            return prepare_remote_dataset(corpus, path, settings, progress, workers=workers, overwrite=self.overwrite)
        prepare_dataset(corpus, path, settings, progress, workers=workers, overwrite=self.overwrite)
        return open_dataset(path).tokenizer


def _opened(text: CorpusOptions, scan: "Scan | None" = None) -> "Corpus":
    corpus = text.open(scan)
    say(f"data: {corpus.about}")
    return corpus


@click.group(cls=Suggesting, short_help="Prepare datasets of tokens.")
def data() -> None:
    """Convert text to a dataset of tokens, once for many training runs.

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
    help="Training text: .txt, .jsonl or .parquet files or directories, also s3://, gs:// and hf:// addresses (repeatable), "
    "or sample, tinystories or hf:OWNER/NAME.",
)
@click.option(
    "--val",
    type=Word(),
    metavar="PATH",
    help="Validation text. [default: the data's own split, or some of its documents, which are held out]",
)
@click.option(
    "--tokenizer",
    type=Word(),
    default="bpe",
    show_default=True,
    metavar="gpt2|bpe|FILE",
    help="GPT-2's tokenizer, one learned from the text, or a tokenizer.json.",
)
@click.option(
    "--vocab-size",
    type=Whole(260, 1_000_000),
    metavar="N",
    help="Vocabulary that bpe learns, including special tokens. [default: 4096]",
)
@click.option(
    "--out",
    type=Place(),
    metavar="DIR|URL",
    help="Output directory, or s3://, gs://, hf:// address. [default: datasets/NAME]",
)
@click.option(
    "--workers",
    type=Whole(1, MAX_THREADS),
    metavar="N",
    help="Number of processes, or of tasks on the cluster. [default: one per core]",
)
@click.option(
    "--ray",
    type=Word(),
    metavar="ADDRESS|auto",
    help="Run on a Ray cluster: its head's HOST:PORT, or auto for the one that this machine belongs to. Text and output must "
    "be on storage that all machines share.",
)
@click.option(
    "--shard-tokens",
    type=Whole(1),
    default=100_000_000,
    show_default=True,
    metavar="N",
    help="Tokens per file; a file ends with the document that reaches N.",
)
@click.option("--dedup", is_flag=True, help="Remove exact duplicates, and training documents that are validation text.")
@click.option(
    "--near-dedup",
    type=Real(0.3, 1.0),
    metavar="SIMILARITY",
    help="Remove documents this similar to an earlier one, such as 0.8: the share of common sequences of five words.",
)
@click.option(
    "--language",
    type=Word(),
    multiple=True,
    metavar="CODE",
    help="Keep only documents in this language, such as en (repeatable).",
)
@click.option(
    "--quality", is_flag=True, help="Remove documents that break the rules of Gopher and C4 for running text."
)
@click.option("--streaming", is_flag=True, help="Stream a Hugging Face dataset instead of downloading it.")
@click.option("--split", metavar="NAME", help="Training split of a Hugging Face dataset. [default: train]")
@click.option("--config", metavar="NAME", help="Configuration of a Hugging Face dataset that has several.")
@column_option
@document_option
@click.option("--licence", metavar="TEXT", help="Licence of the text. [default: the one in the dataset's card]")
@overwrite_option
@json_option
@collects("text", CorpusOptions)
@collects("dataset", DatasetOptions)
@collects("work", WorkOptions)
def prepare(text: CorpusOptions, dataset: DatasetOptions, work: WorkOptions, as_json: bool) -> None:
    """Tokenize text on all cores into memory-mapped files for slm train --data DIR.

    \b
      slm data prepare --data books/ --val held-out.txt --tokenizer gpt2 --out datasets/books
      slm data prepare --data crawl.parquet --column content --dedup --near-dedup 0.8 --language en --quality
      slm data prepare --data hf:OWNER/NAME --streaming --workers 8
      slm data prepare --data s3://bucket/texts --out s3://bucket/datasets/stories --ray auto

    After an interruption, even a kill, the same command resumes after the last complete file. The result is the same byte
    for byte, with any number of workers and machines.
    """
    from slm.train.data.cluster.preparation import unfinished_at
    from slm.train.data.preparation import check_out
    from slm.train.data.remote.datasets import check_remote_out

    text.check(work.ray)
    dataset.check()
    path = work.out or _OUT / _name(text.train[0])
    # Before the text is read.
    if isinstance(path, str):
        check_remote_out(path, overwrite=work.overwrite)
        if work.ray is not None:
            unfinished_at(path)
    else:
        check_out(path, overwrite=work.overwrite)
    check_tokenizer(dataset.tokenizer)
    following = _training_on(path, work.prepare(text, path, dataset.settings()))
    _report(path, as_json, more={"next": following})
    if not as_json:
        next_step(following)


@data.command()
@click.argument("dataset", type=Place(), metavar="DIR|URL")
@click.option("--check", is_flag=True, help="Compare every file with the manifest, byte for byte.")
@json_option
def info(dataset: Path | str, check: bool, as_json: bool) -> None:
    """Show the contents and the origin of a prepared dataset.

    \b
      slm data info datasets/stories
      slm data info datasets/stories --check --json
    """
    from slm.train.data.dataset import check_files, open_dataset
    from slm.train.data.remote.datasets import check_remote, remote_manifest

    if isinstance(dataset, str):
        if check:
            check_remote(dataset, remote_manifest(dataset)[0])
    else:
        opened = open_dataset(dataset)
        if check:
            check_files(opened.path, opened.manifest)
    _report(dataset, as_json, checked=check)


def _training_on(path: Path | str, tokenizer: "Tokenizer") -> str:
    """Returns the command that trains on a dataset, with the settings that the default recipe needs for it."""
    from slm.steps.training import fitting_recipe
    from slm.train.data.tokenizer import is_choice, vocabulary_for
    from slm.train.recipe import load_recipe

    recipe = load_recipe(fitting_recipe())
    config = recipe.model.config()
    command = ["train", "--data", str(path)]
    if not is_choice(recipe.data.tokenizer, tokenizer, config.max_position_embeddings):
        command += ["--tokenizer", "bpe"]
    if tokenizer.vocab_size > config.vocab_size:
        command += ["--set", vocabulary_for(tokenizer.vocab_size)]
    return slm_command(*command)


def _name(source: str) -> str:
    """Returns the default name of a dataset, after its first source: `stories` for `texts/stories.txt.gz`."""
    last = source.rstrip("/").rpartition("/")[2] if source.startswith("hf:") else Path(source).name
    last = last.removeprefix("hf:")
    return last.partition(".")[0] or "text"


def _report(path: Path | str, as_json: bool, *, checked: bool = False, more: Mapping[str, str] | None = None) -> None:
    from slm.train.data.dataset import open_dataset
    from slm.train.data.remote.datasets import remote_manifest

    if isinstance(path, str):
        place, manifest = path, remote_manifest(path)[0]
    else:
        opened = open_dataset(path)
        place, manifest = str(opened.path), opened.manifest
    if as_json:
        about = {"dataset": str(path)} | ({"checked": True} if checked else {})
        print_json(about | json.loads(manifest.to_json()) | dict(more or {}))
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
        selection = manifest.selection
        if selection is not None:
            counts = selection.removed.get(name, {})
            each = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            rows.append(("", f"removed: {each or 'no document'}"))
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
        rows.append(("checked", "every token file matches the manifest"))
    print_table(place, ("", ""), rows)
