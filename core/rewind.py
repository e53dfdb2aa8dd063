"""Going back in a text: when caches still hold what the next token would look at."""

from slm.core.errors import SlmError


def check_rewind(read: int, length: int, window: int | None, oldest: int) -> None:
    """Refuses to go back where that cannot be exact.

    Args:
        read: Positions read.
        length: The positions to go back to.
        window: The layer's window in positions, the current one included; None for a layer that keeps everything.
        oldest: The first position that the layer still holds.

    Raises:
        SlmError: With the reason.
    """
    if not 0 <= length <= read:
        raise SlmError(f"cannot go back to {length:,} tokens: {read:,} were read")
    needed = 0 if window is None else min(length, window - 1)
    if length < read and needed and length - needed < oldest:
        raise SlmError(
            f"cannot go back from {read:,} tokens to {length:,}: a sliding layer needs the {needed:,} positions before, "
            f"and those before {oldest:,} are gone",
            "read the text again, or restore a snapshot that was taken there",
        )
