"""Preparation of a run directory from text or a prepared dataset: tokenizer, tokens and resolved recipe."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from slm.core import renames
from slm.core.chat import tokenizer_config
from slm.core.checkpoint import CHECKPOINT_FILES
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_text, write_text
from slm.core.locks import held
from slm.core.machine import usable_cores
from slm.core.progress import Progress
from slm.core.text.cuts import PieceEncoder
from slm.core.text.files import DATASET_FILE, find_files, is_dataset
from slm.core.tokenizer import Tokenizer
from slm.train.build import positions_of
from slm.train.data.corpus import SAMPLE, Corpus, Documents, Reading, is_named, open_corpus
from slm.train.data.dataset import Dataset, open_dataset, open_remote, refer_to
from slm.train.data.preparation import beginning, write_dataset
from slm.train.data.remote.locations import file_system, is_remote, without_file_protocol
from slm.train.data.remote.text import is_remote_dataset
from slm.train.data.shards import ShardWriter
from slm.train.data.tokenizer import check_vocabulary, is_choice, resolve_tokenizer
from slm.train.data.tokens import Tokens
from slm.train.recipe import Recipe
from slm.train.teacher import check_teacher, teacher_paths

CONFIG = "config.yaml"
DATA = "data"
# Names the call of torchrun that began the run.
LAUNCH = "launch.txt"

# Processes that tokenize. The writing process reads and hashes, and cannot keep more of them busy.
_MOST_WORKERS = 8
# A text of this many bytes per needed token is long enough with any tokenizer: English has 4 bytes per token.
_BYTES_ENOUGH = 64

# Files of a run that ended before it saved anything, and files that a killed run leaves half written.
_PARTIAL = r"(checkpoint/)?\.[^/]+\.(partial-\d+(/.*)?|lock)"
_UNSAVED = re.compile(
    r"config\.yaml|launch\.txt|metrics\.jsonl|loss\.png|checkpoint|data|tensorboard|tensorboard/events\.out\.tfevents\.[^/]+"
    rf"|data/(dataset|tokenizer|tokenizer_config)\.json|data/(train|validation)\.bin|{_PARTIAL}"
)
# Files of a run that has saved.
_SAVED = re.compile(
    rf"(trainer|rewind)(/[\w.]+)?|checkpoint/(best|last|update-\d+)(/({'|'.join(map(re.escape, sorted(CHECKPOINT_FILES)))}))?"
)


def prepare(
    recipe: Recipe, run: Path, progress: Progress, *, overwrite: bool = False, launch: str | None = None
) -> None:
    """Creates a run directory that is ready for training, or none.

    Text becomes a dataset in the run. A dataset of `slm data prepare` stays where it is, and the run refers to it.

    Args:
        recipe: The recipe, which names data and tokenizer; saved with absolute paths.
        run: The directory to create. It may be empty, or left by a run that saved nothing.
        progress: Receives progress and notes.
        overwrite: Whether another run there may be replaced; if the preparation fails, it is kept.
        launch: What names the call of torchrun that starts the run, by which its restarts find it; see `begun_by`.

    Raises:
        SlmError: When the directory is taken, the data cannot be read or is too short, or the tokenizer is not available.
    """
    check_free(run, overwrite=overwrite)
    teacher_paths(recipe)  # raises if one is missing, before the text is read
    dataset = prepared_dataset(recipe, progress)
    if dataset is not None:
        progress.note(
            f"data: {recipe.data.train[0]}, prepared: {dataset.manifest.train.tokens:,} tokens to train on, "
            f"{dataset.manifest.validation.tokens:,} to measure on"
        )
        check_teachers(recipe, dataset.tokenizer)
        with _new_directory(run, progress, overwrite):
            _refer(dataset, run)
            _write_recipe(recipe, dataset.train, run, launch)
        return
    corpus = open_corpus(recipe.data.train, recipe.data.validation, _reading(recipe))
    progress.note(f"data: {corpus.about}")
    tokenizer = _tokenizer(recipe, corpus)
    check_teachers(recipe, tokenizer)
    with _new_directory(run, progress, overwrite):
        with atomic_directory(run / DATA, ()) as directory:
            workers = min(usable_cores(), _MOST_WORKERS)
            manifest = write_dataset(ShardWriter(directory, tokenizer, progress, workers=workers), corpus)
        check_lengths(recipe, manifest.train.tokens, manifest.validation.tokens)
        _write_recipe(recipe, open_dataset(run / DATA).train, run, launch)


def begun_by(launch: str | None, candidates: Iterable[Path]) -> Path | None:
    """Returns the run that a call of torchrun began, which its restarts continue; None if there is none.

    Args:
        launch: What names the call.
        candidates: The directories in which the run may be.
    """
    for run in candidates if launch is not None else ():
        file = run / LAUNCH
        if file.is_file() and (run / CONFIG).is_file() and read_text(file, LAUNCH).strip() == launch:
            return run
    return None


def prepared_dataset(recipe: Recipe, progress: Progress | None = None) -> Dataset | None:
    """Opens the prepared dataset that a recipe names, its tokenizer set up for the model; None if it names text.

    Args:
        recipe: The recipe.
        progress: Receives notes about a remote dataset that is fetched.

    Raises:
        SlmError: When it is damaged, has a larger vocabulary than the model or too few tokens, or when the recipe names
            validation text or another tokenizer as well.
    """
    data, config = recipe.data, recipe.model.config()
    name = without_file_protocol(data.train[0])
    path = Path(name).expanduser()
    if len(data.train) > 1 or is_named(name) or not (is_remote_dataset(name) if is_remote(name) else is_dataset(path)):
        return None
    if data.validation is not None:
        raise SlmError(f"{name} is a prepared dataset with its own validation text", "leave --val out")
    dataset = open_remote(name, progress) if is_remote(name) else open_dataset(path)
    max_length = config.max_position_embeddings
    tokenizer = Tokenizer(dataset.tokenizer.backend, tokenizer_config(max_length))
    if not is_choice(data.tokenizer, tokenizer, max_length):
        raise SlmError(
            f"{name} was made with another tokenizer than {data.tokenizer}",
            f"--tokenizer bpe takes the dataset's own; slm data prepare --tokenizer {data.tokenizer} makes another dataset",
        )
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    check_lengths(recipe, dataset.manifest.train.tokens, dataset.manifest.validation.tokens)
    return replace(dataset, tokenizer=tokenizer)


def check_text(recipe: Recipe) -> int | None:
    """Checks that a run can be prepared from the text that a recipe names, without writing anything.

    Returns:
        UTF-8 bytes of the training text; None if it would have to be downloaded, and was not checked.

    Raises:
        SlmError: As `prepare`.
    """
    data, config = recipe.data, recipe.model.config()
    if any(is_named(name) and name != SAMPLE for name in data.train):
        if data.validation is not None:
            _check_file(data.validation)
        if data.tokenizer not in ("gpt2", "bpe"):
            resolve_tokenizer(data.tokenizer, (), config.vocab_size, config.max_position_embeddings)
        return None
    corpus = open_corpus(data.train, data.validation, _reading(recipe))
    texts = (corpus.train, corpus.validation)
    sizes = [sum(len(document.encode()) for document in documents()) for documents in texts]
    needed = _needed_tokens(recipe)
    surely = [size >= _BYTES_ENOUGH * tokens for size, tokens in zip(sizes, needed, strict=True)]
    if data.tokenizer != "bpe" or recipe.distillation.teachers or not all(surely):
        tokenizer = _tokenizer(recipe, corpus)
        check_teachers(recipe, tokenizer)
        counts = (
            enough if sure else _count(documents, tokenizer, enough)
            for documents, enough, sure in zip(texts, needed, surely, strict=True)
        )
        check_lengths(recipe, *counts)
    return sizes[0]


def _check_file(name: str) -> None:
    if is_remote(name):
        file_system(name)
    else:
        find_files(Path(without_file_protocol(name)).expanduser())


def _reading(recipe: Recipe) -> Reading:
    return Reading(column=recipe.data.column, limit=recipe.data.max_document_bytes)


def _needed_tokens(recipe: Recipe) -> tuple[int, int]:
    """Returns the tokens of a window with its targets, for training and for evaluation."""
    return recipe.batch.context + 1, (recipe.evaluation.context or recipe.batch.context) + 1


def check_lengths(recipe: Recipe, train_tokens: int, validation_tokens: int) -> None:
    """Checks that there is at least one window for training and one for evaluation.

    Raises:
        SlmError: When a text is too short.
    """
    measured = "evaluation.context" if recipe.evaluation.context else "batch.context"
    for name, tokens, needed, value in zip(
        ("training", "validation"),
        (train_tokens, validation_tokens),
        _needed_tokens(recipe),
        ("batch.context", measured),
        strict=True,
    ):
        if tokens < needed:
            raise SlmError(
                f"the {name} text is too short: {tokens:,} tokens, and a window takes {needed - 1:,} and one more",
                f"give more text, or --set {value}={max(2, tokens // 2)}",
            )


def check_free(run: Path, *, overwrite: bool = False) -> None:
    """Checks that a new run may use a directory: none exists, or it is empty or left by a run that saved nothing.

    Args:
        run: The directory.
        overwrite: Whether a run there may be replaced; nothing else ever is.

    Raises:
        SlmError: When it is a file, holds a run that can be resumed or files that are not slm's, or when another process
            uses it.
    """
    if run.exists() and not run.is_dir():
        raise SlmError(f"not a directory: {run}", "name another with --out")
    if run.is_dir():
        with held(run) as alone:
            _check_contents(run, alone, overwrite)


def _check_contents(run: Path, alone: bool, overwrite: bool) -> None:
    if not any(run.iterdir()) or (alone and _is_unsaved(run)):
        return
    if overwrite:
        foreign = _foreign(run)
        if foreign is None:
            return
        raise SlmError(f"{run} holds something that is not of its training: {foreign}", "name another with --out")
    goes_on = f"slm train --resume --out {run} goes on with the run that is there; or "
    replaces = "--overwrite replaces it; or " if _foreign(run) is None else ""
    raise SlmError(
        f"the run directory is not empty: {run}",
        f"{goes_on + replaces if (run / CONFIG).is_file() else ''}name another with --out",
    )


def _foreign(run: Path) -> str | None:
    """Returns a file in a directory that no training run writes; None if there is none."""
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if not (_UNSAVED.fullmatch(name) or _SAVED.fullmatch(name)) or path.is_symlink():
            return name
    return None if (run / CONFIG).is_file() else CONFIG


def _is_unsaved(run: Path) -> bool:
    """Returns whether a directory holds a run without a saved state, and nothing else."""
    paths = list(run.rglob("*"))
    names = [path.relative_to(run).as_posix() for path in paths]
    begun = (run / CONFIG).is_file() or all(re.fullmatch(_PARTIAL, name) for name in names)
    return begun and all(map(_UNSAVED.fullmatch, names)) and not any(path.is_symlink() for path in paths)


@contextmanager
def _new_directory(run: Path, progress: Progress, overwrite: bool) -> Iterator[None]:
    """Creates an empty directory. If the block fails, removes it and the parents that were created with it.

    A run that is to be replaced is moved aside meanwhile, and moved back if the block fails.
    """
    made = next((parent for parent in (*reversed(run.parents), run) if not parent.exists()), None)
    run.mkdir(parents=True, exist_ok=True)
    with held(run) as alone:
        _check_contents(run, alone, overwrite)
        aside = run.parent / f".{run.name}.replaced-{os.getpid()}"
        try:
            if _is_unsaved(run) and any(run.iterdir()):
                progress.note(f"the run that was begun in {run} saved nothing: starting anew there")
                _clear(run)
            elif any(run.iterdir()):
                aside.mkdir()
                _move(run, aside)
            yield
            renames.remove_leftovers(aside)
        except BaseException:
            if made is None:
                _clear(run)
                if aside.is_dir():
                    _move(aside, run)
                    aside.rmdir()
            else:
                renames.remove_leftovers(run)
                with suppress(OSError):  # a parent is not empty: on Windows it has the lock
                    for parent in run.parents[: len(run.parts) - len(made.parts)]:
                        parent.rmdir()
            raise


def _move(directory: Path, other: Path) -> None:
    for path in list(directory.iterdir()):
        renames.replace(path, other / path.name)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            renames.remove_tree(path)
        else:
            renames.remove_file(path)


def _tokenizer(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    config = recipe.model.config()
    return resolve_tokenizer(
        recipe.data.tokenizer, beginning(corpus.train), config.vocab_size, config.max_position_embeddings
    )


def check_teachers(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Checks that the teachers can teach a model with this tokenizer.

    Raises:
        SlmError: When one cannot; see `slm.train.teacher.check_teacher`.
    """
    for path in teacher_paths(recipe):
        length, shorter = recipe.batch.context, "--set batch.context={}"
        check_teacher(path, tokenizer, recipe.model.config(), length, student="the run", shorter=shorter)


