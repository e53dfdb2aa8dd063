"""The rule for rewinding a cache: it must still hold every position that the next token attends to."""

from slm.core.errors import SlmError


def check_rewind(read: int, length: int, window: int | None, oldest: int) -> None:
    """Checks that a layer's cache can be rewound exactly.

    Args:
        read: Number of positions read.
        length: Number of positions to keep.
        window: The layer's window in positions, the current one included; None for a layer with global attention.
        oldest: The first position that the cache still holds.

    Raises:
        SlmError: If `length` is not between 0 and `read`, or if the cache no longer holds the positions needed.
    """
    if not 0 <= length <= read:
        raise SlmError(f"cannot rewind to {length:,} tokens: only {read:,} were read")
    needed = 0 if window is None else min(length, window - 1)
    if length < read and needed and length - needed < oldest:
        raise SlmError(
            f"cannot rewind from {read:,} tokens to {length:,}: a sliding layer needs the {needed:,} positions before, "
            f"but its cache starts at position {oldest:,}",
            "read the text again, or restore a snapshot of that length",
        )
