"""Atomic writes of files and directories, locks on artifacts, and safe paths inside artifacts."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from slm.core.errors import SlmError
from slm.core.signals import PutOff

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_SCRATCH = ".scratch-"
_LOCK = ".lock"
# How long a reader waits during a replacement: the two renames of `replace_directory` are milliseconds apart.
_RENAMING_S = 2.0
# How long to wait for another process that writes the same file.
_WRITING_S = 10.0
_LOOK_AGAIN_S = 0.02
# How numpy and onnxruntime report an incomplete write.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|Failed to write :?\d+ bytes")
# The largest JSON file in bytes. The longest real ones list every tensor of a large model, in some MiB.
_LONGEST_JSON = 64 << 20


@contextmanager
def atomic_directory(target: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields an empty sibling directory that replaces `target` when the block ends without an exception.

    An exception, also Ctrl-C, removes the sibling and leaves `target` unchanged. Leftovers of killed processes are removed
    first, also scratch directories beside the target. The new files are on disk before they replace the old ones, so a power
    failure leaves either the old directory or the new one.

    Args:
        target: The directory to create or replace.
        ours: The files, relative to the target, of an older artifact of this kind. If the target has any other file, it is
            not replaced.

    Raises:
        SlmError: If the target has other files, or another process is writing it.
        OSError: If the disk is full; libraries' own errors for this are converted.
    """
    target = target.resolve()  # if the target is a link, replaces the directory that it points to
    check_replaceable(target, ours)
    with sole(target) as certain:
        _put_right(target, certain)
        check_replaceable(target, ours)
        _remove_scratch(target.parent)
        partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
        try:
            partial.mkdir()
            yield partial
            _give_usual_modes(partial)
            for path in (*partial.rglob("*"), partial):
                _to_disk(path)
            replace_directory(partial, target)
        except Exception as error:
            _complain_of_full_disk(error, target)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def sole(target: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Locks an artifact for this process; the operating system releases the lock when the process ends.

    Yields whether the lock is reliable, which it is not if the file system does not support locks. The thread that holds the
    lock can lock the artifact again. Missing parent directories are created, and removed again if they stay empty.

    Args:
        target: The file or directory to write.
        wait_s: How long to wait for another process, in seconds.

    Raises:
        SlmError: If another process holds the lock; the message has its process id, if the system reports it.
        OSError: If the parent directory is not writable.
    """
    lock = target.parent.resolve() / f".{target.name}{_LOCK}"
    held = (lock, threading.get_ident())
    if held in _locks:
        yield _locks[held]
        return
    signals = PutOff()  # a signal between the creation of the lock file and the block below would leave the file behind
    try:
        signals.hold()
        made = [parent for parent in lock.parents if not parent.exists()]
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor, certain = _locked(lock, target, wait_s, signals)
        try:
            _locks[held] = certain
            signals.release()
            yield certain
        finally:
            signals.hold()
            del _locks[held]
            lock.unlink(missing_ok=True)  # before the release: a process that opens it later creates a new file
            os.close(descriptor)
            with suppress(OSError):  # a parent directory is not empty
                for parent in made:
                    parent.rmdir()
    finally:
        signals.release()


# The locks that this process holds, by thread, and whether each is reliable.
_locks: dict[tuple[Path, int], bool] = {}


def _locked(lock: Path, target: Path, wait_s: float, signals: PutOff) -> tuple[int, bool]:
    end = time.monotonic() + wait_s
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, descriptor):
                return descriptor, True
        except BlockingIOError:
            if time.monotonic() >= end:
                holder = at_work(descriptor)
                os.close(descriptor)
                raise SlmError(
                    f"{holder} is writing {target}", "wait for it or stop it, or name another --out"
                ) from None
            os.close(descriptor)
            signals.release()  # Ctrl-C works while waiting
            time.sleep(_LOOK_AGAIN_S)
            signals.hold()
            continue
        except OSError:
            return descriptor, False
        os.close(descriptor)


def _is_still(lock: Path, descriptor: int) -> bool:
    """Returns whether a lock file is still the one that was opened; its previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def at_work(descriptor: int) -> str:
    """Returns a description of the process that holds the lock of an open file or directory."""
    about = os.fstat(descriptor)
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    with suppress(OSError):  # Linux lists locks; process ids of other containers are shown as 0 or -1
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and place in fields and fields[fields.index(place) - 1] not in ("0", "-1"):
                return f"another process ({fields[fields.index(place) - 1]})"
    return "another process"


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Locks a directory that is written over time, such as a run, for this process.

    The system releases the lock however the process ends. Yields whether the lock is certain: some file systems have no locks.

    Raises:
        SlmError: When another process uses it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SlmError(
                f"{at_work(descriptor)} is at work in {directory}", "wait for it or stop it, or name another directory"
            ) from None
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def check_replaceable(target: Path, ours: Collection[str]) -> None:
    """Checks that writing to `target` replaces nothing except an older artifact of the same kind.

    Raises:
        SlmError: If the target is a file, has a file that is not in `ours`, or contains the working directory.
    """
    hint = "name another --out"
    if target.exists() and not target.is_dir():
        raise SlmError(f"{target} exists and is not a directory", hint)
    if Path.cwd().is_relative_to(target):
        raise SlmError(f"{target} contains the current directory", hint)
    foreign = sorted({path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()} - {*ours})
    if foreign:
        raise SlmError(f"{target} exists and contains other files: {foreign[0]}", hint)


def replace_directory(source: Path, target: Path) -> None:
    """Renames `source` to `target`; removes the previous target after that."""
    replaced = target.parent / f".{target.name}{_REPLACED}{os.getpid()}"
    if target.exists():
        target.rename(replaced)
    try:
        source.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the names in a directory, are on disk.

    A rename alone does not ensure this: after a power failure the new name could refer to a file without contents. On an SSD
    the call increases the time for a directory of 256 MiB from 0.35 s to 0.9 s, and for a small one from 4 ms to 27 ms,
    which is little for a directory that is saved every few minutes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if (
            error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir()
        ):  # some file systems do not support fsync for directories
            raise
    finally:
        os.close(descriptor)


def _complain_of_full_disk(error: Exception, target: Path) -> None:
    """Raises an OSError for a full disk if an error of a library means that.

    safetensors quotes the system's error. numpy and onnxruntime report only how much they could not write; no other cause is
    known for this.
    """
    if getattr(error, "errno", None) is None and _SHORT_WRITE.search(str(error)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.filename, error.filename2 = str(target), None  # not the hidden partial file
    for number in (errno.ENOSPC, errno.EDQUOT):
        if not isinstance(error, OSError) and f"(os error {number})" in str(error):
            raise OSError(number, os.strerror(number), str(target)) from error


def _give_usual_modes(directory: Path) -> None:
    """Sets file permissions by the user's umask: safetensors makes its files readable by the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def recover(target: Path) -> None:
    """Repairs `target` after a killed process; does nothing while another process is writing it.

    Removes incomplete directories. Restores a directory that was moved away but not yet replaced.
    """
    target = target.parent.resolve() / target.name
    if not target.parent.is_dir():
        return
    # If the parent directory is not writable, no process can have left anything there.
    with suppress(SlmError, OSError), sole(target, _RENAMING_S) as certain:
        _put_right(target, certain)


def _put_right(target: Path, certain: bool) -> None:
    """Repairs the target as `recover` does; `certain` says whether this process holds a reliable lock on it."""
    for kind in (_REPLACED, _PARTIAL):
        for left in target.parent.glob(f"{glob.escape(f'.{target.name}{kind}')}*"):
            pid = left.name.rpartition("-")[2]
            if not certain and pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
                continue
            if kind == _REPLACED and not target.exists():
                left.rename(target)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Yields an empty directory that is removed when the block ends; removes those of killed processes first.

    Args:
        parent: The directory to create it in.
        name: Its purpose, which begins the directory's name after a dot.
    """
    _remove_scratch(parent)
    label = f"{name}{_SCRATCH}{secrets.token_hex(4)}"
    # Locked before it exists: a directory without a lock belongs to no running process. Another process may hold the lock for
    # a moment, to see whether this one is alive.
    with sole(parent / label, _RENAMING_S):
        directory = parent / f".{label}"
        try:
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _remove_scratch(parent: Path) -> None:
    """Removes the scratch directories, of any purpose, that killed processes left."""
    for lock in parent.resolve().glob(f".*{_SCRATCH}*{_LOCK}"):
        if (lock, threading.get_ident()) in _locks:  # this thread's own, which it could lock again
            continue
        label = lock.name[1:].removesuffix(_LOCK)
        with suppress(SlmError, OSError), sole(lock.parent / label) as certain:
            if certain:
                shutil.rmtree(lock.parent / f".{label}", ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a sibling path that replaces `target` when the block ends without an exception.

    Leftovers of killed processes are removed first.

    Raises:
        SlmError: If another process writes the file for longer than the wait.
        OSError: If the disk is full; libraries' own errors for this are converted.
    """
    with sole(target, _WRITING_S) as certain:
        _put_right(target, certain)
        partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
        try:
            yield partial
            _to_disk(partial)
            partial.replace(target)
            _to_disk(target.parent)
        except Exception as error:
            _complain_of_full_disk(error, target)
            raise
        finally:
            partial.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes `text` as UTF-8, completely or not at all."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: Path, what: str) -> str:
    """Reads a UTF-8 file; drops a byte order mark, which Windows editors write.

    Args:
        path: The file.
        what: A name for the file, for messages ("training text").

    Raises:
        SlmError: If the file is missing, a directory, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SlmError(f"{what} not found: {path}", "check the path") from None
    except IsADirectoryError:
        raise SlmError(f"{what} is a directory, not a file: {path}", "name a file") from None
    except UnicodeDecodeError as error:
        raise SlmError(
            f"{what} is not UTF-8 text: {path} (byte {error.start})", "convert it, for example with iconv"
        ) from None
    except OSError as error:
        raise SlmError(f"cannot read {what}: {path} ({error.strerror})", "check its permissions") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        SlmError: If the file is missing, unreadable, too long, not JSON, or not an object.
    """
    with suppress(OSError):  # read_text below reports it
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise SlmError(f"{what} is not a file: {path}")  # opening a pipe would wait for a writer
        if about.st_size > _LONGEST_JSON:
            raise SlmError(f"{what} has more than {_LONGEST_JSON >> 20} MiB: {path}")
    try:
        value = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise SlmError(f"{what} is not JSON: {path}, line {error.lineno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # very deep nesting, or a number with thousands of digits
        raise SlmError(f"{what} cannot be read: {path} ({error})") from None
    if not isinstance(value, dict):
        raise SlmError(f"{what} is not a JSON object: {path}")
    return value


def check_readable(path: Path, what: str) -> None:
    """Checks that a file can be opened, for libraries that report missing permissions as a missing file.

    Raises:
        SlmError: If the path is missing, not a file, or not readable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise SlmError(f"{what} is not a file: {path}", "name a file")
        path.open("rb").close()
    except OSError as error:
        raise SlmError(f"cannot read {what}: {path} ({error.strerror})", "check the path and its permissions") from None


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def member(directory: Path, name: str, *, links: bool = False) -> Path:
    """Returns the path of an artifact's file; `name` comes from the artifact and is not trusted.

    Args:
        directory: The artifact.
        name: The name of the file, relative to the artifact.
        links: Whether links may point out of the directory, as those in the Hugging Face cache do.

    Raises:
        SlmError: If the name is absolute, or leads out of the directory by itself or through a link.
    """
    pure = PurePosixPath(name)
    path = directory / pure
    inside = "\0" not in name and not pure.is_absolute() and ".." not in pure.parts
    try:
        whole = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        whole = path.resolve()
    except (OSError, RuntimeError, ValueError):  # the name is too long, a link to itself, or has a lone surrogate
        raise SlmError(f"{directory}: {name!r} is not a valid file name", "do not trust this artifact") from None
    if not inside or not (links or whole.is_relative_to(directory.resolve())):
        raise SlmError(f"{directory}: the name {name!r} leads out of the directory", "do not trust this artifact")
    return path
