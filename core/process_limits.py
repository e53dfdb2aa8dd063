"""Limits that a process sets for itself, and which of them the system enforces.

Linux enforces limits of processor time, memory and file size; macOS those of time and file size; Windows none. What the system
does not enforce, the parent watches: `slm.core.bounded`.
"""

import faulthandler
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal

Limit = Literal["time", "memory"]

_STATM = Path("/proc/self/statm")


def can_limit_memory() -> bool:
    """Returns whether the system enforces limits of memory."""
    linux = sys.platform == "linux"
    return linux and find_spec("resource") is not None


def limit_memory(most: int, *, more: bool = False) -> bool:
    """Limits the address space of this process, and keeps it from writing core dumps.

    Args:
        most: The limit in bytes.
        more: Whether it counts from the present size.

    Returns:
        Whether the system enforces the limit.
    """
    if sys.platform == "win32":
        return False
    else:
        try:
            import resource

            now = _address_space() if more else 0
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (now + most, now + most))
        except (ImportError, OSError, ValueError):  # macOS has no limit of address space
            return False
        return can_limit_memory()


@contextmanager
def memory_limited(more: int) -> Iterator[None]:
    """Limits this process to its present size and some bytes more within the block, if the system enforces it."""
    if sys.platform == "win32":
        yield
    else:
        previous = None
        with suppress(ImportError, OSError, ValueError):
            import resource

            now = _address_space() + more
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if soft == resource.RLIM_INFINITY or now < soft:
                resource.setrlimit(resource.RLIMIT_AS, (now, hard))
                previous = (soft, hard)
        try:
            yield
        finally:
            if previous is not None:
                resource.setrlimit(resource.RLIMIT_AS, previous)


def _address_space() -> int:
    """Returns the size of this process's address space in bytes.

    Raises:
        OSError: If the system is not Linux.
    """
    return int(_STATM.read_text("ascii").split()[0]) * mmap.PAGESIZE


def forbid_writing() -> bool:
    """Keeps this process from writing files. Returns whether the system enforces it; pipes are not files."""
    if sys.platform == "win32":
        return False
    else:
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        except (ImportError, OSError, ValueError):
            return False
        return True


def prepare_timer() -> bool:
    """Makes `start_timer` end this process. Returns whether the system counts processor time.

    The default action of the timer's signal ends the process even in C code; the parent may have set it to be ignored.
    """
    if sys.platform != "win32" and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        return True
    return False


def start_timer(seconds: float, wall_seconds: float) -> None:
    """Ends this process after a time, also if a call into C does not return.

    Args:
        seconds: The limit of processor time.
        wall_seconds: The limit of wall-clock time, which counts where the system has no timer of processor time. A thread of
            faulthandler ends the process then; it needs no Python code to run.
    """
    if sys.platform != "win32" and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    else:
        faulthandler.dump_traceback_later(wall_seconds, exit=True, file=_nowhere())


def stop_timer() -> None:
    """Stops the timer."""
    if sys.platform != "win32" and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    else:
        faulthandler.cancel_dump_traceback_later()


@cache
def _nowhere() -> IO[str]:
    return Path(os.devnull).open("w", encoding="utf-8")  # stays open as long as the process
