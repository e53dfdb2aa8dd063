"""Keeps `python -m slm` from importing modules of the working directory.

This module imports only modules that Python has loaded at startup: Python would search any other in that directory first.
"""

import os
import sys


def leave_working_directory() -> None:
    """Removes the working directory, which `python -m slm` adds, from the module path.

    Does nothing if another module is run, or if the package itself is in that directory.
    """
    if not _runs_slm(sys.orig_argv) or not sys.path:
        return
    home = __file__.rsplit(os.sep, 2)[0]
    if os.path.realpath(sys.path[0]) == os.path.realpath(os.curdir) != os.path.realpath(home):
        del sys.path[0]


def _runs_slm(command: list[str]) -> bool:
    """Returns whether a command line of Python, such as `python -u -m slm chat`, runs this package or a module in it."""
    for place, argument in enumerate(command[1:], 1):
        option, m, rest = argument.partition("m")
        if m and option.startswith("-") and not option.startswith("--"):
            module = rest or "".join(command[place + 1 : place + 2])
            return module.partition(".")[0] == "slm"
    return False
