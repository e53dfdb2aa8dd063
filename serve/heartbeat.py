"""How long the engine has been at one piece of work, and from when on it counts as stuck."""

import time


class Heartbeat:
    """Beats at the beginning of each piece of work. Written by the engine's thread, read by others."""

    def __init__(self, limit_s: float) -> None:
        """Takes how long one piece of work may take, in seconds."""
        self.limit_s = limit_s
        self._since: float | None = None

    def beat(self) -> None:
        """Marks the beginning of a piece of work, which is the end of the one before."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """Marks that there is no work."""
        self._since = None

    @property
    def age_s(self) -> float:
        """How long the present piece of work has been going on, in seconds; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def stalled(self) -> str | None:
        """Why the engine counts as stuck, or None."""
        age = self.age_s
        return f"the engine is stuck: a step has been running for {age:.0f} s" if age > self.limit_s else None
