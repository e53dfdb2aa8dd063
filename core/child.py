"""Starts all child processes: Python children that import nothing from the working directory, and other programs.

The working directory is not trusted. `python -m` and `python -c` put it on the module path, and Python reads `PYTHON*`
variables and the user's site directory. A child started here does neither: it runs isolated (`-I`) in the root directory,
with this process's module path.
"""

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.core.errors import SlmError

# This directory always exists, and only the administrator can write to it. On Windows, users can write to the root of a drive.
_DIRECTORY = os.environ.get("SYSTEMROOT", os.sep) if os.name == "nt" else os.sep


def python(code: str, *arguments: str) -> list[str]:
    """Returns the command line of a Python child; `popen` and `run` set its working directory.

    Args:
        code: The code to run, such as "from slm.core.template import work; work()".
        arguments: The child's `sys.argv[1:]`.

    Raises:
        SlmError: If the path of this process's Python interpreter is unknown.
    """
    if not sys.executable:
        raise SlmError(
            "the Python interpreter is unknown, so no process can be started", "run slm with a regular python"
        )
    lines = ["import sys"]
    if site.ENABLE_USER_SITE and site.USER_SITE and Path(site.USER_SITE).is_dir():
        # -I skips the user's site directory, and with it the import hooks of editable installations there.
        lines.append(f"import site; site.addsitedir({site.USER_SITE!a})")
    lines += [f"path = {import_path()!a}", "sys.path[:] = path + [each for each in sys.path if each not in path]", code]
    utf8 = ("-X", "utf8") if sys.flags.utf8_mode else ()
    return [sys.executable, "-I", *utf8, "-c", "\n".join(lines), *arguments]


def import_path() -> list[str]:
    """Returns this process's module path without the working directory, unless slm itself was imported from there."""
    here, home = _resolved(os.curdir), _resolved(Path(sys.modules["slm"].__file__ or "").parent.parent)
    # Empty and relative entries are the working directory, or lie in it.
    places = [(entry, _resolved(entry or os.curdir)) for entry in sys.path]
    kept = [(entry, place) for entry, place in places if place == home or Path(entry).is_absolute()]
    return [str(Path(entry).absolute()) for entry, place in kept if place in (home, None) or place != here]


def popen(
    code: str, *arguments: str, variables: Mapping[str, str] | None = None, apart: bool = False, **options: Any
) -> "subprocess.Popen[bytes]":
    """Starts a Python child; the caller connects and closes its standard input and output.

    Args:
        code: The code to run; see `python`.
        arguments: The child's `sys.argv[1:]`. Paths must be absolute.
        variables: Environment variables to add to this process's.
        apart: Whether Ctrl-C in the terminal does not reach the child.
        **options: Arguments of `subprocess.Popen`, except `cwd` and `env`.

    Raises:
        SlmError: If the path of this process's Python interpreter is unknown.
        OSError: If the process cannot be started.
    """
    environment = {**os.environ, **(variables or {})}
    if apart and sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    elif apart:
        options["start_new_session"] = True
    return subprocess.Popen(python(code, *arguments), cwd=_DIRECTORY, env=environment, **options)


def run(code: str, *arguments: str, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs a Python child to its end, without input, and returns its output.

    Args:
        code: The code to run; see `python`.
        arguments: The child's `sys.argv[1:]`. Paths must be absolute.
        timeout: In seconds; None for no limit.

    Raises:
        SlmError: If the path of this process's Python interpreter is unknown.
        subprocess.TimeoutExpired: If the child takes longer than `timeout`.
    """
    return _captured(python(code, *arguments), _DIRECTORY, timeout)


def program(name: str) -> str | None:
    """Returns the path of a program, or None; searches only the absolute directories of PATH."""
    directories = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(part).is_absolute()]
    return shutil.which(name, path=os.pathsep.join(directories)) if directories else None


def run_program(
    command: list[str], *, timeout: float, directory: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs a program that is not Python to its end, without input, and returns its output.

    Args:
        command: An absolute path, as returned by `program`, and arguments.
        timeout: In seconds.
        directory: The program's working directory, if it reads or writes files there; the root directory by default.

    Raises:
        subprocess.TimeoutExpired: If the program takes longer than `timeout`.
        OSError: If the program cannot be started.
    """
    assert Path(command[0]).is_absolute(), command
    return _captured(command, directory or _DIRECTORY, timeout)


def _captured(command: list[str], directory: str | Path, timeout: float | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=directory,
        timeout=timeout,
        check=False,
    )


def _resolved(path: str | Path) -> str | None:
    try:
        return os.path.realpath(path, strict=True)
    except OSError:  # the working directory was deleted, or the entry does not exist
        return None
