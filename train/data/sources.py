"""Files of documents, in the local file system or elsewhere; `slm.train.data.remote.text` has the remote ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from slm.core.text.documents import read_parts


class TextSource(Protocol):
    """A file of documents; its text is what names it in messages."""

    @property
    def bytes(self) -> int:
        """Size of the file."""

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Values that change with the text."""

    def parts(self, column: str, limit: int) -> Iterator[str]:
        """Yields the documents, as `read_parts`."""


class LocalFile:
    """A file in the local file system; see `TextSource`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._path.stat().st_size

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Path, size and time."""
        stat = self._path.stat()
        return (str(self._path.resolve()), stat.st_size, stat.st_mtime_ns)

    def parts(self, column: str, limit: int) -> Iterator[str]:
        """Yields the documents."""
        return read_parts(self._path, column, limit)
