"""Locks on artifacts, between threads and between processes, on every system.

filelock's `lock_descriptor` locks an open file: `flock` on Linux and macOS, `LockFileEx` on Windows. The system releases the
lock however the process ends, so a killed process leaves no lock behind. All locks are exclusive and advisory. A network file
system without locks is reported as such: the caller then knows that the lock is not reliable.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm.core import systems
from slm.core.errors import SlmError
from slm.core.signals import PutOff

LOCK = ".lock"
# The lock of a directory that is written over time, on systems that cannot open directories.
_IN_USE = ".in-use"
_LOOK_AGAIN_S = 0.02
# Windows refuses to open a file for a moment after its removal.
_REMOVED_S = 2.0
# Windows also keeps others from reading the locked byte, which is the first one.
_UNREADABLE = 1

# The locks that this process holds, by thread, and whether each is reliable.
_locks: dict[tuple[Path, int], bool] = {}


@contextmanager
def sole(target: Path, wait_s: float = 0.0, doing: str | None = None, *, again: bool = True) -> Iterator[bool]:
    """Locks an artifact for this process; the operating system releases the lock when the process ends.

    Yields whether the lock is reliable, which it is not if the file system does not support locks. The thread that holds the
    lock can lock the artifact again, unless `again` is False. Missing parent directories are created, and removed again if
    they stay empty.

    Args:
        target: The file or directory to write.
        wait_s: How long to wait for another process, in seconds.
        doing: What a process with the lock does, for messages; "is writing TARGET" by default.
        again: Whether this thread may hold the lock already.

    Raises:
        SlmError: If another process holds the lock; the message has its process id, if the system reports it.
        OSError: If the parent directory is not writable.
    """
    lock = target.parent.resolve() / f".{target.name}{LOCK}"
    key = (lock, threading.get_ident())
    if again and key in _locks:
        yield _locks[key]
        return
    signals = PutOff()  # a signal between the creation of the lock file and the block below would leave the file behind
    try:
        signals.hold()
        made = [parent for parent in lock.parents if not parent.exists()]
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor, certain = _locked(lock, doing or f"is writing {target}", wait_s, signals)
        try:
            _locks[key] = certain
            signals.release()
            yield certain
        finally:
            signals.hold()
            del _locks[key]
            _release(lock, descriptor)
            with suppress(OSError):  # a parent directory is not empty
                for parent in made:
                    parent.rmdir()
    finally:
        signals.release()


def is_mine(lock: Path) -> bool:
    """Returns whether this thread holds a lock file, and could therefore lock it again."""
    return (lock, threading.get_ident()) in _locks


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Locks a directory that is written over time, such as a run, for this process.

    The system releases the lock however the process ends. Yields whether the lock is certain: some file systems have no locks.
    The directory itself is locked, so that its parent need not be writable. Windows cannot open directories; there the lock is
    a file beside it.

    Raises:
        SlmError: When another process uses it.
    """
    at_work = f"is at work in {directory}"
    if not systems.WINDOWS:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            free = _try(descriptor)
            if free is False:
                raise SlmError(f"{_holder(descriptor)} {at_work}", "wait for it or stop it, or name another directory")
            yield free is not None
        finally:
            os.close(descriptor)
        return
    directory = directory.resolve()
    lock = directory.parent / f".{directory.name}{_IN_USE}{LOCK}"
    signals = PutOff()
    signals.hold()
    try:
        descriptor, certain = _locked(lock, at_work, 0.0, signals)
    except PermissionError:  # the parent directory is not writable
        signals.release()
        yield False
        return
    except BaseException:
        signals.release()
        raise
    try:
        signals.release()
        yield certain
    finally:
        _release(lock, descriptor)


def _locked(lock: Path, doing: str, wait_s: float, signals: PutOff) -> tuple[int, bool]:
    end = time.monotonic() + wait_s
    while True:
        descriptor = _opened(lock)
        free = _try(descriptor)
        if free is None:
            return descriptor, False
        if free and _is_still(lock, descriptor):
            _sign(descriptor)
            return descriptor, True
        if not free and time.monotonic() >= end:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise SlmError(f"{holder} {doing}", "wait for it or stop it, or name another --out")
        os.close(descriptor)
        if not free:
            signals.release()  # Ctrl-C works while waiting
            time.sleep(_LOOK_AGAIN_S)
            signals.hold()


def _opened(lock: Path) -> int:
    until = time.monotonic() + _REMOVED_S
    while True:
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not systems.WINDOWS or not os.access(lock.parent, os.W_OK) or time.monotonic() >= until:
                raise
        time.sleep(_LOOK_AGAIN_S)


def _release(lock: Path, descriptor: int) -> None:
    if not systems.WINDOWS:
        lock.unlink(missing_ok=True)  # before the release: a process that opens it later creates a new file
    os.close(descriptor)
    if systems.WINDOWS:
        with suppress(OSError):  # another process has opened the file meanwhile: it removes it
            lock.unlink()


def _try(descriptor: int) -> bool | None:
    """Locks an open file or directory. Returns False if another process holds the lock, and None if there are no locks."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def _is_still(lock: Path, descriptor: int) -> bool:
    """Returns whether a lock file is still the one that was opened; its previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except (FileNotFoundError, PermissionError):  # removed, or being removed on Windows
        return False


def _sign(descriptor: int) -> None:
    """Writes this process's id and machine into its lock file, for the messages of other processes."""
    with suppress(OSError):  # the disk is full
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b" " * _UNREADABLE + f"{os.getpid()} {socket.gethostname()}\n".encode())


def _holder(descriptor: int) -> str:
    """Returns a description of the process that holds the lock of an open file or directory."""
    about = os.fstat(descriptor)
    # Linux lists locks. It shows the process ids of other containers as 0 or -1.
    if sys.platform != "win32" and hasattr(os, "major"):
        place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
        with suppress(OSError):
            for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
                fields = line.split()
                if fields[1] == "FLOCK" and place in fields and fields[fields.index(place) - 1] not in ("0", "-1"):
                    return f"another process ({fields[fields.index(place) - 1]})"
    with suppress(OSError, ValueError):  # a directory has no text
        os.lseek(descriptor, _UNREADABLE, os.SEEK_SET)
        number, machine = os.read(descriptor, 300).decode("utf-8", "replace").split()
        if machine == socket.gethostname():
            return f"another process ({int(number)})"
        return f"another process ({int(number)} on {machine})"
    return "another process"
