"""Creates a dataset on a cluster. The bytes are those of `slm.train.data.preparation`, with any number of machines.

The stages: every file is read once; documents are examined, if any can be removed; those that remain are encoded, part by part;
shards are put together from the parts. Each stage keeps what it has done in the shared directory, so that the same command
continues after an interruption.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm.core.errors import SlmError
from slm.core.files import write_text
from slm.core.progress import Progress
from slm.core.text.files import DATASET_FILE
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.train.data.cluster.jobs import Cluster, Job, run_jobs
from slm.train.data.cluster.layout import Part, packed, parts_of, shards_of
from slm.train.data.cluster.store import PARTIAL, Store, scratch_directory, writable
from slm.train.data.corpus import Corpus, Reading, Scan
from slm.train.data.dataset import DatasetManifest, Split
from slm.train.data.preparation import (
    SEEN_FILE,
    STARTING_OVER,
    DatasetSettings,
    check_out,
    finish,
    go_on_or_start,
    settings_sha256,
    tokenizer_in,
    work_directory,
)
from slm.train.data.remote.datasets import check_remote_out, publish
from slm.train.data.remote.locations import beside, is_remote
from slm.train.data.selection.findings import size_of
from slm.train.data.selection.selector import Selector, selecting
from slm.train.data.selection.settings import SelectionRecord
from slm.train.data.shards import Shard, no_text
from slm.train.data.sources import TextSource
from slm.train.data.tokens import dtype_name
from slm.version import __version__

_SPLITS = ("validation", "train")
_STATE_FILE = "state.json"
# The directory of what the tasks of parts write, in the store.
_PARTS = "parts"


def scanning(cluster: Cluster, progress: Progress, most: int | None = None) -> Scan:
    """Returns a function for `open_corpus` that reads the files on a cluster."""

    def scan(files: Sequence[TextSource], reading: Reading) -> Iterator[Iterable[tuple[int, int]]]:
        base = {"column": reading.column, "limit": reading.limit} | _versions(DatasetSettings())
        jobs = [
            Job(f"reading {file}", "scan", base | {"source": file.spec, "index": index})
            for index, file in enumerate(files)
        ]
        found: dict[int, bytes] = {}
        progress.start("reading text", len(jobs), "files")
        try:
            ended = run_jobs(jobs, cluster, progress, most)
            for index in range(len(jobs)):
                while index not in found:
                    job, result = next(ended)
                    found[job.spec["index"]] = result
                    progress.advance()
                sizes = np.frombuffer(found.pop(index), np.uint64).reshape(-1, 2)
                yield ((int(size), int(characters)) for size, characters in sizes)
        finally:
            progress.finish()

    return scan


def prepare_on_cluster(
    corpus: Corpus,
    out: Path | str,
    settings: DatasetSettings,
    cluster: Cluster,
    progress: Progress,
    *,
    most: int | None = None,
    overwrite: bool = False,
) -> tuple[DatasetManifest, Tokenizer]:
    """Creates a dataset on a cluster, continuing where the same preparation was interrupted.

    Args:
        corpus: The text: whole documents of files that all machines can read.
        out: The directory to create: a path on storage that all machines share, or an address.
        settings: As for `prepare_dataset`.
        cluster: The machines.
        progress: Receives progress and notes.
        most: Maximum number of tasks that run at once; the bytes do not depend on it.
        overwrite: Whether a dataset there may be replaced.

    Returns:
        The manifest and the tokenizer.

    Raises:
        SlmError: When the directory is taken or in use, or text, tokenizer or the cluster fail.
    """
    if corpus.files is None:
        raise SlmError(
            "a cluster divides the text by files and documents, and this text is one document or a named dataset",
            "name files, such as hf://datasets/OWNER/NAME, and validation text with --val",
        )
    remote = isinstance(out, str)
    with (
        _remote_work(out, overwrite) if isinstance(out, str) else _local_work(out, overwrite, progress) as (work, store)
    ):
        sha256 = settings_sha256(corpus, settings)
        if remote:
            _restore(store, work, sha256, progress)
        else:
            go_on_or_start(work, sha256, progress)
        made = _Preparation(corpus, settings, cluster, progress, most, work, store, sha256)
        manifest = made.run()
        write_text(work / DATASET_FILE, manifest.to_json())
        if isinstance(out, str):
            store.write(DATASET_FILE, manifest.to_json().encode())
            publish(out, manifest, store.copy, progress)
            store.clear(_STATE_FILE)
        else:
            finish(work, out.resolve(), manifest, sha256)
    return manifest, made.tokenizer


@contextmanager
def _local_work(out: Path, overwrite: bool, progress: Progress) -> Iterator[tuple[Path, Store]]:
    out = out.resolve()
    check_out(out, overwrite=overwrite)
    with work_directory(out, progress) as work, writable(str(out)):
        # Tasks that were killed while they wrote.
        for left in work.rglob(f".*{PARTIAL}"):
            left.unlink(missing_ok=True)
        yield work, Store(str(work))


@contextmanager
def _remote_work(address: str, overwrite: bool) -> Iterator[tuple[Path, Store]]:
    check_remote_out(address, overwrite=overwrite)
    with scratch_directory() as scratch:
        yield scratch, Store(unfinished_at(address))


def unfinished_at(address: str) -> str:
    """Returns the address where the unfinished parts of a dataset are.

    Raises:
        SlmError: When the dataset's address is a whole bucket.
    """
    name = address.rstrip("/").rpartition("/")[2]
    return beside(address, f".{name}.unfinished")


def _restore(store: Store, work: Path, sha256: str, progress: Progress) -> None:
    """Copies the tokenizer of an unfinished remote dataset to the local directory, or removes a dataset of other settings."""
    if store.done(_STATE_FILE, sha256) is None:
        if store.exists:
            progress.note(STARTING_OVER)
            store.clear(_STATE_FILE)
        return
    for name in (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE):
        (work / name).write_bytes(store.read(name))
    progress.note("going on with the unfinished dataset")


def _versions(settings: DatasetSettings) -> dict[str, Any]:
    return {
        "selection": settings.selection.model_dump(),
        "versions": {"slm": __version__} | settings.selection.versions(),
    }


class _Encoded(NamedTuple):
    """A part that was encoded: its job's key, which changes with its contents, and its number of documents."""

    part: Part
    key: str
    documents: int


