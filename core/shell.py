"""Quotes for arguments in hints, as the shell of this system reads them."""

import re
import shlex

from slm.core import systems

_PLAIN = re.compile(r"[\w@%+=:,./\\~-]+", re.ASCII)


def quoted(argument: str) -> str:
    """Returns an argument with quotes if it needs them. cmd.exe knows double quotes only."""
    if not systems.WINDOWS:
        return shlex.quote(argument)
    return argument if _PLAIN.fullmatch(argument) else '"' + argument.replace('"', '\\"') + '"'
