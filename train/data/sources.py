"""Files of documents, in the local file system or elsewhere; `slm.train.data.remote.text` has the remote ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from slm.core.errors import SlmError
from slm.core.text.documents import read_parts
from slm.train.data.remote.text import RemoteFile


class TextSource(Protocol):
    """A file of documents; its text is what names it in messages."""

    @property
    def bytes(self) -> int:
        """Size of the file."""

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Values that change with the text."""

    @property
    def spec(self) -> dict[str, Any]:
        """Values from which `source_of` makes the source on another machine."""

    def check(self) -> None:
        """Checks that this machine sees the same file as the one where the source was found.

        Raises:
            SlmError: When it does not.
        """

    def parts(self, column: str, limit: int) -> Iterator[str]:
        """Yields the documents, as `read_parts`."""


@dataclass(frozen=True)
class FileRange:
    """Consecutive documents of a file.

    Attributes:
        source: The file.
        first: Number of documents before them.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents, about.
    """

    source: TextSource
    first: int
    documents: int
    bytes: int


def source_of(spec: dict[str, Any]) -> TextSource:
    """Returns the source that a specification describes."""
    if "address" in spec:
        return RemoteFile(**spec)
    return LocalFile(Path(spec["path"]), tuple(spec["fingerprint"]))


class LocalFile:
    """A file in the local file system; see `TextSource`."""

    def __init__(self, path: Path, expected: tuple[object, ...] | None = None) -> None:
        self._path = path
        self._expected = expected

    def __str__(self) -> str:
        return str(self._path)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._path.stat().st_size

    @cached_property
    def fingerprint(self) -> tuple[object, ...]:
        """Path, size and time, as they were first."""
        stat = self._path.stat()
        return (str(self._path.resolve()), stat.st_size, stat.st_mtime_ns)

    @property
    def spec(self) -> dict[str, Any]:
        """The absolute path, and what must be equal on another machine."""
        return {"path": str(self._path.resolve()), "fingerprint": self.fingerprint}

    def check(self) -> None:
        """Compares path, size and time with the expected ones."""
        if self._expected is not None and (not self._path.is_file() or self.fingerprint != self._expected):
            what = "another file" if self._path.is_file() else "not there"
            raise SlmError(
                f"{self._path} is {what} on a machine of the cluster",
                "put the text on storage that all machines mount at this path, or name an address such as s3://bucket/texts",
            )

    def parts(self, column: str, limit: int) -> Iterator[str]:
        """Yields the documents."""
        return read_parts(self._path, column, limit)
