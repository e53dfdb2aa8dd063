"""What a run trains on and what it is measured on: files, the text that ships with slm, or TinyStories."""

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from slm.core import sample
from slm.core.errors import SlmError
from slm.train.data.documents import find_files, read_documents

SAMPLE = "sample"
TINYSTORIES = "tinystories"
NAMED = (SAMPLE, TINYSTORIES)
_TINYSTORIES_ID = "roneneldan/TinyStories"

# Without validation text of its own, a corpus gives up its last documents: this share of its bytes, more where that would
# measure next to nothing, but never more than a tenth.
_HELD_OUT = 0.01
_HELD_OUT_BYTES = 64 * 1024
_HELD_OUT_MOST = 0.1

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to measure on; each call reads them anew, in the same order.

    Attributes:
        train: The documents trained on.
        validation: The documents measured on.
        about: What they are and where they come from, in one line.
    """

    train: Documents
    validation: Documents
    about: str


def open_corpus(train: Sequence[str], validation: str | None) -> Corpus:
    """Opens a corpus and reads all of its files once, so that what is wrong with them shows now.

    Args:
        train: Paths of files or directories, or one name: "sample" or "tinystories".
        validation: Path of a file or directory. None takes the validation split of a named corpus; of any other it holds
            out the last documents.

    Raises:
        SlmError: When anything cannot be read or holds no text.
    """
    names = [name for name in train if name in NAMED]
    if names and len(train) > 1:
        raise SlmError(f"--data {names[0]} stands alone", f"for a file of that name write --data ./{names[0]}")
    if not names:
        return _from_files(_all_files(train), validation)
    named = _sample() if names[0] == SAMPLE else _tinystories()
    if validation is None:
        return named
    measured = _Files(_all_files([validation]))
    return Corpus(named.train, measured.read, f"{named.about.partition(';')[0]}; validation: {measured.about}")


def _all_files(paths: Sequence[str]) -> list[Path]:
    return list(chain.from_iterable(find_files(Path(path).expanduser()) for path in paths))


class _Files:
    """Files of documents, read once to check them and to learn their sizes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.sizes = array("q")  # bytes of each document
        for file in files:
            before = len(self.sizes)
            self.sizes.extend(len(document.encode()) for document in read_documents(file))
            if len(self.sizes) == before:
                raise SlmError(f"no text in {file}", "leave it out, or check that it is the right file")

    def read(self) -> Iterator[str]:
        return chain.from_iterable(map(read_documents, self.files))

    @property
    def about(self) -> str:
        files = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{files}, {_count(len(self.sizes))}, {sum(self.sizes) / 1e3:,.0f} kB"


def _from_files(files: Sequence[Path], validation: str | None) -> Corpus:
    text = _Files(files)
    if validation is not None:
        measured = _Files(_all_files([validation]))
        return Corpus(text.read, measured.read, f"{text.about}; validation: {measured.about}")
    if len(text.sizes) == 1:
        return _split_document(text)
    held_out = _tail(text.sizes)
    kept = len(text.sizes) - held_out
    return Corpus(
        lambda: islice(text.read(), kept),
        lambda: islice(text.read(), kept, None),
        f"{text.about}; validation: the last {_count(held_out)} of it",
    )


def _tail(sizes: Sequence[int]) -> int:
    """Returns how many documents at the end to hold out: at least one, and all but one at most."""
    wanted, held_out = _held_out_bytes(sum(sizes)), 0
    while wanted > 0 and held_out < len(sizes) - 1:
        held_out += 1
        wanted -= sizes[-held_out]
    return held_out


def _held_out_bytes(size: int) -> float:
    return max(_HELD_OUT * size, min(_HELD_OUT_BYTES, _HELD_OUT_MOST * size))


def _split_document(text: _Files) -> Corpus:
    """Holds out the end of a single document, from a white space on."""
    (document,) = text.read()
    share = _held_out_bytes(text.sizes[0]) / text.sizes[0]
    cut = next((i for i in range(int(len(document) * (1 - share)), 0, -1) if document[i].isspace()), 0)
    if not cut:
        raise SlmError(f"too little text in {text.files[0]} to hold some out", "name validation text with --val")
    return Corpus(
        lambda: iter([document[:cut]]),
        lambda: iter([document[cut:]]),
        f"{text.about}; validation: the last {len(document) - cut:,} characters of it",
    )


def _sample() -> Corpus:
    train, validation = _Files([sample.stories_path()]), _Files([sample.validation_path()])
    about = f"the stories that ship with slm, {_count(len(train.sizes))}; validation: {len(validation.sizes)} more"
    return Corpus(train.read, validation.read, about)


def _tinystories() -> Corpus:
    """Opens TinyStories (Eldan & Li 2023, arXiv:2305.07759; CDLA-Sharing-1.0), downloaded once and then cached."""
    import datasets

    # Its five warnings about five retries say no more than the one error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        splits: Any = datasets.load_dataset(_TINYSTORIES_ID)
    except Exception as error:  # whichever of datasets', huggingface_hub's and httpx's errors it is
        raise SlmError(
            f"{_TINYSTORIES_ID} could not be downloaded ({type(error).__name__})",
            "--data sample needs no network; --data FILE trains on your own text",
        ) from None

    def read(split: str) -> Documents:
        rows = splits[split]
        return lambda: (text for row in rows if (text := row["text"].strip("\r\n")))

    count = {split: len(splits[split]) for split in ("train", "validation")}
    about = f"{_TINYSTORIES_ID}, {_count(count['train'])}; validation: its own {_count(count['validation'])}"
    return Corpus(read("train"), read("validation"), about)


def _count(documents: int) -> str:
    return f"{documents:,} document{'' if documents == 1 else 's'}"
