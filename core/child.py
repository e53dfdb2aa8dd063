"""The one place that starts processes: Python children that import nothing from the caller's directory, and tools.

A directory that a user merely works in may be a stranger's. Python puts it on the module path of `python -m` and `python -c`,
reads `PYTHON*` variables and a user's site directory; a child started here does none of that. It runs isolated (`-I`) in the
root directory, and imports from where this process imports.
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

# The root directory always exists, and only the administrator can write to it.
_DIRECTORY = os.sep


def python(code: str, *arguments: str) -> list[str]:
    """Returns the command line of a Python child; its working directory is for `popen` and `run` to set.

    Args:
        code: What it runs, such as "from slm.core.template import work; work()".
        arguments: Its `sys.argv[1:]`.

    Raises:
        SlmError: When this process does not know its own interpreter.
    """
    if not sys.executable:
        raise SlmError(
            "the Python interpreter is unknown, so no process can be started", "run slm with a regular python"
        )
    lines = ["import sys"]
    if site.ENABLE_USER_SITE and site.USER_SITE and Path(site.USER_SITE).is_dir():
        # -I leaves it out, and with it the hooks of packages that are installed there in development mode.
        lines.append(f"import site; site.addsitedir({site.USER_SITE!a})")
    lines += [f"path = {import_path()!a}", "sys.path[:] = path + [each for each in sys.path if each not in path]", code]
    utf8 = ("-X", "utf8") if sys.flags.utf8_mode else ()
    return [sys.executable, "-I", *utf8, "-c", "\n".join(lines), *arguments]


def import_path() -> list[str]:
    """Returns this process's module path without its working directory, unless slm itself was imported from there."""
    here, home = _resolved(os.curdir), _resolved(Path(sys.modules["slm"].__file__ or "").parent.parent)
    # An empty entry, or another relative one, is the working directory or lies in it.
    places = [(entry, _resolved(entry or os.curdir)) for entry in sys.path]
    kept = [(entry, place) for entry, place in places if place == home or Path(entry).is_absolute()]
    return [str(Path(entry).absolute()) for entry, place in kept if place in (home, None) or place != here]


def popen(
    code: str, *arguments: str, variables: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.Popen[bytes]":
    """Starts a Python child; its standard input and output are the caller's to connect and to close.

    Args:
        code: What it runs; see `python`.
        arguments: Its `sys.argv[1:]`. Paths must be absolute.
        variables: Environment variables besides this process's.
        **options: Of `subprocess.Popen`, but for `cwd` and `env`.

    Raises:
        SlmError: When this process does not know its own interpreter.
        OSError: When the process cannot be started.
    """
    environment = {**os.environ, **(variables or {})}
    return subprocess.Popen(python(code, *arguments), cwd=_DIRECTORY, env=environment, **options)


def run(code: str, *arguments: str, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs a Python child to its end, without input, and returns what it printed.

    Args:
        code: What it runs; see `python`.
        arguments: Its `sys.argv[1:]`. Paths must be absolute.
        timeout: In seconds; None waits.

    Raises:
        SlmError: When this process does not know its own interpreter.
        subprocess.TimeoutExpired: When it takes longer.
    """
    return _captured(python(code, *arguments), _DIRECTORY, timeout)


def program(name: str) -> str | None:
    """Returns where a program lies, looked for in the absolute directories of PATH alone; None when it is not there."""
    directories = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(part).is_absolute()]
    return shutil.which(name, path=os.pathsep.join(directories)) if directories else None


def run_program(
    command: list[str], *, timeout: float, directory: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs a program that is not Python to its end, without input, and returns what it printed.

    Args:
        command: An absolute path, as `program` returns, and arguments.
        timeout: In seconds.
        directory: Where it runs, for one that reads or writes there; the root directory by default.

    Raises:
        subprocess.TimeoutExpired: When it takes longer.
        OSError: When it cannot be started.
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
    except OSError:  # a working directory that was deleted, an entry that does not exist
        return None
