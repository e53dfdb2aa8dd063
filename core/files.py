"""Atomic writes of files and directories, and safe paths inside artifacts."""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from slm.core import renames, systems
from slm.core.errors import SlmError
from slm.core.file_names import is_portable, leads_out
from slm.core.locks import LOCK, is_mine, sole
from slm.core.processes import process_exists

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_SCRATCH = ".scratch-"
# The umask can be read only by setting it, which another thread must not do meanwhile.
_UMASK = threading.Lock()
# How long a reader waits during a replacement: the two renames of `replace_directory` are milliseconds apart.
_RENAMING_S = 2.0
# How long to wait for another process that writes the same file.
_WRITING_S = 10.0
_IN_USE = "stop the slm serve, slm chat or other program that uses it, or name another --out"
# The errors of a full disk, in the message of a library: also ERROR_DISK_FULL and ERROR_HANDLE_DISK_FULL of Windows.
_FULL = {errno.ENOSPC: (errno.ENOSPC, 112, 39) if systems.WINDOWS else (errno.ENOSPC,), errno.EDQUOT: (errno.EDQUOT,)}
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
            renames.remove_leftovers(partial)


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
    """Renames `source` to `target`; removes the previous target after that.

    Raises:
        SlmError: If another program keeps a file of the target open, on Windows.
    """
    replaced = target.parent / f".{target.name}{_REPLACED}{os.getpid()}"
    try:
        if target.exists():
            renames.replace(target, replaced)
        try:
            renames.replace(source, target)
        except OSError:
            if replaced.exists():
                renames.replace(replaced, target)
            raise
    except PermissionError:
        if systems.WINDOWS:
            raise SlmError(f"cannot replace {target}: a program uses one of its files", _IN_USE) from None
        raise
    _to_disk(target.parent)
    renames.remove_leftovers(replaced)


def _to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the names in a directory, are on disk.

    A rename alone does not ensure this: after a power failure the new name could refer to a file without contents. On an SSD
    the call increases the time for a directory of 256 MiB from 0.35 s to 0.9 s, and for a small one from 4 ms to 27 ms,
    which is little for a directory that is saved every few minutes. Windows cannot open directories, and writes only files
    that are open for writing.
    """
    if systems.WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if systems.WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not support fsync for directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
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
    for number, quoted in _FULL.items():
        if not isinstance(error, OSError) and any(f"(os error {each})" in str(error) for each in quoted):
            raise OSError(number, os.strerror(number), str(target)) from error


def _give_usual_modes(directory: Path) -> None:
    """Sets file permissions by the user's umask: safetensors makes its files readable by the owner only."""
    with _UMASK:
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
            if not certain and pid.isdigit() and int(pid) != os.getpid() and process_exists(int(pid)):
                continue
            if kind == _REPLACED and not target.exists():
                renames.replace(left, target)
            elif left.is_dir():
                renames.remove_leftovers(left)
            else:
                renames.remove_file(left)


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
            renames.remove_leftovers(directory)


def _remove_scratch(parent: Path) -> None:
    """Removes the scratch directories, of any purpose, that killed processes left."""
    for lock in parent.resolve().glob(f".*{_SCRATCH}*{LOCK}"):
        if is_mine(lock):
            continue
        label = lock.name[1:].removesuffix(LOCK)
        with suppress(SlmError, OSError), sole(lock.parent / label) as certain:
            if certain:
                renames.remove_leftovers(lock.parent / f".{label}")


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
            renames.replace(partial, target)
            _to_disk(target.parent)
        except Exception as error:
            _complain_of_full_disk(error, target)
            raise
        finally:
            renames.remove_file(partial)


def write_text(target: Path, text: str) -> None:
    """Writes `text` as UTF-8 with its line ends, completely or not at all."""
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


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
    except UnicodeDecodeError as error:
        raise SlmError(
            f"{what} is not UTF-8 text: {path} (byte {error.start})", "convert it, for example with iconv"
        ) from None
    except OSError as error:
        if path.is_dir():  # Windows denies access to a directory that is opened as a file
            raise SlmError(f"{what} is a directory, not a file: {path}", "name a file") from None
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
        SlmError: If the name is absolute, leads out of the directory by itself or through a link, or is not valid on every
            system.
    """
    pure = PurePosixPath(name)
    path = directory / pure
    inside = "\0" not in name and not leads_out(name)
    try:
        whole = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        whole = path.resolve()
    except (OSError, RuntimeError, ValueError):  # the name is too long, a link to itself, or has a lone surrogate
        raise SlmError(f"{directory}: {name!r} is not a valid file name", "do not trust this artifact") from None
    if not inside or not (links or whole.is_relative_to(directory.resolve())):
        raise SlmError(f"{directory}: the name {name!r} leads out of the directory", "do not trust this artifact")
    if not is_portable(name):
        raise SlmError(f"{directory}: {name!r} is not a valid file name on every system", "do not trust this artifact")
    return path