class _Preparation:
    """The stages of one preparation."""

    def __init__(
        self,
        corpus: Corpus,
        settings: DatasetSettings,
        cluster: Cluster,
        progress: Progress,
        most: int | None,
        work: Path,
        store: Store,
        sha256: str,
    ) -> None:
        self._corpus, self._settings, self._selection = corpus, settings, settings.selection
        self._cluster, self._progress, self._most = cluster, progress, most
        self._work, self._store, self._sha256 = work, store, sha256
        self._base = {
            "store": store.root,
            "column": corpus.column,
            "limit": corpus.limit,
        } | _versions(settings)
        assert corpus.files is not None
        train, validation = corpus.files
        self._parts = {"validation": parts_of("validation", validation), "train": parts_of("train", train)}
        self.tokenizer = tokenizer_in(work, corpus, settings)
        if is_remote(store.root):
            for name in (TOKENIZER_CONFIG_FILE, TOKENIZER_FILE):
                store.write(name, (work / name).read_bytes())
            store.note(_STATE_FILE, sha256, True)

    def run(self) -> DatasetManifest:
        """Runs all stages, and returns the manifest."""
        kept: dict[str, str] = {}
        duplicates: Counter[str] = Counter()
        record: SelectionRecord | None = None
        if self._selection.selects:
            self._examine()
            with (
                scratch_directory() as scratch,
                selecting(self._selection, scratch / SEEN_FILE) as selector,
            ):
                kept = self._select(selector)
                duplicates, record = selector.duplicates, selector.record()
        encoded = self._encode(kept)
        splits = self._shards(encoded, duplicates)
        return DatasetManifest(
            slm_version=__version__,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            dtype=dtype_name(self.tokenizer),
            train=splits["train"],
            validation=splits["validation"],
            held_out=self._corpus.held_out,
            deduplicated=self._selection.deduplicate,
            sources=self._corpus.sources,
            licence=self._corpus.licence if self._settings.licence is None else self._settings.licence,
            selection=record,
        )

    def _examine(self) -> None:
        jobs = [self._part_job("examine", part) for split in _SPLITS for part in self._parts[split]]
        self._results("examining text", jobs)

    def _select(self, selector: Selector) -> dict[str, str]:
        """Decides, in the order of the text, which documents remain; returns a hash of the decisions for each part."""
        size, kept = size_of(self._selection), {}
        parts = [part for split in _SPLITS for part in self._parts[split]]
        self._progress.start("comparing documents", sum(part.documents for part in parts), "documents")
        try:
            for part in parts:
                found = self._store.read(f"parts/{part.name}.findings")
                places = range(0, len(found) + 1, size)
                bits = packed([selector.keeps(found[start:stop], part.split) for start, stop in pairwise(places)])
                self._store.write(f"parts/{part.name}.kept", bits)
                kept[part.name] = hashlib.sha256(bits).hexdigest()
                self._progress.advance(part.documents)
        finally:
            self._progress.finish()
        return kept

    def _encode(self, kept: dict[str, str]) -> dict[str, list[_Encoded]]:
        parts = [part for split in _SPLITS for part in self._parts[split]]
        jobs = {part.name: self._part_job("encode", part, kept=kept.get(part.name)) for part in parts}
        results = self._results("tokenizing text", list(jobs.values()))
        found = {
            part.name: _Encoded(part, jobs[part.name].spec["key"], results[jobs[part.name].name]["documents"])
            for part in parts
        }
        return {split: [found[part.name] for part in self._parts[split]] for split in _SPLITS}

    def _shards(self, encoded: dict[str, list[_Encoded]], duplicates: Counter[str]) -> dict[str, Split]:
        jobs: dict[str, list[Job]] = {}
        for split in _SPLITS:
            if not any(each.documents for each in encoded[split]):
                raise no_text(split)
            keys = {each.part.name: each.key for each in encoded[split]}
            jobs[split] = [self._job("hash", split, list(keys.values()), split=split, parts=list(keys))]
            for number, shard in enumerate(shards_of(self._indices(encoded[split]), self._settings.shard_tokens)):
                slices = [each.to_json() for each in shard]
                jobs[split].append(
                    self._job(
                        "shard",
                        f"{split}-{number:05}",
                        [keys[each.part] for each in shard],
                        split=split,
                        number=number,
                        slices=slices,
                        dtype=dtype_name(self.tokenizer),
                        tokenizer_sha256=self.tokenizer.sha256,
                    )
                )
        results = self._results("writing shards", [job for split in _SPLITS for job in jobs[split]])
        return {
            split: Split.of(
                tuple(Shard.model_validate(results[job.name]) for job in jobs[split][1:]),
                results[jobs[split][0].name],
                duplicates[split],
            )
            for split in _SPLITS
        }

    def _indices(self, encoded: Iterable[_Encoded]) -> Iterator[tuple[str, Any, Any]]:
        for each in encoded:
            index = np.frombuffer(self._store.read(f"parts/{each.part.name}.index"), np.uint64).reshape(-1, 2)
            yield each.part.name, index[:, 0], index[:, 1]

    def _part_job(self, task: str, part: Part, **more: Any) -> Job:
        ranges = [[each.source.spec, each.first, each.documents] for each in part.ranges]
        return self._job(task, part.name, ranges, part=part.name, ranges=ranges, documents=part.documents, **more)

    def _job(self, task: str, name: str, inputs: Any, **fields: Any) -> Job:
        """Returns a job whose key changes with everything that its result depends on."""
        text = json.dumps([self._sha256, task, inputs, fields], sort_keys=True)
        spec = (
            self._base
            | fields
            | {
                "done": f"{_PARTS}/{task}-{name}.done",
                "key": hashlib.sha256(text.encode()).hexdigest(),
            }
        )
        return Job(f"{task} {name}", task, spec)

    def _results(self, what: str, jobs: list[Job]) -> dict[str, Any]:
        """Runs the jobs that are not done yet, and returns the results of all by name."""
        # One listing: a request for each job that was not done would take hours for a large text in an object store.
        noted = self._store.names(_PARTS)
        results = {
            job.name: self._store.done(job.spec["done"], job.spec["key"]) if job.spec["done"] in noted else None
            for job in jobs
        }
        missing = [job for job in jobs if results[job.name] is None]
        if len(missing) < len(jobs):
            self._progress.note(f"{what}: {len(jobs) - len(missing)} of {len(jobs)} parts were finished before")
        self._progress.start(what, len(jobs), "parts")
        self._progress.advance(len(jobs) - len(missing))
        try:
            for job, result in run_jobs(missing, self._cluster, self._progress, self._most):
                results[job.name] = json.loads(result)
                self._progress.advance()
        finally:
            self._progress.finish()
        return results
