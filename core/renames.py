"""Renames and removes files and directories. Windows refuses both while a program has the file open.

Antivirus programs and indexers open new files for a moment, and readers such as `slm serve` keep files open. On Windows, these
functions therefore try again for a short time. On other systems they try once, because an open file prevents nothing.
"""

import gc
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from slm.core import systems

# How long to try again, in seconds, and the first and the longest pause.
_WAIT_S = 2.0
_PAUSES_S = 0.01, 0.1


def replace(source: Path, target: Path) -> None:
    """Renames a file or directory; replaces a file, or an empty directory, at the target.

    Raises:
        PermissionError: If permissions do not allow it or, on Windows, another program keeps a file open.
    """
    _patiently(lambda: source.replace(target))


def remove_file(path: Path) -> None:
    """Removes a file, also a read-only one; does nothing if there is none.

    Raises:
        PermissionError: As for `replace`.
    """

    def remove() -> None:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            _make_writable(path)
            raise

    _patiently(remove)


def remove_tree(path: Path) -> None:
    """Removes a directory with all it contains, also read-only files; does nothing if there is none.

    Raises:
        OSError: If something in it cannot be removed.
    """

    def remove() -> None:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            if path.exists():
                raise
        except PermissionError:
            for each in path.rglob("*"):
                _make_writable(each)
            raise

    _patiently(remove)


def remove_leftovers(path: Path) -> None:
    """Removes a directory as far as possible. The next writer of the same artifact removes the rest."""
    with suppress(OSError):
        remove_tree(path)
    shutil.rmtree(path, ignore_errors=True)  # the files after one that could not be removed


def _patiently(action: Callable[[], object]) -> None:
    until, pause = time.monotonic() + _WAIT_S, _PAUSES_S[0]
    while True:
        try:
            action()
            return
        except PermissionError:
            if not systems.WINDOWS or time.monotonic() >= until:
                raise
        if pause == _PAUSES_S[0]:
            gc.collect()  # closes files and maps of this process that only reference cycles keep
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES_S[1])


def _make_writable(path: Path) -> None:
    """Windows does not remove files that are read-only; on other systems the directory's permissions decide."""
    if systems.WINDOWS:
        with suppress(OSError):
            path.chmod(stat.S_IREAD | stat.S_IWRITE)
