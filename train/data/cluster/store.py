"""The directory in which the machines of a cluster share their work: on a shared file system, or in an object store."""

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
            with TemporaryDirectory(prefix="slm-") as scratch:
                local = Path(scratch, Path(name).name)
                yield local
                with reported(self.place(name), "write"):
                    self._files.put_file(str(local), self.place(name))
            return
        target = Path(self.root, name)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            renames.replace(partial, target)
        except OSError as error:
            raise SlmError(
                f"cannot write {target} ({error.strerror})",
                "every machine must be able to write to the output's directory",
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file."""
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file to read.

        Raises:
            SlmError: When it is not there, or cannot be read.
        """
        place = self.place(name)
        with reported(place, "read"):
            opened: Any = self._files.open(place, "rb") if self._files is not None else Path(place).open("rb")  # noqa: SIM115
            with opened as stream:
                yield stream

    def read(self, name: str) -> bytes:
        """Returns the contents of a file.

        Raises:
            SlmError: When it is not there, or cannot be read.
        """
        with self.reading(name) as stream:
            return stream.read()

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
