"""Training and validation text: files, the text that ships with slm, or Hugging Face datasets."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from slm.core import sample
from slm.core.errors import SlmError
from slm.core.text.documents import TEXT_COLUMN, Beginning, first_documents, text_files
from slm.core.text.streams import DOCUMENT_BYTES
from slm.train.data.dataset import Source
from slm.train.data.huggingface import HubDataset
from slm.train.data.remote.locations import check_path, is_remote, without_file_protocol
from slm.train.data.remote.text import remote_files
from slm.train.data.sources import FileRange, LocalFile, TextSource

SAMPLE = "sample"
TINYSTORIES = "tinystories"
NAMED = (SAMPLE, TINYSTORIES)
HUB_PREFIX = "hf:"
# Eldan & Li 2023, arXiv:2305.07759.
_TINYSTORIES_ID = "roneneldan/TinyStories"
_TINYSTORIES_LICENCE = "CDLA-Sharing-1.0"

# Without validation text, the last documents of a corpus are held out: this share of its bytes, or more if that is too little
# to measure a loss on, but at most a tenth.
_HELD_OUT = 0.01
_HELD_OUT_BYTES = 64 * 1024
_HELD_OUT_MOST = 0.1
# Of a dataset of unknown length, one document in this many is held out, by its hash.
_ONE_IN = 100

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Reading:
    """How rows and Hugging Face datasets are read.

    Attributes:
        column: Name of the field that holds the text, in rows.
        config: Configuration of a Hugging Face dataset; None uses its only one.
        split: Training split of a Hugging Face dataset.
        streaming: Whether to read a Hugging Face dataset over the network instead of downloading it.
        limit: Maximum UTF-8 bytes of a row. A longer document of a text file is read in parts.
    """

    column: str = TEXT_COLUMN
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int = DOCUMENT_BYTES


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents. Each call reads them again, in the same order.

    A document longer than the limit comes in parts, all of them `Beginning` but the last.

    Attributes:
        train: The training documents.
        validation: The validation documents.
        about: A one-line description of the text and its origin.
        held_out: How the validation text was chosen.
        sources: Origin of the text.
        licence: Licence of the text, if the source states one.
        counts: Number of training and of validation documents, if known.
        fingerprint: Values that change with the text, as far as they are known before reading it.
        limit: Maximum bytes of a document that comes whole.
        column: Name of the field that holds the text, in rows.
        files: The files of the training and of the validation documents; None if they are not whole documents of files.
    """

    train: Documents
    validation: Documents
    about: str
    held_out: str
    sources: tuple[Source, ...] = ()
    licence: str | None = None
    counts: tuple[int | None, int | None] = (None, None)
    fingerprint: tuple[object, ...] = ()
    limit: int = DOCUMENT_BYTES
    column: str = TEXT_COLUMN
    files: tuple[tuple[FileRange, ...], tuple[FileRange, ...]] | None = None


# Yields, for each file, the bytes and the characters of every document in it.
Scan = Callable[[Sequence[TextSource], Reading], Iterator[Iterable[tuple[int, int]]]]


def scan(files: Sequence[TextSource], reading: Reading) -> Iterator[Iterable[tuple[int, int]]]:
    """Yields, for each file, the bytes and the characters of every document in it; reads the files one after the other."""
    return (_sizes(file, reading) for file in files)


def _sizes(file: TextSource, reading: Reading) -> Iterator[tuple[int, int]]:
    size = characters = 0
    for part in file.parts(reading.column, reading.limit):
        size, characters = size + len(part.encode()), characters + len(part)
        if not isinstance(part, Beginning):
            yield size, characters
            size = characters = 0


def open_corpus(
    train: Sequence[str], validation: str | None, reading: Reading | None = None, scan: Scan = scan
) -> Corpus:
    """Opens a corpus, and reads all of its files once to check them.

    Args:
        train: Paths or addresses of files or directories, or one name: "sample", "tinystories", or "hf:OWNER/NAME".
        validation: Path of a file or directory. None uses the validation split of a named corpus; for files it holds out the
            last documents, and for a Hugging Face dataset without such a split one document in a hundred, by its hash.
        reading: How rows and Hugging Face datasets are read.
        scan: Reads the files once.

    Raises:
        SlmError: When a source cannot be read or holds no text.
    """
    reading = reading or Reading()
    named = [name for name in train if is_named(name)]
    if named and len(train) > 1:
        raise SlmError(
            f"--data {named[0]} cannot be combined with other data",
            f"for a file of that name write --data ./{named[0]}",
        )
    if not named:
        return _from_files(_all_files(train), validation, reading, scan)
    corpus = _sample() if named[0] == SAMPLE else _from_hub(named[0], reading)
    if validation is None:
        return corpus
    return _measured_on(corpus, _Files(_all_files([validation]), "validation", reading, scan))


