"""What slm uses of an operating system, and what this one lacks. docs/systems.md has the table for all systems."""

import os
import platform
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from slm.core.process_limits import can_limit_memory

WINDOWS = os.name == "nt"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPPED = Path("/proc/self/smaps")
_LONG_PATHS = r"SYSTEM\CurrentControlSet\Control\FileSystem"


def name() -> str:
    """Returns the name, version and architecture of the operating system."""
    return f"{platform.system() or sys.platform} {platform.release()}, {platform.machine()}".strip()


def lacking() -> dict[str, str]:
    """Returns what this system lacks, and what happens instead."""
    found = {}
    if not _is_readable(_HUGE_PAGES):
        found["huge pages"] = "decoding is a little slower"
    if not _is_readable(_MAPPED):
        found["release of mapped weights"] = "resident memory includes weights that are no longer used"
    if not can_limit_memory():
        found["memory limits"] = "slm watches the processes of chat templates and schemas, and ends large ones"
    if not hasattr(signal, "SIGUSR1"):
        found["SIGUSR1"] = "no checkpoint on request during training; Ctrl-C saves one and stops"
    if find_spec("readline") is None:
        found["readline"] = "slm chat uses the editing keys of the terminal"
    if has_long_paths() is False:
        found["long paths"] = "paths have at most 259 characters; docs/systems.md says how to change this"
    return found


def has_long_paths() -> bool | None:
    """Returns whether Windows accepts paths of more than 259 characters; None on other systems, which do."""
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _LONG_PATHS) as key:
                return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
        except OSError:
            return False
    else:
        return None


def _is_readable(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True
