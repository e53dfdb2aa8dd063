"""Measures how long the engine's current piece of work takes, and reports whether it is stuck."""

import time


class Heartbeat:
    """The start of the current piece of work. The engine's thread writes it, others read it."""

    def __init__(self, limit_s: float) -> None:
        """Stores the limit for one piece of work, in seconds."""
        self.limit_s = limit_s
        self._since: float | None = None

    def beat(self) -> None:
        """Marks the start of a piece of work, and the end of the previous one."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """Marks that the engine is idle."""
        self._since = None

    @property
    def age_s(self) -> float:
        """Age of the current piece of work in seconds; 0 if the engine is idle."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def stalled(self) -> str | None:
        """Why the engine counts as stuck, or None."""
        age = self.age_s
        return f"the engine is stuck: a step has been running for {age:.0f} s" if age > self.limit_s else None