def is_named(name: str) -> bool:
    """Returns whether a value of `--data` names a corpus and not a path."""
    return name in NAMED or (name.startswith(HUB_PREFIX) and not is_remote(name))


def _all_files(paths: Sequence[str]) -> list[TextSource]:
    files: list[TextSource] = []
    for path in paths:
        if is_remote(path):
            files += remote_files(path)
            continue
        local = without_file_protocol(path)
        check_path(local)
        files += map(LocalFile, text_files([Path(local)]))
    return files


class _Files:
    """Files of documents, read once to check them and to count their bytes."""

    def __init__(
        self,
        files: Sequence[TextSource],
        split: Literal["train", "validation"],
        reading: Reading,
        scan: Scan = scan,
    ) -> None:
        self._reading = reading
        self._split = split
        self.files = files
        self.ranges: list[FileRange] = []
        self.documents = self.bytes = self.characters = 0
        # Sizes of the last documents, enough to reach the bytes to hold out. Each document adds less than its size to those
        # bytes, so a size that was dropped at the front is never needed again.
        tail: deque[int] = deque()
        tail_bytes = 0
        for file, sizes in zip(files, scan(files, reading), strict=True):
            before = (self.documents, self.bytes)
            for size, characters in sizes:
                tail.append(size)
                tail_bytes, self.bytes, self.documents = tail_bytes + size, self.bytes + size, self.documents + 1
                self.characters += characters
                while tail_bytes - tail[0] >= _held_out_bytes(self.bytes):
                    tail_bytes -= tail.popleft()
            if self.documents == before[0]:
                raise SlmError(f"no text in {file}", "leave it out, or check that it is the right file")
            self.ranges.append(FileRange(file, 0, self.documents - before[0], self.bytes - before[1]))
        # Number of documents at the end to hold out: at least one, and at most all but one.
        self.tail = min(len(tail), self.documents - 1)

    def read(self) -> Iterator[str]:
        return chain.from_iterable(map(self._parts, self.files))

    def _parts(self, file: TextSource) -> Iterator[str]:
        return file.parts(self._reading.column, self._reading.limit)

    @property
    def about(self) -> str:
        files = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{files}, {_count(self.documents)}, {self.bytes / 1e3:,.0f} kB"

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(name=str(file), kind="file", split=self._split, bytes=file.bytes) for file in self.files)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        return tuple(file.fingerprint for file in self.files)


def _from_files(files: Sequence[TextSource], validation: str | None, reading: Reading, scan: Scan) -> Corpus:
    text = _Files(files, "train", reading, scan)
    held_out = "the last documents"
    whole = Corpus(
        text.read,
        text.read,
        text.about,
        held_out,
        text.sources,
        None,
        (text.documents, None),
        text.fingerprint,
        reading.limit,
        reading.column,
        (tuple(text.ranges), ()),
    )
    if validation is not None:
        return _measured_on(whole, _Files(_all_files([validation]), "validation", reading, scan))
    if text.documents == 1:
        return _split_document(whole, text)
    kept = text.documents - text.tail
    return replace(
        whole,
        train=lambda: first_documents(text.read(), kept),
        validation=lambda: _after_documents(text.read(), kept),
        about=f"{text.about}; validation: the last {_count(text.tail)} of it",
        counts=(kept, text.tail),
        files=(_first(text.ranges, kept), _after(text.ranges, kept)),
    )


def _measured_on(corpus: Corpus, measured: _Files) -> Corpus:
    """Returns the corpus with the given validation text."""
    return replace(
        corpus,
        validation=measured.read,
        about=f"{corpus.about.partition(';')[0]}; validation: {measured.about}",
        held_out="--val",
        sources=tuple(source for source in corpus.sources if source.split == "train") + measured.sources,
        counts=(corpus.counts[0], measured.documents),
        fingerprint=(corpus.fingerprint, measured.fingerprint),
        files=None if corpus.files is None else (corpus.files[0], tuple(measured.ranges)),
    )


def _first(ranges: Sequence[FileRange], documents: int) -> tuple[FileRange, ...]:
    """Returns the ranges of the first documents."""
    found = []
    for each in ranges:
        if documents > 0:
            found.append(replace(each, documents=min(each.documents, documents)))
        documents -= each.documents
    return tuple(found)


def _after(ranges: Sequence[FileRange], documents: int) -> tuple[FileRange, ...]:
    """Returns the ranges of the documents after the first ones."""
    found = []
    for each in ranges:
        skipped = min(each.documents, max(0, documents))
        if skipped < each.documents:
            found.append(replace(each, first=skipped, documents=each.documents - skipped))
        documents -= each.documents
    return tuple(found)


