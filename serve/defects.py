"""Our own mistakes, as logs and clients hear of them: what and where, not what they say, which may quote somebody's text."""

import traceback
from pathlib import Path


def frames_of(error: BaseException) -> list[str]:
    """Returns the files and lines that an error came through, outermost first."""
    return [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)]


def named(error: BaseException) -> str:
    """Returns an error's kind and where it came from."""
    return f"{type(error).__name__} at {(frames_of(error) or ['?'])[-1]}"
