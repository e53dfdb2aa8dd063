"""Exact duplicates, found with little memory however many documents there are."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from slm.core.errors import SlmError

# sqlite3's page cache, in KiB; what does not fit is on the disk.
_CACHE_KIB = 64 << 10


class Seen:
    """The documents met so far, as hashes in a file. It is scratch: nothing of it outlives the command.

    Two documents are the same when their SHA-256 without the white space around them is.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.removed: Counter[str] = Counter()

    def first(self, documents: Iterable[str], split: str) -> Iterator[str]:
        """Yields the documents that were not met before, in this split or another; counts the others in `removed`.

        Raises:
            SlmError: When the file can take no more.
        """
        for document in documents:
            digest = hashlib.sha256(document.strip().encode()).digest()
            try:
                new = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount
            except sqlite3.OperationalError as error:
                raise SlmError(f"cannot keep track of duplicates ({error})", "free some space on the disk") from None
            if new:
                yield document
            else:
                self.removed[split] += 1


@contextmanager
def opened(file: Path) -> Iterator[Seen]:
    """Yields an empty `Seen` kept in a file, which is removed in the end."""
    file.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            # No journal: a killed command's file is thrown away.
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
        file.unlink(missing_ok=True)
