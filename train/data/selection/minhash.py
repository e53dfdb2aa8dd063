"""Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing.

The similarity of two documents is the Jaccard index of their sets of shingles, sequences of five words. The share of equal
values in two signatures estimates it. Documents are compared if all values of a band of their signatures are equal.
"""

import hashlib
import re
import sqlite3

import numpy as np
from numpy.typing import NDArray

from slm.train.data.dedup import tracked

SHINGLE_WORDS = 5
# Values of a signature: the standard error of an estimate is at most 0.5 / sqrt(128) = 0.044.
VALUES = 128
SIGNATURE_BYTES = 4 * VALUES
_SEED = 1
# Minimum probability that two documents at the threshold are compared.
_COMPARED = 0.99
# Maximum number of documents that one is compared with: the earliest ones.
_MOST_COMPARED = 1_000

# A word, or a character of a script that does not separate words by spaces: Thai, Lao, Burmese, Khmer, Chinese, Japanese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def shingles(text: str) -> set[str]:
    """Returns the sequences of five words, in lower case and without punctuation; all words of a shorter document."""
    words = _WORD.findall(text.lower()) or [text.strip()]
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def signature(text: str) -> bytes:
    """Returns the MinHash signature of a document: 128 little-endian uint32."""
    from rensa import RMinHash

    minhash = RMinHash(num_perm=VALUES, seed=_SEED)
    minhash.update(list(shingles(text)))
    return np.array(minhash.digest(), "<u4").tobytes()


def rows_per_band(threshold: float) -> int:
    """Returns the largest number of values per band with which documents at the threshold are compared almost surely."""
    fitting = (rows for rows in range(VALUES, 0, -1) if 1 - (1 - threshold**rows) ** (VALUES // rows) >= _COMPARED)
    return next(fitting, 1)


class NearDuplicates:
    """The signatures of the documents kept so far, in tables of a database.

    Args:
        connection: The database, which has no such tables yet.
        threshold: Minimum similarity of near duplicates.
    """

    def __init__(self, connection: sqlite3.Connection, threshold: float) -> None:
        self._connection = connection
        self._equal = round(threshold * VALUES, 6)
        self._rows = rows_per_band(threshold)
        self._kept = 0
        connection.execute(
            "CREATE TABLE bands (band INTEGER, document INTEGER, PRIMARY KEY (band, document)) WITHOUT ROWID"
        )
        connection.execute("CREATE TABLE signatures (document INTEGER PRIMARY KEY, signature BLOB)")

    def add(self, signature: bytes) -> bool:
        """Keeps a signature unless it is similar to a kept one; returns whether it was kept.

        Raises:
            SlmError: When the database cannot be written.
        """
        bands = self._bands(signature)
        with tracked("near duplicates"):
            if self._is_near(bands, np.frombuffer(signature, "<u4")):
                return False
            self._kept += 1
            self._connection.execute("INSERT INTO signatures VALUES (?, ?)", (self._kept, signature))
            self._connection.executemany("INSERT INTO bands VALUES (?, ?)", [(band, self._kept) for band in bands])
        return True

    def _bands(self, signature: bytes) -> set[int]:
        size = 4 * self._rows
        return {
            int.from_bytes(
                hashlib.blake2b(signature[start : start + size], digest_size=8, key=start.to_bytes(2)).digest(),
                signed=True,
            )
            for start in range(0, SIGNATURE_BYTES - size + 1, size)
        }

    def _is_near(self, bands: set[int], values: NDArray[np.uint32]) -> bool:
        found = self._connection.execute(
            "SELECT signature FROM signatures WHERE document IN (SELECT document FROM bands WHERE band IN "
            f"({', '.join('?' * len(bands))}) ORDER BY document LIMIT {_MOST_COMPARED})",
            tuple(bands),
        )
        return any(np.count_nonzero(np.frombuffer(other, "<u4") == values) >= self._equal for (other,) in found)
