"""Range requests (RFC 9110, section 14): a browser continues an interrupted download from the byte that it lacks."""

import re

# One range of bytes; either end may be missing.
_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)


class UnsatisfiableError(ValueError):
    """A range that has no byte of the file; the response is 416."""


def requested(given: str | None, if_range: str | None, tag: str | None, size: int) -> tuple[int, int] | None:
    """Returns the bytes (start, end) that a request wants, with the end excluded; None for the whole file.

    The whole file also answers a malformed header, another unit, and several ranges at once, as the RFC permits.

    Args:
        given: The header Range.
        if_range: The header If-Range: the range holds only for the file with this tag.
        tag: The file's strong ETag.
        size: The file's size in bytes.

    Raises:
        UnsatisfiableError: When the range begins after the file's end.
    """
    found = _RANGE.fullmatch(given) if given else None
    if found is None or (if_range is not None and if_range != tag):
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < start:
        return None  # malformed
    if start >= size:
        raise UnsatisfiableError
    return start, end


def content_range(found: tuple[int, int] | None, size: int) -> str:
    """Returns the header Content-Range of a response; for None that of a 416."""
    return f"bytes */{size}" if found is None else f"bytes {found[0]}-{found[1] - 1}/{size}"
