"""Datasets that tests prepare: small ones, the hashes of their files, and the workers that tokenized them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm.core.progress import Silent
from slm.train.data.corpus import Reading, open_corpus
from slm.train.data.dataset import DatasetManifest
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.workers import _Pool

END = "\n<|endoftext|>\n"
SIZES = {"vocab_size": 300, "shard_tokens": 2000}
SETTINGS = DatasetSettings(**SIZES)


def make(
    out: str,
    *data: str,
    val: str | None = None,
    progress: Silent | None = None,
    reading: dict[str, Any] | None = None,
    workers: int = 1,
    **options: Any,
) -> DatasetManifest:
    """Prepares a dataset; the options replace the small sizes of `SIZES`."""
    corpus = open_corpus(data, val, Reading(**reading or {}))
    settings = DatasetSettings(**SIZES | options)
    return prepare_dataset(corpus, Path(out), settings, progress or Silent(), workers=workers)


def contents(directory: str) -> dict[str, str]:
    """The hash of every file in a dataset."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).iterdir())}


def all_ended(pools: Sequence[_Pool]) -> bool:
    """Whether no worker of these pools still runs."""
    return all(process.poll() is not None for pool in pools for process in pool._processes)
