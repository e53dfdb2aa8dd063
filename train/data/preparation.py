"""Writes a corpus as a dataset. The bytes are the same with and without interruptions."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.files import read_json, replace_directory, write_text
from slm.core.locks import sole
from slm.core.outputs import OVERWRITE, check_output
from slm.core.progress import Progress
from slm.core.text.files import DATASET_FILE, is_dataset
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.train.data.corpus import Corpus, Documents
from slm.train.data.dataset import FORMAT_VERSION, DatasetManifest, Split
from slm.train.data.selection.findings import rejected_for
from slm.train.data.selection.selector import selecting
from slm.train.data.selection.settings import Selection
from slm.train.data.shards import ChangedTextError, ShardWriter, finished_shards
from slm.train.data.tokenizer import resolve_tokenizer
from slm.train.data.tokens import dtype_name
from slm.version import __version__

# In the work directory, besides the dataset's own files.
_STATE_FILE = "preparation.json"
SEEN_FILE = "seen.sqlite3"
STARTING_OVER = "starting over: the unfinished dataset there has other settings or another text"

# Maximum length in `tokenizer_config.json` as long as there is no model: Gemma 3's. A run writes that of its model.
_MAX_LENGTH = 32_768
# A vocabulary of about ten thousand tokens gains nothing from more text than this.
_BPE_CHARACTERS = 64 << 20


def beginning(documents: Documents, selection: Selection | None = None) -> Iterator[str]:
    """Yields the first documents that pass the filters, as many as a tokenizer is learned from."""
    characters = 0

    def fits(document: str) -> bool:
        nonlocal characters
        before, characters = characters, characters + len(document)
        return before < _BPE_CHARACTERS

    read: Iterator[str] = documents()
    if selection is not None and selection.filters:
        read = (document for document in read if rejected_for(document, selection) is None)
    return takewhile(fits, read)


class DatasetSettings(BaseModel):
    """What determines the bytes of a dataset, besides its text.

    Attributes:
        tokenizer: "gpt2", "bpe" to learn one from the training text, or a path to a `tokenizer.json`.
        vocab_size: Number of tokens that "bpe" learns, including special tokens.
        shard_tokens: A shard ends with the document that reaches this many tokens.
        deduplicate: Whether to remove exact duplicates.
        near_duplicates: Minimum similarity of near duplicates to remove; None removes none. As in `Selection`.
        languages: Codes of the languages to keep; empty keeps all. As in `Selection`.
        quality: Whether to remove documents that break a rule of quality. As in `Selection`.
        licence: Licence of the text; None uses the one that the source states.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str = "bpe"
    vocab_size: int = 4096
    shard_tokens: int = 100_000_000
    deduplicate: bool = False
    near_duplicates: float | None = None
    languages: tuple[str, ...] = ()
    quality: bool = False
    licence: str | None = None

    @property
    def selection(self) -> Selection:
        """Which documents remain."""
        return Selection(**self.model_dump(include=set(Selection.model_fields)))


def write_dataset(
    writer: ShardWriter, corpus: Corpus, *, selection: Selection | None = None, licence: str | None = None
) -> DatasetManifest:
    """Writes a dataset's files. Finished shards in the directory are compared with the text and kept.

    Args:
        writer: Writes the splits; its tokenizer is saved with the dataset.
        corpus: The text.
        selection: Which documents remain; None keeps all.
        licence: Licence of the text; None uses the one that the source states.

    Raises:
        SlmError: When the text cannot be read, finished shards were made from another text, or a worker is killed.
    """
    directory, tokenizer = writer.directory, writer.tokenizer
    if not (directory / TOKENIZER_FILE).is_file():
        tokenizer.save(directory)
    selection = selection or Selection()
    splits: dict[str, Split] = {}
    with selecting(selection, directory / SEEN_FILE) if selection.selects else nullcontext() as selector:
        # Validation text first, so that its documents are known when the training text is read.
        for name, documents, total in (
            ("validation", corpus.validation, corpus.counts[1]),
            ("train", corpus.train, corpus.counts[0]),
        ):
            if selector is None:
                splits[name] = Split.of(*writer.write(name, documents(), total), 0)
            else:
                with closing(selector.chosen(documents(), name, corpus.limit, writer.workers)) as chosen:
                    written = writer.write(name, chosen)
                splits[name] = Split.of(*written, selector.duplicates[name])
        record = None if selector is None else selector.record()
    manifest = DatasetManifest(
        slm_version=__version__,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype_name(tokenizer),
        train=splits["train"],
        validation=splits["validation"],
        held_out=corpus.held_out,
        deduplicated=selection.deduplicate,
        sources=corpus.sources,
        licence=corpus.licence if licence is None else licence,
        selection=record,
    )
    write_text(directory / DATASET_FILE, manifest.to_json())
    return manifest


