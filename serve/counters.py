"""The counters of an engine, for metrics."""

from dataclasses import dataclass, field

from slm.runtime.scheduler import Work


@dataclass
class Counters(Work):
    """The counters and the current load of an engine.

    Attributes:
        asked: Requests accepted.
        refused: Requests rejected because the queue was full.
        done: Texts that ended, by reason.
        waiting: Requests in the queue now.
        running: Texts in slots now.
        cache_bytes: Memory of caches, including snapshots.
    """

    asked: int = 0
    refused: int = 0
    done: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    running: int = 0
    cache_bytes: int = 0
