"""Preparation of a dataset on this machine for an object store: made in the cache, then copied."""

import hashlib
from contextlib import suppress
from pathlib import Path

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.files import read_text, write_text
from slm.core.locks import sole
from slm.core.progress import Progress
from slm.core.runs import cached_data
from slm.core.tokenizer import Tokenizer
from slm.train.data.corpus import Corpus
from slm.train.data.dataset import check_files, open_dataset
from slm.train.data.preparation import DatasetSettings, prepare_dataset, settings_sha256
from slm.train.data.remote.cache import writable
from slm.train.data.remote.datasets import check_remote_out, publish
from slm.train.data.remote.locations import file_system


def prepare_remote_dataset(
    corpus: Corpus,
    address: str,
    settings: DatasetSettings,
    progress: Progress,
    *,
    workers: int = 1,
    overwrite: bool = False,
) -> Tokenizer:
    """Creates a dataset in an object store. After an interruption the same call continues.

    Args:
        corpus: The text.
        address: The directory to create, such as s3://bucket/stories.
        settings: As for `prepare_dataset`.
        progress: Receives progress and notes.
        workers: Number of processes that encode; the bytes do not depend on it.
        overwrite: Whether a dataset there may be replaced.

    Returns:
        The dataset's tokenizer.

    Raises:
        SlmError: When the address is taken or cannot be written, or as `prepare_dataset`.
    """
    check_remote_out(address, overwrite=overwrite)
    place = cached_data().with_name("unfinished") / hashlib.sha256(address.encode()).hexdigest()[:32]
    dataset, made_of = place / "dataset", place / "settings"
    wanted = settings_sha256(corpus, settings)
    with writable(), sole(place, doing=f"prepares {address}"):
        place.mkdir(parents=True, exist_ok=True)
        if not _is_whole(dataset, made_of, wanted):
            made_of.unlink(missing_ok=True)
            renames.remove_tree(dataset)
            prepare_dataset(corpus, dataset, settings, progress, workers=workers, overwrite=True)
            write_text(made_of, wanted + "\n")
        opened = open_dataset(dataset)
        store = file_system(address)

        def copy(name: str, target: str) -> None:
            store.put_file(str(dataset / name), target)

        publish(address, opened.manifest, copy, progress)
        tokenizer = opened.tokenizer
        del opened  # Windows does not remove mapped files
        renames.remove_tree(place)
    return tokenizer


def _is_whole(dataset: Path, made_of: Path, wanted: str) -> bool:
    """Returns whether a dataset of the settings was finished before, and none of its files was changed since."""
    with suppress(SlmError):
        if made_of.is_file() and read_text(made_of, "the state of the preparation").strip() == wanted:
            check_files(dataset, open_dataset(dataset).manifest)
            return True
    return False
