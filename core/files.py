"""Files and directories that appear whole or not at all, and paths that stay where they belong."""

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
_LOCK = ".lock"
# Between the two renames that replace a directory lie milliseconds: who reads it waits for so long.
_RENAMING_S = 2.0
# How long to wait for another process that writes the same file.
_WRITING_S = 10.0
_LOOK_AGAIN_S = 0.02
# Numpy's words, and onnxruntime's of an adapter.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|Failed to write :?\d+ bytes")
# Of a file that is read as one JSON object. The longest there are list every tensor of a large model, in some MiB.
_LONGEST_JSON = 64 << 20


@contextmanager
def atomic_directory(target: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yields an empty sibling directory that takes the place of `target` when the block ends well.

    An exception, Ctrl-C included, removes the sibling and leaves `target` as it was. What a killed process left
    beside the target is removed first. What is written reaches the disk before it takes its place: a power cut leaves the
    old directory or the new one.

    Args:
        target: The directory to make or replace.
        ours: The files, relative to the target, that an older artifact there consists of. Anything else is somebody
            else's, and the target is left alone.

    Raises:
        SlmError: When something else stands there, or another process is at work on it.
        OSError: When the disk is full, whatever the library that wrote says then.
    """
    target = target.resolve()  # a link stays a link, to what is made
    check_replaceable(target, ours)
    with sole(target) as certain:
        _put_right(target, certain)
        check_replaceable(target, ours)
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
    """Makes this process the only one at work on an artifact; the system lets go of it however the process ends.

    Yields whether that is certain: not where the file system knows no locks. What this thread holds, it can take again.
    Directories above the artifact are made, and removed again where nothing came into them.

    Args:
        target: The file or directory that is to be made.
        wait_s: How long to wait for another process.

    Raises:
        SlmError: When another process is at work on it; it is named where the system says which.
        OSError: When nothing can be written there.
    """
    lock = target.parent.resolve() / f".{target.name}{_LOCK}"
    held = (lock, threading.get_ident())
    if held in _locks:
        yield _locks[held]
        return
    signals = PutOff()  # a signal between the making of the lock and the block that removes it would leave it
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
            lock.unlink(missing_ok=True)  # before it is let go of: who opens it later makes another
            os.close(descriptor)
            with suppress(OSError):  # one that is no longer empty
                for parent in made:
                    parent.rmdir()
    finally:
        signals.release()


# What this process holds, by thread, and whether that is certain.
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
                    f"{holder} is at work on {target}", "wait for it or stop it, or name another --out"
                ) from None
            os.close(descriptor)
            signals.release()  # who waits can be stopped
            time.sleep(_LOOK_AGAIN_S)
            signals.hold()
            continue
        except OSError:
            return descriptor, False
        os.close(descriptor)


def _is_still(lock: Path, descriptor: int) -> bool:
    """Returns whether a lock file is the one that was opened: whoever held it has removed it since."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def at_work(descriptor: int) -> str:
    """Returns what to call the process that holds the lock of an open file or directory."""
    about = os.fstat(descriptor)
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    with suppress(OSError):  # Linux lists them; across containers without a number that means anything here
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and place in fields and fields[fields.index(place) - 1] not in ("0", "-1"):
                return f"another process ({fields[fields.index(place) - 1]})"
    return "another process"


def check_replaceable(target: Path, ours: Collection[str]) -> None:
    """Checks that writing to `target` costs nobody anything but an older artifact of the same kind.

    Raises:
        SlmError: When it is a file, holds something that is not in `ours`, or is the working directory.
    """
    hint = "name another --out"
    if target.exists() and not target.is_dir():
        raise SlmError(f"{target} exists and is not a directory", hint)
    if Path.cwd().is_relative_to(target):
        raise SlmError(f"{target} is the directory you work in, or above it", hint)
    foreign = sorted({path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()} - {*ours})
    if foreign:
        raise SlmError(f"{target} exists and holds something else: {foreign[0]}", hint)


def replace_directory(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what stood there before is removed once the new one is in place."""
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
    """Waits until a file, or the names in a directory, are on the disk.

    Renaming alone promises no order: after a power cut the new name may stand for a file without its contents. On an SSD a
    directory of 256 MiB takes 0.9 s so instead of 0.35 s, a small one 27 ms instead of 4: little for what is saved every few
    minutes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if (
            error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir()
        ):  # some file systems cannot for directories
            raise
    finally:
        os.close(descriptor)


def _complain_of_full_disk(error: Exception, target: Path) -> None:
    """Raises what the system says of a full disk in place of an error that only quotes it, as safetensors' does.

    Numpy and onnxruntime say how much they could not write, and not why; there is no other reason that is met.
    """
    if getattr(error, "errno", None) is None and _SHORT_WRITE.search(str(error)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.filename, error.filename2 = str(target), None  # not the hidden one beside it
    for number in (errno.ENOSPC, errno.EDQUOT):
        if not isinstance(error, OSError) and f"(os error {number})" in str(error):
            raise OSError(number, os.strerror(number), str(target)) from error


def _give_usual_modes(directory: Path) -> None:
    """Lets the user's umask decide who may read the files: safetensors makes its own readable by the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def recover(target: Path) -> None:
    """Puts right what a killed process left beside `target`; nothing where another process is at work on it.

    Directories it had not finished are removed; one it had moved away, and whose successor never came, is put back.
    """
    target = target.parent.resolve() / target.name
    if not target.parent.is_dir():
        return
    # A directory that may not be written to has nothing that could be put right.
    with suppress(SlmError, OSError), sole(target, _RENAMING_S) as certain:
        _put_right(target, certain)


def _put_right(target: Path, certain: bool) -> None:
    """Does what `recover` says, for the only process at work on the target if that is certain."""
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
    """Yields an empty directory that is removed when the block ends; those that killed processes left are removed first.

    Args:
        parent: Where to make it.
        name: What it is for; its own name begins with ".NAME-".
    """
    for left in parent.glob(f".{glob.escape(name)}-*{_LOCK}"):
        lock_of = left.name[1:].removesuffix(_LOCK)
        with suppress(SlmError, OSError), sole(parent / lock_of) as certain:
            if certain:
                shutil.rmtree(parent / f".{lock_of}", ignore_errors=True)
    label = f"{name}-{secrets.token_hex(4)}"
    with sole(parent / label):  # first, so that what is there without a process to hold it was left
        directory = parent / f".{label}"
        try:
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


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
    """Yields a sibling path to write; it takes the place of `target` when the block ends well.

    What a killed process left beside the target is removed first.

    Raises:
        SlmError: When another process writes it, and goes on for long.
        OSError: When the disk is full, whatever the library that wrote says then.
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
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: Path, what: str) -> str:
    """Reads a UTF-8 file, without the byte order mark that editors of Windows put first.

    Args:
        path: The file.
        what: What the file is to the user, for the message ("training text").

    Raises:
        SlmError: When it is missing, a directory, unreadable or not UTF-8.
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
        SlmError: When the file is missing, unreadable, longer than any of its kind, not JSON, or not an object.
    """
    with suppress(OSError):  # which is told of when it is read
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise SlmError(f"{what} is not a file: {path}")  # to open a pipe is to wait for who writes into it
        if about.st_size > _LONGEST_JSON:
            raise SlmError(f"{what} has more than {_LONGEST_JSON >> 20} MiB: {path}")
    try:
        value = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise SlmError(f"{what} is not JSON: {path}, line {error.lineno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested a thousand deep, or a number of thousands of digits
        raise SlmError(f"{what} cannot be read: {path} ({error})") from None
    if not isinstance(value, dict):
        raise SlmError(f"{what} is not a JSON object: {path}")
    return value


def check_readable(path: Path, what: str) -> None:
    """Checks that a file can be opened, for libraries that say "no such file" of one they may not read.

    Raises:
        SlmError: When it is missing, is not a file or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe is to wait for who writes into it
            raise SlmError(f"{what} is not a file: {path}", "name a file")
        path.open("rb").close()
    except OSError as error:
        raise SlmError(f"cannot read {what}: {path} ({error.strerror})", "check the path and its permissions") from None


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def member(directory: Path, name: str, *, links: bool = False) -> Path:
    """Resolves `name`, as an artifact's own files spell it, inside `directory`.

    Args:
        directory: The artifact.
        name: What it calls one of its files.
        links: Whether a link in the directory may lead out of it, as those of the Hugging Face cache do.

    Raises:
        SlmError: When the name is absolute or leads, directly or through a link, out of the directory.
    """
    pure = PurePosixPath(name)
    path = directory / pure
    inside = "\0" not in name and not pure.is_absolute() and ".." not in pure.parts
    try:
        whole = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        whole = path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, half of a surrogate pair
        raise SlmError(f"{directory}: the name {name!r} is no file's", "do not trust this artifact") from None
    if not inside or not (links or whole.is_relative_to(directory.resolve())):
        raise SlmError(f"{directory}: the name {name!r} leads out of the directory", "do not trust this artifact")
    return path