def _held_out_bytes(size: int) -> float:
    return max(_HELD_OUT * size, min(_HELD_OUT_BYTES, _HELD_OUT_MOST * size))


def _after_documents(parts: Iterator[str], count: int) -> Iterator[str]:
    for _ in first_documents(parts, count):
        pass
    yield from parts


def _split_document(whole: Corpus, text: _Files) -> Corpus:
    """Holds out the end of a single document, starting at white space."""
    share = _held_out_bytes(text.bytes) / text.bytes
    cut = _space_before(text.read(), int(text.characters * (1 - share)))
    if not cut:
        raise SlmError(f"too little text in {text.files[0]} to hold some out", "name validation text with --val")
    return replace(
        whole,
        train=lambda: _up_to(text.read(), cut),
        validation=lambda: _from(text.read(), cut),
        about=f"{text.about}; validation: the last {text.characters - cut:,} characters of it",
        held_out="the end of the one document",
        counts=(1, 1),
        files=None,
    )


def _space_before(parts: Iterator[str], place: int) -> int:
    """Returns the last white space of a document at or before a position; 0 if there is none after its start."""
    start = 0
    for part in parts:
        if start + len(part) > place:
            first = 0 if start else 1  # a later part begins with white space
            return next((start + i for i in range(place - start, first - 1, -1) if part[i].isspace()), start)
        start += len(part)
    return 0


def _up_to(parts: Iterator[str], cut: int) -> Iterator[str]:
    """Yields the parts of a document's first characters."""
    for part in parts:
        if len(part) >= cut:
            yield str(part[:cut])
            return
        yield part
        cut -= len(part)


def _from(parts: Iterator[str], cut: int) -> Iterator[str]:
    """Yields the parts of a document without its first characters."""
    for part in parts:
        if cut < len(part):
            yield Beginning(part[cut:]) if isinstance(part, Beginning) else part[cut:]
            cut = 0
        else:
            cut -= len(part)


def _sample() -> Corpus:
    reading = Reading()
    train = _Files([LocalFile(sample.stories_path())], "train", reading)
    validation = _Files([LocalFile(sample.validation_path())], "validation", reading)
    about = f"the stories that ship with slm, {_count(train.documents)}; validation: {validation.documents} more"
    return Corpus(
        train.read,
        validation.read,
        about,
        "the sample's own validation text",
        tuple(
            Source(name=SAMPLE, kind="sample", split=split, bytes=bytes_)
            for split, bytes_ in (("train", train.bytes), ("validation", validation.bytes))
        ),
        counts=(train.documents, validation.documents),
        fingerprint=(*train.fingerprint, *validation.fingerprint),
        files=(tuple(train.ranges), tuple(validation.ranges)),
    )


def _from_hub(name: str, reading: Reading) -> Corpus:
    tinystories = name == TINYSTORIES
    identifier = _TINYSTORIES_ID if tinystories else name.removeprefix(HUB_PREFIX)
    if Path(identifier).expanduser().is_dir():
        identifier = str(Path(identifier).expanduser())
    rows = HubDataset(
        identifier,
        config=reading.config,
        split=reading.split,
        column=reading.column,
        streaming=reading.streaming,
        limit=reading.limit,
    )
    train, validation = rows.rows
    about = identifier if train is None else f"{identifier}, {_count(train)}"
    corpus = Corpus(
        rows.train,
        rows.validation,
        about,
        "the dataset's own validation split",
        tuple(Source(name=identifier, kind="huggingface", split=split) for split in ("train", "validation")),
        _TINYSTORIES_LICENCE if tinystories else rows.licence,
        (train, validation),
        (identifier, reading.config, reading.split, reading.streaming, *rows.fingerprint, *_local_files(identifier)),
        column=reading.column,
    )
    if rows.has_validation:
        own = "its own" if validation is None else f"its own {_count(validation)}"
        return replace(corpus, about=f"{about}; validation: {own}")
    return replace(
        corpus,
        train=lambda: (document for document in rows.train() if not _held_out_by_hash(document)),
        validation=lambda: (document for document in rows.train() if _held_out_by_hash(document)),
        about=f"{about}; validation: one document in {_ONE_IN} of it, by its hash",
        held_out=f"one document in {_ONE_IN}, by its hash",
        counts=(None, None),
    )


def _held_out_by_hash(document: str) -> bool:
    """Returns whether a document is held out. Documents of equal text are treated alike."""
    return int.from_bytes(hashlib.sha256(document.strip().encode()).digest()[:8]) % _ONE_IN == 0


def _local_files(name: str) -> list[object]:
    """Returns size and modification time of every file of a dataset in a local directory."""
    files = sorted(file for file in Path(name).rglob("*") if file.is_file()) if Path(name).is_dir() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _count(documents: int) -> str:
    return f"{documents:,} document{'' if documents == 1 else 's'}"
