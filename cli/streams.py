"""Standard streams: UTF-8 on every system, also if they are closed at the start, or their reader has exited."""

import io
import os
import sys
from contextlib import suppress

from slm.core import systems

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


def use_utf8() -> None:
    """Makes pipes and files UTF-8 on Windows, whose default is a code page; a console is UTF-8 already.

    Input may have a byte order mark and line ends of Windows, on every system. Characters that another encoding lacks, such as
    that of `LC_ALL=C`, are printed as "?". A user's PYTHONIOENCODING is respected.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if systems.WINDOWS and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding="utf-8")
        is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
        if stream is sys.stdin:
            with suppress(io.UnsupportedOperation):  # a program that called `main` has read from it
                stream.reconfigure(encoding="utf-8-sig" if is_utf8 else None, newline=None)
        elif not is_utf8 and stream.errors == "strict":
            stream.reconfigure(errors="replace")


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
