"""Prepared datasets in object stores: read through a local copy that is checked by hash, and written with the manifest last."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.files import read_json, sha256_file, write_text
from slm.core.outputs import OVERWRITE
from slm.core.progress import Progress, Silent
from slm.core.runs import cached_data
from slm.core.text.files import DATASET_FILE
from slm.core.text.streams import size as as_text
from slm.core.tokenizer import TOKENIZER_FILE
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.train.data.dataset import DatasetManifest, parse_manifest
from slm.train.data.remote.cache import entry
from slm.train.data.remote.locations import file_system, joined, reported
from slm.train.data.remote.text import fetch, is_remote_dataset
from slm.train.data.shards import Shard

_TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
# The files that a dataset can have, so that no manifest names another.
_NAMES = re.compile(r"(train|validation)-\d{5,}\.bin|dataset\.json|tokenizer(_config)?\.json")
# fsspec's removal and copying of several files expand patterns.
_PATTERN = re.compile(r"[*?\[\]]")
_CHECKED_FILE = "checked.json"
# The other processes of a run open the copy that the first one has just checked, and do not read all of it again.
_CHECKED_FOR_S = 600.0
# Limits on what is read before its hash is known.
_MANIFEST_BYTES, _TOKENIZER_BYTES = 64 << 20, 256 << 20
_AGAIN = "prepare it again, or copy it again"


def remote_manifest(address: str) -> tuple[DatasetManifest, bytes]:
    """Reads the manifest of a remote dataset.

    Returns:
        The manifest, and the contents of its file.

    Raises:
        SlmError: When there is none, or it is damaged.
    """
    file = joined(address, DATASET_FILE)
    with reported(file, "read"), file_system(address).open(file, "rb") as stream:
        content: bytes = stream.read(_MANIFEST_BYTES + 1)
    if len(content) > _MANIFEST_BYTES:
        raise SlmError(f"{file} is longer than {as_text(_MANIFEST_BYTES)}", _AGAIN)
    return _parsed(content, address), content


@contextmanager
def local_copy(address: str, sha256: str | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """Yields a complete local copy of a remote dataset, whose files were compared with the manifest.

    The block opens the files: afterwards another process may remove them to make room. Missing and damaged files are fetched.
    An interrupted copy continues after its last complete file.

    Args:
        address: The dataset.
        sha256: SHA-256 of its manifest, if it must be a certain one. Nothing is fetched if that dataset is in the cache.
        progress: Receives notes.

    Raises:
        SlmError: When it cannot be read, is another one, differs from its manifest, or does not fit into the cache.
    """
    manifest = _cached_manifest(sha256)
    if manifest is None:
        manifest, content = remote_manifest(address)
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256:
            raise SlmError(
                f"the dataset is not the one that the run was started with: {address}",
                "restore that dataset, or start a new run",
            )
        sha256 = found
    else:
        content = None
    assert sha256 is not None
    shards = {shard.file: shard for shard in (*manifest.train.shards, *manifest.validation.shards)}
    total = sum(shard.bytes for shard in shards.values())
    with entry("datasets", sha256, total, address) as place:
        if content is not None:
            _write(place / DATASET_FILE, content)
        for partial in place.glob("*.partial"):
            renames.remove_file(partial)
        checked = _Checked(place)
        wanted: dict[str, str | None] = {name: checked.sha256(name) for name in _TOKENIZER_FILES}
        wanted |= {name: shard.sha256 for name, shard in shards.items()}
        missing = [name for name, each in wanted.items() if each is None or not checked.holds(name, each)]
        if missing:
            size = sum(shards[name].bytes for name in missing if name in shards)
            (progress or Silent()).note(f"fetching {address}: {len(missing)} files, {as_text(size)}")
        for name in missing:
            _fetch(address, place, name, shards.get(name))
            checked.note(name, wanted[name] if name in shards else sha256_file(place / name))
        checked.save()
        try:
            yield place
        except SlmError:
            # The manifest has a hash of the tokenizer, which only loading it can compare: the next copy fetches it again.
            for name in _TOKENIZER_FILES:
                renames.remove_file(place / name)
            raise


def check_remote(address: str, manifest: DatasetManifest) -> None:
    """Compares every token file of a remote dataset with the manifest, byte for byte.

    Raises:
        SlmError: When a file is missing or was altered; the message names it.
    """
    store = file_system(address)
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        digest = hashlib.sha256()
        with reported(joined(address, shard.file), "read"), store.open(joined(address, shard.file), "rb") as stream:
            while block := stream.read(8 << 20):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            raise SlmError(f"{address}: {shard.file} was altered after it was made (SHA-256 differs)", _AGAIN)


def check_remote_out(address: str, *, overwrite: bool = False) -> None:
    """Checks that a dataset may be written to an address.

    Raises:
        SlmError: When the address has the characters of a pattern, or a dataset is there and may not be replaced, or something
            that is not a dataset's.
    """
    if _PATTERN.search(address):
        raise SlmError(
            f"the output {address} has one of the characters * ? [ ]",
            "name another --out: file systems take such a name for a pattern, and would remove what matches it",
        )
    if is_remote_dataset(address) and not overwrite:
        raise SlmError(f"there is a prepared dataset already: {address}", OVERWRITE)
    for name in _present(address):
        if not _NAMES.fullmatch(name):
            raise SlmError(f"{address} holds something that is not of a dataset: {name}", "name another --out")


def publish(address: str, manifest: DatasetManifest, copy: Callable[[str, str], None], progress: Progress) -> None:
    """Writes the files of a dataset to an address. The manifest is removed first and added last: no reader sees a mixture.

    Args:
        address: The directory; files of an earlier dataset there are replaced or removed.
        manifest: The dataset's manifest.
        copy: Copies the file of a name to an address.
        progress: Receives progress.

    Raises:
        SlmError: When the store cannot be written.
    """
    store, names = file_system(address), [name for name in manifest.files if name != DATASET_FILE]
    progress.start(f"writing {address}", len(names) + 1, "files")
    try:
        with reported(address, "write"):
            if is_remote_dataset(address):
                store.rm_file(joined(address, DATASET_FILE))
            for name in (*names, DATASET_FILE):
                copy(name, joined(address, name))
                progress.advance()
            for name in _present(address):
                if name not in manifest.files and _NAMES.fullmatch(name):
                    store.rm_file(joined(address, name))
    finally:
        progress.finish()


def _present(address: str) -> list[str]:
    """Returns the names of the files in a remote directory; none if it does not exist."""
    with reported(address, "list"):
        try:
            found = file_system(address).ls(address, detail=True)
        except FileNotFoundError:
            return []
        names = []
        for each in found:
            name = str(each["name"]).strip("/")
            # Consoles of stores create a directory as an empty object, which its listing can have.
            if not (address.rstrip("/").endswith(f"/{name}") and not each.get("size")):
                names.append(name.rpartition("/")[2])
        return names


def _cached_manifest(sha256: str | None) -> DatasetManifest | None:
    """Returns a manifest from the cache; None if it is not there or damaged."""
    if sha256 is None:
        return None
    file = cached_data() / "datasets" / sha256 / DATASET_FILE
    with suppress(OSError, SlmError):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            return _parsed(content, str(file.parent))
    return None


def _parsed(content: bytes, address: str) -> DatasetManifest:
    try:
        fields: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError):
        raise SlmError(f"{joined(address, DATASET_FILE)} is damaged: not JSON", _AGAIN) from None
    manifest = parse_manifest(fields, joined(address, DATASET_FILE))
    for name in manifest.files:
        if not _NAMES.fullmatch(name):
            raise SlmError(f"{joined(address, DATASET_FILE)} names a file that no dataset has: {name!r}", _AGAIN)
    return manifest


def _fetch(address: str, place: Path, name: str, shard: Shard | None) -> None:
    """Fetches a file, compares it with the manifest if it is a shard, and puts it in its place."""
    with reported(joined(address, name), "read"):
        size = int(file_system(address).size(joined(address, name)))
    if shard is not None and size != shard.bytes:
        raise SlmError(f"{joined(address, name)} has {size:,} bytes instead of {shard.bytes:,}", _AGAIN)
    if shard is None and size > _TOKENIZER_BYTES:
        raise SlmError(f"{joined(address, name)} is longer than {as_text(_TOKENIZER_BYTES)}", _AGAIN)
    partial = place / f"{name}.partial"
    fetch(joined(address, name), partial)
    if shard is not None and sha256_file(partial) != shard.sha256:
        renames.remove_file(partial)
        raise SlmError(f"{joined(address, name)} differs from the dataset's manifest (SHA-256)", _AGAIN)
    renames.replace(partial, place / name)


def _write(file: Path, content: bytes) -> None:
    if not file.is_file() or file.read_bytes() != content:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_bytes(content)
        renames.replace(partial, file)


class _Checked:
    """The record of the files of a copy: their hashes, and when they were compared with them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._files: dict[str, dict[str, Any]] = {}
        with suppress(SlmError):
            files = read_json(place / _CHECKED_FILE, _CHECKED_FILE)
            self._files = {name: record for name, record in files.items() if isinstance(record, dict)}

    def sha256(self, name: str) -> str | None:
        """Returns the hash that a file had when it was fetched."""
        found = self._files.get(name, {}).get("sha256")
        return found if isinstance(found, str) else None

    def holds(self, name: str, sha256: str) -> bool:
        """Returns whether a file is there with a hash. Reads it, unless another process did so in the last minutes."""
        file = self._place / name
        if not file.is_file():
            return False
        record = self._files.get(name, {})
        stat = file.stat()
        checked = record.get("checked")
        if (
            record.get("sha256") == sha256
            and record.get("state") == [stat.st_size, stat.st_mtime_ns]
            and isinstance(checked, int | float)
            and 0 <= time.time() - checked < _CHECKED_FOR_S
        ):
            return True
        if sha256_file(file) != sha256:
            return False
        self.note(name, sha256)
        return True

    def note(self, name: str, sha256: str | None) -> None:
        """Records that a file was compared with its hash."""
        stat = (self._place / name).stat()
        self._files[name] = {"sha256": sha256, "state": [stat.st_size, stat.st_mtime_ns], "checked": time.time()}

    def save(self) -> None:
        """Writes the record."""
        write_text(self._place / _CHECKED_FILE, json.dumps(self._files) + "\n")
