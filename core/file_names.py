r"""Checks of the file names in an artifact. The rules are the same on every system: what opens on one, opens on all.

A name is relative and has `/` between its parts. On Windows, `..\x` and `C:x` would lead elsewhere, `CON` and `aux.json` name
devices, `a:b` names a hidden stream of the file `a`, and `x.` is the file `x`. All of these names are rejected.
"""

import re
from pathlib import PurePosixPath, PureWindowsPath

_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?:[. ].*)?", re.IGNORECASE)


def leads_out(name: str) -> bool:
    """Returns whether a name is absolute, has a drive, or leads upwards, on any system."""
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or any(".." in path.parts for path in (PurePosixPath(name), windows))


def is_portable(name: str) -> bool:
    """Returns whether a relative name means the same file on every system."""
    parts = name.split("/")
    return not any(character in name for character in '\\:\0<>"|?*') and all(
        part in ("", ".") or not (_DEVICE.fullmatch(part) or part[-1] in ". ") for part in parts
    )
