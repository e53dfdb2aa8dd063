"""Waits for a condition, not for a time, which is too short on a busy machine."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 100, every: float = 0.02) -> None:
    """Waits until the condition is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it is not so after {seconds} s"
        time.sleep(every)