def prepare_dataset(
    corpus: Corpus,
    out: Path,
    settings: DatasetSettings,
    progress: Progress,
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> DatasetManifest:
    """Creates a dataset, resuming where the same preparation was interrupted.

    Until it is complete it lies in a hidden directory beside `out`.

    Args:
        corpus: The text.
        out: The directory to create; it may be empty.
        settings: The tokenizer, the size of shards, deduplication, and the licence.
        progress: Receives progress and notes.
        workers: Number of processes that encode; the bytes do not depend on it.
        overwrite: Whether a dataset there may be replaced.

    Raises:
        SlmError: When the directory is taken or in use, or text, tokenizer or workers fail.
    """
    out = out.resolve()
    check_out(out, overwrite=overwrite)
    with work_directory(out, progress) as work:
        sha256 = settings_sha256(corpus, settings)
        go_on_or_start(work, sha256, progress)
        made = tokenizer_in(work, corpus, settings)
        done = [header for split in ("validation", "train") for header in finished_shards(work, split, made)]
        if done:
            tokens = sum(header.tokens for header in done)
            progress.note(f"going on after {len(done)} finished shards of {tokens:,} tokens")
        try:
            writer = ShardWriter(work, made, progress, settings.shard_tokens, workers)
            manifest = write_dataset(writer, corpus, selection=settings.selection, licence=settings.licence)
        except ChangedTextError:
            (work / _STATE_FILE).unlink()  # so that the next call starts over
            raise
        finish(work, out, manifest, sha256)
    return manifest


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Checks that a dataset may be created at a path: nothing is there, an empty directory, or a dataset to replace.

    Raises:
        SlmError: When the path is taken or cannot be written to.
    """
    if is_dataset(out) and not overwrite:
        raise SlmError(f"there is a prepared dataset already: {out}", OVERWRITE)
    check_output(out, _files_of(out) if is_dataset(out) else ())


def _files_of(dataset: Path) -> tuple[str, ...]:
    """Returns the files of a dataset; none for a damaged one, which is then not replaced."""
    try:
        return DatasetManifest.model_validate(read_json(dataset / DATASET_FILE, DATASET_FILE)).files
    except (SlmError, ValidationError):
        return ()


def _tokenizer_settings(choice: str) -> str:
    """Returns the choice of a tokenizer; for a file, its contents."""
    file = Path(choice) / TOKENIZER_FILE if Path(choice).is_dir() else Path(choice)
    return hashlib.sha256(file.read_bytes()).hexdigest() if choice not in ("gpt2", "bpe") and file.is_file() else choice


@contextmanager
def work_directory(out: Path, progress: Progress) -> Iterator[Path]:
    """Locks and yields the work directory beside `out`, which stays if the block fails."""
    work = out.parent / f".{out.name}.unfinished"
    # The lock is a file beside the directory: Windows does not rename a directory with an open file.
    with sole(work, doing=f"prepares {out}", again=False):
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield work
        except BaseException:
            # Those of a cluster's jobs are in a directory.
            if any(path.suffix in (".bin", ".done") for path in work.rglob("*")):
                progress.note("finished files are kept: the same command resumes")
            else:
                renames.remove_leftovers(work)
            raise


def settings_sha256(corpus: Corpus, settings: DatasetSettings) -> str:
    """Returns a hash of everything that determines a dataset, as far as it is known before the text is read."""
    state = settings.model_dump() | {
        "format_version": FORMAT_VERSION,
        "slm_version": __version__,
        "tokenizer": _tokenizer_settings(settings.tokenizer),
        "held_out": corpus.held_out,
        "text": corpus.fingerprint,
        "column": corpus.column,
        "versions": settings.selection.versions(),
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def tokenizer_in(work: Path, corpus: Corpus, settings: DatasetSettings) -> Tokenizer:
    """Returns the tokenizer of an unfinished dataset, which is made and saved if it is not there."""
    if (work / TOKENIZER_FILE).is_file():
        return Tokenizer.load(work)
    limit = settings.vocab_size if settings.tokenizer == "bpe" else sys.maxsize
    text = beginning(corpus.train, settings.selection)
    made = resolve_tokenizer(settings.tokenizer, text, limit, _MAX_LENGTH)
    _save_whole(made, work)
    return made


def go_on_or_start(work: Path, sha256: str, progress: Progress) -> None:
    """Removes everything from a work directory unless the same preparation, by the hash of its settings, wrote it."""
    file = work / _STATE_FILE
    found = None
    if file.is_file():
        try:
            found = read_json(file, "the state of the preparation")
        except SlmError:
            found = {}
    if found == {"settings_sha256": sha256}:
        return
    left = [path for path in work.iterdir() if path.name != _STATE_FILE]
    if left or found is not None:
        progress.note(STARTING_OVER)
    file.unlink(missing_ok=True)  # first: without it nothing in the directory is resumed
    _remove(left)
    _write_state(work, sha256)


def _save_whole(tokenizer: Tokenizer, work: Path) -> None:
    """Saves a tokenizer whole or not at all; the file that marks it complete comes last."""
    scratch = work / "tokenizer.unfinished"
    scratch.mkdir(exist_ok=True)
    tokenizer.save(scratch)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == TOKENIZER_FILE):
        renames.replace(file, work / file.name)
    scratch.rmdir()


def finish(work: Path, out: Path, manifest: DatasetManifest, sha256: str) -> None:
    """Puts a complete dataset in its place.

    Args:
        work: The work directory.
        out: The directory to create or replace.
        manifest: The manifest. Files that do not belong to the dataset are removed.
        sha256: Hash of the settings. If the dataset cannot be put in its place, the same command resumes with its files.
    """
    _remove(path for path in work.iterdir() if path.name not in manifest.files)
    try:
        replace_directory(work, out)
    except Exception:
        _write_state(work, sha256)
        raise


def _write_state(work: Path, sha256: str) -> None:
    write_text(work / _STATE_FILE, json.dumps({"settings_sha256": sha256}) + "\n")


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            renames.remove_tree(path)
        else:
            renames.remove_file(path)
