"""Handles standard streams that are closed at the start, or whose reader has exited."""

import os
import sys

_STREAMS = (("stdin", 0, os.O_RDONLY, "r"), ("stdout", 1, os.O_WRONLY, "w"), ("stderr", 2, os.O_WRONLY, "w"))


def open_closed_streams() -> None:
    """Opens closed standard streams on the null device, so that other files do not get their descriptors."""
    for name, number, flags, mode in _STREAMS:
        free = not _is_open(number)
        if free:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:  # Python sets the stream to None if its descriptor is closed at the start
            where = number if free else os.devnull
            setattr(sys, name, open(where, mode, encoding="utf-8", errors="replace", closefd=not free))  # noqa: SIM115


def settle_streams() -> None:
    """Flushes the standard streams. Drops output to a closed pipe; Python would print an error about it on exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nothing, stream.fileno())
            except (OSError, ValueError):  # the stream has no descriptor
                pass
            finally:
                os.close(nothing)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
