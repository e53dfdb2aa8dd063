"""The directory in which the machines of a cluster share their work: on a shared file system, or in an object store."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from slm.core import renames
from slm.core.errors import SlmError
from slm.train.data.remote.locations import file_system, is_remote, joined, reported

# The end of the name of a file that is being written; a task that was killed leaves it.
PARTIAL = ".partial"
_BLOCK = 8 << 20
_SHARED = "every machine must be able to read and write the output's directory"
_KEPT = "what is finished is kept, and the same command continues"
_SCRATCH = "temporary files"


@contextmanager
def writable(what: str = _SCRATCH) -> Iterator[None]:
    """Turns errors of writing local files into SlmErrors.

    Args:
        what: What is written, for messages: a file of the store, or by default temporary files of this machine.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = f"no space left on the disk for {what}", f"free some space: {_KEPT}"
        else:
            message, hint = f"cannot write {what} ({error.strerror or type(error).__name__})", _SHARED
        if what == _SCRATCH:
            hint = f"TMPDIR=DIR sets another directory for them, on each machine: {_KEPT}"
        raise SlmError(message, hint) from None


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yields an empty temporary directory of this machine.

    Raises:
        SlmError: When the block cannot write to it.
    """
    with writable(), TemporaryDirectory(prefix="slm-") as path:
        yield Path(path)


class Store:
    """Files by name, each whole or absent.

    Args:
        root: An absolute path, or an address.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._files = file_system(root) if is_remote(root) else None

    def place(self, name: str) -> str:
        """Returns the path or address of a file."""
        return joined(self.root, name) if self._files is not None else str(Path(self.root, name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a path to write; when the block ends, the file has its name. The last of several writers wins.

        Raises:
            SlmError: When it cannot be written.
        """
        if self._files is not None:
            with scratch_directory() as scratch:
                local = scratch / Path(name).name
                yield local
                with reported(self.place(name), "write"):
                    self._files.put_file(str(local), self.place(name))
            return
        target = Path(self.root, name)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        with writable(str(target)):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                yield partial
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
                renames.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yields the bytes of a file between two places, some MiB at a time.

        Raises:
            SlmError: When it is not there, cannot be read, or ends before `stop`.
        """
        # An error of the caller's, such as a full disk, does not enter the block of a generator.
        with self._open(name) as stream:
            stream.seek(start)
            while stop is None or start < stop:
                block: bytes = stream.read(_BLOCK if stop is None else min(_BLOCK, stop - start))
                if not block and stop is not None:
                    raise SlmError(f"{self.place(name)} is cut off", "remove the unfinished dataset, and start again")
                if not block:
                    return
                start += len(block)
                yield block

    def read(self, name: str) -> bytes:
        """Returns the contents of a file.

        Raises:
            SlmError: When it is not there, or cannot be read.
        """
        with self._open(name) as stream:
            return stream.read()

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        place = self.place(name)
        if self._files is not None:
            with reported(place, "read"), self._files.open(place, "rb") as stream:
                yield stream
            return
        try:
            with Path(place).open("rb") as stream:
                yield stream
        except OSError as error:
            raise SlmError(f"cannot read {place} ({error.strerror})", _SHARED) from None

    def done(self, name: str, key: str) -> Any | None:
        """Returns what a job has noted as its result; None if it is not done, or another job of this name was."""
        place = self.place(name)
        try:
            if self._files is not None:
                with reported(place, "read"):
                    if not self._files.isfile(place):
                        return None
                content = self.read(name)
            else:
                content = Path(place).read_bytes()
            noted = json.loads(content)
        except (FileNotFoundError, ValueError):
            return None
        return noted["result"] if isinstance(noted, dict) and noted.get("key") == key else None

    def names(self, directory: str) -> set[str]:
        """Returns the names of the files in a directory, with the directory before each; none if it does not exist."""
        place = self.place(directory)
        if self._files is not None:
            with reported(place, "list"):
                found = [str(name).rpartition("/")[2] for name in self._files.find(place)]
        else:
            found = os.listdir(place) if Path(place).is_dir() else []  # noqa: PTH208  # for a million of them
        return {f"{directory}/{name}" for name in found}

    def note(self, name: str, key: str, result: Any) -> None:
        """Notes the result of a job, after its files are complete."""
        self.write(name, json.dumps({"key": key, "result": result}).encode())

    @property
    def exists(self) -> bool:
        """Whether an object store has any of the files."""
        assert self._files is not None
        with reported(self.root, "list"):
            return bool(self._files.exists(self.root))

    def copy(self, name: str, target: str) -> None:
        """Copies a file within an object store."""
        assert self._files is not None
        self._files.copy(self.place(name), target)

    def clear(self, first: str) -> None:
        """Removes all files, one of them before the others: without it no file that an interruption leaves is used."""
        assert self._files is not None
        with reported(self.root, "remove"):
            if self._files.exists(self.place(first)):
                self._files.rm_file(self.place(first))
            if self.exists:
                self._files.rm(self.root, recursive=True)
