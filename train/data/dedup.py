"""Detection of exact duplicates, with memory that does not grow with the number of documents."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from slm.core import renames
from slm.core.errors import SlmError

# Page cache of sqlite3, in KiB; the rest is on the disk.
_CACHE_KIB = 64 << 10


class Seen:
    """The documents seen so far, as hashes in a temporary file.

    Two documents are equal if their SHA-256 without surrounding white space is.

    Attributes:
        connection: The database in the file.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def add(self, digest: bytes) -> bool:
        """Keeps the hash of a document; returns whether it was not seen before.

        Raises:
            SlmError: When the file cannot be written.
        """
        with tracked("duplicates"):
            return bool(self.connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount)


@contextmanager
def tracked(what: str) -> Iterator[None]:
    """Turns errors of the database into SlmErrors; `what` is what it keeps, for messages."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise SlmError(
            f"cannot keep track of {what} ({error})",
            "free some space on the disk of the output; with --ray, in the temporary directory, which TMPDIR=DIR sets",
        ) from None


@contextmanager
def opened(file: Path) -> Iterator[Seen]:
    """Yields an empty `Seen` in a file, which is removed at the end.

    Raises:
        SlmError: When the file cannot be written.
    """
    renames.remove_file(file)
    try:
        with tracked("documents"), closing(sqlite3.connect(file, isolation_level=None)) as connection:
            # No journal: the file of a killed command is discarded.
            for pragma in (
                "journal_mode=OFF",
                "synchronous=OFF",
                "locking_mode=EXCLUSIVE",
                f"cache_size=-{_CACHE_KIB}",
            ):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            connection.execute("BEGIN")
            yield Seen(connection)
    finally:
        renames.remove_file(file)
