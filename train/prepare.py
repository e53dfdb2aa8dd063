"""Preparation: text or a prepared dataset becomes a run directory with its tokenizer, its tokens and its resolved recipe."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.core.chat import tokenizer_config
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, write_text
from slm.core.machine import usable_cores
from slm.core.progress import Progress
from slm.core.tokenizer import Tokenizer
from slm.train.data.corpus import is_named, open_corpus
from slm.train.data.dataset import DATASET_FILE, DatasetManifest, is_dataset, open_dataset, refer_to
from slm.train.data.preparation import beginning, write_dataset
from slm.train.data.tokenizer import check_vocabulary, resolve_tokenizer
from slm.train.recipe import Recipe

CONFIG = "config.yaml"
DATA = "data"

# Processes that tokenize. Reading and hashing in the one that writes keep no more than these busy.
_MOST_WORKERS = 8


def prepare(recipe: Recipe, run: Path, progress: Progress) -> None:
    """Makes a run directory that is ready to train in, or none.

    Text becomes a dataset in the run; a dataset that `slm data prepare` made stays where it is and is referred to.

    Args:
        recipe: Names data and tokenizer; saved with the paths made absolute.
        run: The directory to make; an empty one will do.
        progress: Is told how it goes.

    Raises:
        SlmError: When the directory is taken, the data cannot be read or is too short, or the tokenizer cannot be had.
    """
    _check_free(run)
    data = recipe.data
    prepared = len(data.train) == 1 and not is_named(data.train[0]) and is_dataset(Path(data.train[0]).expanduser())
    with _new_directory(run):
        manifest = (_refer if prepared else _write)(recipe, run, progress)
        check_lengths(recipe, manifest)
        write_text(run / CONFIG, _with_absolute_paths(recipe.for_tokens(manifest.train.tokens)).to_yaml())


def _write(recipe: Recipe, run: Path, progress: Progress) -> DatasetManifest:
    """Makes the run's own dataset."""
    corpus = open_corpus(recipe.data.train, recipe.data.validation)
    progress.note(f"data: {corpus.about}")
    config = recipe.model.config()
    tokenizer = resolve_tokenizer(
        recipe.data.tokenizer, beginning(corpus.train), config.vocab_size, config.max_position_embeddings
    )
    with atomic_directory(run / DATA, ()) as directory:
        manifest = write_dataset(directory, corpus, tokenizer, progress, workers=min(usable_cores(), _MOST_WORKERS))
    return manifest


def _refer(recipe: Recipe, run: Path, progress: Progress) -> DatasetManifest:
    """Refers to a prepared dataset, whose tokenizer becomes the run's."""
    path = Path(recipe.data.train[0]).expanduser()
    if recipe.data.validation is not None:
        raise SlmError(f"{path} is a prepared dataset with its own validation text", "leave --val out")
    dataset, config = open_dataset(path), recipe.model.config()
    progress.note(
        f"data: {path}, prepared: {dataset.manifest.train.tokens:,} tokens to train on, "
        f"{dataset.manifest.validation.tokens:,} to measure on"
    )
    max_length = config.max_position_embeddings
    tokenizer = Tokenizer(dataset.tokenizer.backend, tokenizer_config(max_length))
    wanted = recipe.data.tokenizer
    if wanted != "bpe" and resolve_tokenizer(wanted, (), config.vocab_size, max_length).sha256 != tokenizer.sha256:
        raise SlmError(
            f"{path} was made with another tokenizer than {wanted}",
            f"--tokenizer bpe takes the dataset's own; slm data prepare --tokenizer {wanted} makes another dataset",
        )
    check_vocabulary(tokenizer, config.vocab_size)
    with atomic_directory(run / DATA, ()) as directory:
        tokenizer.save(directory)
        write_text(directory / DATASET_FILE, refer_to(path).model_dump_json(indent=2) + "\n")
    return dataset.manifest


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


def check_lengths(recipe: Recipe, manifest: DatasetManifest) -> None:
    """Makes sure that there is a window to train on and one to measure on.

    Raises:
        SlmError: When a text is too short.
    """
    measured = recipe.evaluation.context
    for split, name, context, value in (
        (manifest.train, "training", recipe.batch.context, "batch.context"),
        (
            manifest.validation,
            "validation",
            measured or recipe.batch.context,
            "evaluation.context" if measured else "batch.context",
        ),
    ):
        if split.tokens <= context:
            raise SlmError(
                f"the {name} text is too short: {split.tokens:,} tokens, and a window takes {context:,} and one more",
                f"give more text, or --set {value}={max(2, split.tokens // 2)}",
            )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def absolute(name: str) -> str:
        return name if is_named(name) else str(Path(name).expanduser().resolve())

    data = recipe.data
    resolved = data.model_copy(
        update={
            "train": tuple(absolute(name) for name in data.train),
            "validation": None if data.validation is None else absolute(data.validation),
            "tokenizer": data.tokenizer if data.tokenizer in ("gpt2", "bpe") else absolute(data.tokenizer),
        }
    )
    return recipe.model_copy(update={"data": resolved})