def _count(documents: Documents, tokenizer: Tokenizer, enough: int) -> int:
    """Returns the number of tokens of a text; stops counting once there are enough."""
    tokens, literal = 0, PieceEncoder(tokenizer)
    for document in documents():
        tokens += len(literal.encode(document)) + 1  # the end-of-text token
        if tokens >= enough:
            break
    return tokens


def _refer(dataset: Dataset, run: Path) -> None:
    """Writes a reference to a prepared dataset, and saves its tokenizer in the run."""
    with atomic_directory(run / DATA, ()) as directory:
        dataset.tokenizer.save(directory)
        write_text(directory / DATASET_FILE, refer_to(dataset.path, dataset.address).model_dump_json(indent=2) + "\n")


def _write_recipe(recipe: Recipe, tokens: Tokens, run: Path, launch: str | None) -> None:
    if launch is not None:
        write_text(run / LAUNCH, f"{launch}\n")
    write_text(run / CONFIG, _with_absolute_paths(recipe.for_tokens(positions_of(recipe, tokens))).to_yaml())


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def absolute(name: str) -> str:
        if is_named(name) or is_remote(name):
            return name
        return str(Path(without_file_protocol(name)).expanduser().resolve())

    data = recipe.data
    resolved = data.model_copy(
        update={
            "train": tuple(absolute(name) for name in data.train),
            "validation": None if data.validation is None else absolute(data.validation),
            "tokenizer": data.tokenizer if data.tokenizer in ("gpt2", "bpe") else absolute(data.tokenizer),
        }
    )
    teachers = tuple(str(Path(path).expanduser().resolve()) for path in recipe.distillation.teachers)
    distillation = recipe.distillation.model_copy(update={"teachers": teachers})
    return recipe.model_copy(update={"data": resolved, "distillation": distillation})
