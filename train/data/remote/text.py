"""Remote text files: found below an address, fetched whole to the cache, and read from there."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.text.documents import read_parts
from slm.core.text.files import ACCEPTED, DATASET_FILE, compression, is_found, is_text, kind
from slm.train.data.remote.cache import entry
from slm.train.data.remote.locations import file_system, joined, reported

# Fields of a listing that change with a file's contents; each file system has others.
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")
# In an entry of the cache: size and time of the text when it was fetched.
_STATE_FILE = "fetched"
# Attempts to read a file that another process removes from the cache just then.
_ATTEMPTS = 3


@dataclass(frozen=True)
class RemoteFile:
    """A text file in an object store.

    Attributes:
        address: The address.
        bytes: Its size.
        tag: Name and value of a field that changes with its contents; "=" if the file system has none.
    """

    address: str
    bytes: int
    tag: str

    def __str__(self) -> str:
        return self.address

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Values that change with the text."""
        return (self.address, self.bytes, self.tag)

    @property
    def spec(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def check(self) -> None:
        """Does nothing: size and tag are compared when the file is fetched."""

    def parts(self, column: str, limit: int) -> Iterator[str]:
        """Yields the documents, as `slm.core.text.documents.read_parts`; errors name the address."""
        for attempt in range(_ATTEMPTS):
            local, begun = self._fetched(), False
            try:
                for part in read_parts(local, column, limit):
                    begun = True
                    yield part
                return
            except SlmError as error:
                if begun or local.exists() or attempt == _ATTEMPTS - 1:
                    raise SlmError(error.message.replace(str(local), self.address), error.hint) from None

    def _fetched(self) -> Path:
        """Returns the path of the copy in the cache, fetching it if there is none."""
        key = hashlib.sha256(repr(self.fingerprint).encode()).hexdigest()[:40]
        # The address may be too long for the name of a file, or have characters that lead to another directory.
        file = Path(PurePosixPath(self.address).name)
        with entry("files", key, self.bytes, self.address) as place:
            local = place / f"text{kind(file)}{compression(file)}"
            state = place / _STATE_FILE
            if local.is_file() and state.is_file() and state.read_text(encoding="ascii") == _state_of(local):
                return local
            partial = place / "partial"
            fetch(self.address, partial)
            if partial.stat().st_size != self.bytes or self._is_replaced():
                raise SlmError(f"{self.address} changed while it was read", "run the same command again")
            renames.replace(partial, local)
            state.write_text(_state_of(local), encoding="ascii", newline="")
        return local

    def _is_replaced(self) -> bool:
        """Returns whether the file at the address is another one now. Kinds of tags that cannot be compared are ignored."""
        files = file_system(self.address)
        with reported(self.address, "read"):
            now = _remote(files, files.info(self.address))
        (what, before), (name, after) = (tag.partition("=")[::2] for tag in (self.tag, now.tag))
        return now.bytes != self.bytes or (what == name and before != after)


def remote_files(address: str) -> list[RemoteFile]:
    """Returns the text file at an address, or all text files below it that are not hidden, sorted.

    Raises:
        SlmError: When there is none, it is a prepared dataset, or the store cannot be read.
    """
    files = file_system(address)
    with reported(address, "list"):
        about = files.info(address)
        if about["type"] == "file":
            if not is_text(Path(about["name"])):
                raise SlmError(f"unknown kind of file: {address}", ACCEPTED)
            return [_remote(files, about)]
        below = files.find(address, detail=True)
        root = str(about["name"]).rstrip("/")
        found = []
        for name, each in below.items():
            inner = PurePosixPath(str(name).removeprefix(root).lstrip("/"))
            if str(inner) == DATASET_FILE:
                raise SlmError(
                    f"a prepared dataset holds tokens, not text: {address}",
                    "only slm train --data accepts it, without other data; elsewhere name the original text",
                )
            if is_found(Path(inner)) and not any(part.startswith(".") for part in inner.parts):
                found.append((inner.parts, _remote(files, each)))
    if not found:
        raise SlmError(f"no .txt, .jsonl or .parquet file in {address}", ACCEPTED)
    return [file for _, file in sorted(found, key=lambda pair: pair[0])]


def fetch(address: str, local: Path) -> None:
    """Copies a remote file to a local one.

    Raises:
        SlmError: When it cannot be read.
    """
    with reported(address, "fetch"):
        file_system(address).get_file(address, str(local))


def is_remote_dataset(address: str) -> bool:
    """Returns whether there is a prepared dataset at an address.

    Raises:
        SlmError: When the store cannot be read.
    """
    with reported(address, "read"):
        return bool(file_system(address).isfile(joined(address, DATASET_FILE)))


def _remote(files: Any, about: dict[str, Any]) -> RemoteFile:
    name, tag = next(((name, about[name]) for name in _TAGS if about.get(name) is not None), ("", ""))
    # Some file systems give a time as an object in one listing, and as a number in another; Azure's tags have quotes in one.
    tag = tag.timestamp() if isinstance(tag, datetime) else str(tag).strip('"')
    return RemoteFile(str(files.unstrip_protocol(about["name"])), int(about["size"]), f"{name}={tag}")


def _state_of(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
