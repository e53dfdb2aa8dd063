"""Figures of processes, through psutil: memory, open files, and whether a process exists.

psutil is imported when it is needed: the import takes 15 ms. A sandbox may deny what it reads; each function then returns what
is known without it.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

_STATUS = Path("/proc/self/status")
# Descriptors that a process has open at its start, if the system does not report their number.
_OPEN = 32
# A limit that no server reaches, for systems without a limit of open files.
_NO_LIMIT = 1 << 20


def process_exists(pid: int) -> bool:
    """Returns whether a process exists. On Windows `os.kill(pid, 0)` would end it."""
    import psutil

    return bool(psutil.pid_exists(pid))


def yield_to_others() -> None:
    """Lowers the priority of this process and of its children."""
    if sys.platform != "win32" and hasattr(os, "nice"):
        os.nice(10)
    else:
        _asked(lambda psutil: psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS))


def resident_mib() -> float | None:
    """Returns the resident memory of this process in MiB; None if the system does not report it."""
    found = _of_process(lambda process: process.memory_info().rss)
    return None if found is None else found / (1 << 20)


def peak_rss_mib() -> float:
    """Returns the peak resident memory of this process in MiB; 0.0 if the system does not report it."""
    try:
        # getrusage would include the peak of the parent process at the time of the fork.
        return int(_STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / (1 << 10)  # KiB
    except (OSError, IndexError, ValueError):
        pass
    if (peak := _of_process(lambda process: process.memory_info().peak_wset)) is not None:  # Windows
        return peak / (1 << 20)
    if sys.platform != "win32":
        with suppress(ImportError):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # bytes on macOS, KiB elsewhere
    return resident_mib() or 0.0


def free_files() -> int:
    """Returns how many more files and sockets this process may open."""
    if sys.platform != "win32":
        with suppress(ImportError):
            import resource

            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            used = _of_process(lambda process: process.num_fds())
            if limit != resource.RLIM_INFINITY:
                return max(0, limit - (_OPEN if used is None else used))
    return _NO_LIMIT  # also on Windows, whose sockets are not descriptors


def allowed_processors() -> int:
    """Returns the number of logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    found = _of_process(lambda process: len(process.cpu_affinity()))  # Windows; macOS has no affinity
    return found or os.cpu_count() or 1


def physical_cores() -> int | None:
    """Returns the number of the machine's physical cores; None if the system does not report it."""
    return _asked(lambda psutil: psutil.cpu_count(logical=False))


def main_memory() -> tuple[int | None, int | None]:
    """Returns installed memory, and memory that can be used without swapping, in bytes; None if not reported."""
    found = _asked(lambda psutil: psutil.virtual_memory())
    return (None, None) if found is None else (found.total, found.available)


def clock_mhz() -> tuple[float, float] | None:
    """Returns the present and the highest clock of the processors in MHz; None if the system does not report them."""
    found = _asked(lambda psutil: psutil.cpu_freq())
    return None if found is None or not found.max else (found.current, found.max)


def swapped_bytes() -> int | None:
    """Returns the bytes moved to swap or back since the start of the system; None if the system does not report them."""
    found = _asked(lambda psutil: psutil.swap_memory())
    return None if found is None else found.sin + found.sout


def stolen_seconds() -> float | None:
    """Returns the processor time that the host of a virtual machine gave to others; None if it is not reported."""
    return _asked(lambda psutil: psutil.cpu_times().steal)


def _of_process(figure: Callable[[Any], _T]) -> _T | None:
    return _asked(lambda psutil: figure(psutil.Process()))


def _asked(question: Callable[[Any], _T]) -> _T | None:
    """Returns psutil's answer; None if this system does not have the figure, or a sandbox denies it."""
    import psutil

    try:
        return question(psutil)
    except (psutil.Error, OSError, AttributeError, NotImplementedError, RuntimeError):
        return None
