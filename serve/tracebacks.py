"""Descriptions of internal errors for logs and clients: type and location only, because messages may quote a text."""

import traceback
from pathlib import Path


def frames_of(error: BaseException) -> list[str]:
    """Returns the files and lines of an error's traceback, outermost first."""
    return [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)]


def named(error: BaseException) -> str:
    """Returns an error's type and location."""
    return f"{type(error).__name__} at {(frames_of(error) or ['?'])[-1]}"
