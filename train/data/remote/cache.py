"""The local cache of remote text and datasets: one directory per entry, bounded, and safe for several processes.

A process locks an entry while it fetches it. The total size is bounded by $SLM_CACHE_BYTES; the least recently used entries are
removed to make room. A run that has mapped a removed file keeps it until it ends.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm.core import renames
from slm.core.errors import SlmError
from slm.core.locks import sole
from slm.core.runs import cached_data
from slm.core.text.streams import size as as_text

DEFAULT_BYTES = 50 << 30
_VARIABLE = "SLM_CACHE_BYTES"
_UNITS = {"": 0, "K": 10, "KIB": 10, "M": 20, "MIB": 20, "G": 30, "GIB": 30, "T": 40, "TIB": 40}
# How long to wait for another process that fetches the same entry: as long as training waits for its first process.
_WAIT_S = 12 * 3600.0
_SIZE_FILE = "size"
# Beside the kinds of entries: the size of all of them, or more.
_TOTAL_FILE = "total"
# One part in this many of the limit is freed when it is exceeded.
_FREED_AT_ONCE = 10


def limit() -> int:
    """Returns the maximum bytes of the cache: $SLM_CACHE_BYTES, such as 200GiB, or 50 GiB.

    Raises:
        SlmError: When the variable is not a size.
    """
    given = os.environ.get(_VARIABLE, "").strip()
    if not given:
        return DEFAULT_BYTES
    found = re.fullmatch(r"(\d+)\s*([A-Z]*)", given.upper())
    if found is None or found[2] not in _UNITS:
        raise SlmError(f"{_VARIABLE}={given} is not a size", "a number of bytes, or a size such as 200GiB")
    return int(found[1]) << _UNITS[found[2]]


@contextmanager
def entry(kind: str, key: str, size: int, what: str) -> Iterator[Path]:
    """Locks and yields the directory of an entry, after making room for it. What the block stores there stays.

    Args:
        kind: "files" or "datasets".
        key: Name of the entry.
        size: Bytes that the entry takes when it is complete.
        what: The address, for messages.

    Raises:
        SlmError: When the entry does not fit, or another process fetches it for too long.
    """
    root = cached_data()
    place = root / kind / key
    with writable():
        root.mkdir(parents=True, exist_ok=True)
        with sole(place, wait_s=_WAIT_S, doing=f"fetches {what}"):
            place.mkdir(parents=True, exist_ok=True)
            with sole(root / "room", wait_s=_WAIT_S, doing="makes room in the cache"):
                _make_room(root, place, size, what)
                (place / _SIZE_FILE).write_text(str(size), encoding="ascii", newline="")
                os.utime(place)
            yield place
            os.utime(place)


@contextmanager
def writable() -> Iterator[None]:
    """Turns the errors of a cache that cannot be written, or of a full disk, into SlmErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SlmError(
                f"no space left on the disk for the cache: {error.filename or cached_data()}",
                "free some space, or SLM_CACHE=DIR sets another directory; the same command continues",
            ) from None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise SlmError(
            f"the cache is not writable: {error.filename or cached_data()}", "SLM_CACHE=DIR sets another directory"
        ) from None


def _make_room(root: Path, kept: Path, size: int, what: str) -> None:
    most = limit()
    if size > most:
        with suppress(OSError):
            renames.remove_tree(kept)
        raise SlmError(
            f"{what} has {as_text(size)}, and the cache may have {as_text(most)}",
            f"{_VARIABLE} raises the limit, for example {_VARIABLE}={(size >> 30) + 1}GiB; the cache is {root}",
        )
    noted = _number(root / _TOTAL_FILE)
    total = most + 1 if noted is None else noted + size - _size(kept)
    if total > most:
        total = _removed_down_to(most, root, kept, size)
    # Written before the size of the entry: after an interruption the total is too large, never too small.
    (root / _TOTAL_FILE).write_text(str(total), encoding="ascii", newline="")


def _removed_down_to(most: int, root: Path, kept: Path, size: int) -> int:
    """Removes entries if the limit is exceeded; returns the size of the rest, with the kept entry."""
    others = sorted((place for place in root.glob("*/*") if place.is_dir() and place != kept), key=_used)
    total = size + sum(map(_size, others))
    # More than necessary, so that not every further entry looks at all others.
    aim = most if total <= most else most - most // _FREED_AT_ONCE
    for place in others:
        if total <= aim:
            break
        freed = _size(place)
        # An entry in use by a process that fetches it stays, as does one whose files Windows keeps open.
        with suppress(SlmError, OSError), sole(place):
            renames.remove_tree(place)
            total -= freed
    return total


def _used(place: Path) -> float:
    with suppress(OSError):
        return place.stat().st_mtime
    return 0.0


def _size(place: Path) -> int:
    return _number(place / _SIZE_FILE) or 0


def _number(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))
    return None
