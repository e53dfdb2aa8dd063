"""Preparation: a corpus becomes a run directory with its tokenizer, its token files and its resolved recipe."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.files import atomic_directory, write_text
from slm.core.progress import Progress
from slm.core.tokenizer import Tokenizer
from slm.train.data.corpus import NAMED, Corpus, Documents, open_corpus
from slm.train.data.tokenizer import resolve_tokenizer
from slm.train.data.tokens import TokenHeader, write_tokens
from slm.train.recipe import Recipe

CONFIG = "config.yaml"
DATA = "data"
TRAIN_FILE = "train.bin"
VALIDATION_FILE = "validation.bin"

# A vocabulary of some ten thousand tokens gains nothing from more text than this.
_BPE_CHARACTERS = 64 << 20


def prepare(recipe: Recipe, run: Path, progress: Progress) -> None:
    """Makes a run directory that is ready to train in, or none.

    Args:
        recipe: Names data and tokenizer; saved with the paths made absolute.
        run: The directory to make; an empty one will do.
        progress: Is told how it goes.

    Raises:
        SlmError: When the directory is taken, the data cannot be read or is too short, or the tokenizer cannot be had.
    """
    _check_free(run)
    corpus = open_corpus(recipe.data.train, recipe.data.validation)
    progress.note(f"data: {corpus.about}")
    tokenizer = _make_tokenizer(recipe, corpus)
    with _new_directory(run), atomic_directory(run / DATA, ()) as data:
        tokenizer.save(data)
        for file, documents, name in (
            (TRAIN_FILE, corpus.train, "training"),
            (VALIDATION_FILE, corpus.validation, "validation"),
        ):
            header = write_tokens(data / file, documents(), tokenizer, progress, f"{name} text")
            _check_length(header, recipe.batch.context, name)
        write_text(run / CONFIG, _with_absolute_paths(recipe).to_yaml())


def _check_free(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise SlmError(f"not a directory: {run}", "name another with --out")
    if run.is_dir() and any(run.iterdir()):
        raise SlmError(
            f"the run directory is not empty: {run}",
            f"slm train --resume --out {run} goes on with what is there; or name another with --out",
        )


@contextmanager
def _new_directory(path: Path) -> Iterator[None]:
    """Removes what the block made of the directory and the ones above it, unless the block ends well."""
    made = next((parent for parent in (*reversed(path.parents), path) if not parent.exists()), None)
    try:
        yield
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _make_tokenizer(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    config = recipe.model.config()
    texts = _beginning(corpus.train)
    return resolve_tokenizer(recipe.data.tokenizer, texts, config.vocab_size, config.max_position_embeddings)


def _beginning(documents: Documents) -> Iterator[str]:
    characters = 0

    def fits(document: str) -> bool:
        nonlocal characters
        before, characters = characters, characters + len(document)
        return before < _BPE_CHARACTERS

    return takewhile(fits, documents())


def _check_length(header: TokenHeader, context: int, name: str) -> None:
    if header.tokens <= context:
        raise SlmError(
            f"the {name} text is too short: {header.tokens:,} tokens, and a window takes {context:,} and one more",
            f"give more text, or --set batch.context={max(2, header.tokens // 2)}",
        )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def absolute(name: str) -> str:
        return name if name in NAMED else str(Path(name).expanduser().resolve())

    data = recipe.data
    resolved = data.model_copy(
        update={
            "train": tuple(absolute(name) for name in data.train),
            "validation": None if data.validation is None else absolute(data.validation),
            "tokenizer": data.tokenizer if data.tokenizer in ("gpt2", "bpe") else absolute(data.tokenizer),
        }
    )
    return recipe.model_copy(update={"data": resolved})
