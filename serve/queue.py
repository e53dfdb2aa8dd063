"""The requests that have not ended, and the delivery of their events. Thread-safe."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.generation import Generation, Piece, Result

# Receives each piece and then the result; must not block.
Deliver = Callable[[Piece | Result], None]


class Full(SlmError):
    """Raised if the queue has no room for another request."""


@dataclass(eq=False)
class Job:
    """A request in the queue or in a slot.

    Attributes:
        generation: Its text.
        deliver: Receives its pieces and its result.
        adapter: The adapter to use; None for the base model.
        deadline: Its latest end, in seconds of `time.monotonic`; None for no deadline.
        cancelled: Whether it must end before its next token.
        over: Whether its result has been delivered.
    """

    generation: Generation
    deliver: Deliver
    adapter: Adapter | None = None
    deadline: float | None = None
    cancelled: bool = False
    over: bool = False

    def late(self, now: float) -> bool:
        """Returns whether the deadline has passed."""
        return self.deadline is not None and now >= self.deadline


class Jobs:
    """The waiting and the running requests.

    Attributes:
        changed: The lock of everything here; notified when there is something to do.
        waiting: Jobs in the queue, oldest first.
        running: Jobs in slots.
        asked: Requests accepted so far.
        refused: Requests rejected so far because the queue was full.
        done: Texts that ended so far, by reason.
    """

    def __init__(self, slots: int, queue: int) -> None:
        """Sets the most jobs that may run, and the most that may wait."""
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.asked = self.refused = 0
        self.done: dict[str, int] = {}
        self._slots, self._queue = slots, queue
        self._unfinished: dict[Generation, Job] = {}
        self._delivering = threading.Lock()

    def add(self, job: Job) -> None:
        """Puts a job into the queue.

        Raises:
            Full: If the queue is full.
        """
        with self.changed:
            if len(self.waiting) >= self._queue + self._slots - len(self.running):
                self.refused += 1
                raise Full(f"{len(self.waiting)} completions are waiting already", "try again later")
            self._unfinished[job.generation] = job
            self.waiting.append(job)
            self.asked += 1
            self.changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Marks the job of a text as cancelled, unless it has ended."""
        with self.changed:
            job = self._unfinished.get(generation)
            if job is not None:
                job.cancelled = True
                self.changed.notify()

    def turn(self, now: float) -> tuple[list[Job], list[Job]]:
        """Returns the jobs that must end, and those that leave the queue for a free slot and now count as running."""
        with self.changed:
            gone = [job for job in (*self.waiting, *self.running) if job.cancelled or job.over or job.late(now)]
            self.waiting = deque(job for job in self.waiting if job not in gone)
            room = self._slots - len(self.running)
            begun = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
            self.running += begun
        return gone, begun

    def unfinished(self, due: float | None = None) -> list[Job]:
        """Empties the queue. Returns its jobs and the running ones.

        Args:
            due: Only jobs whose deadline is before this time; None for all.
        """
        with self.changed:
            jobs = [job for job in self._unfinished.values() if due is None or job.late(due)]
            self.waiting = deque(job for job in self.waiting if job not in jobs)
        return jobs

    def expected_wait_s(self, step_s: float) -> float:
        """Returns the estimated wait for a slot in whole seconds, at least 1, from the duration of a step."""
        with self.changed:
            ahead, texts = len(self.waiting), [job.generation for job in self.running]
        left = [text.request.max_new_tokens - len(text.tokens) for text in texts]
        turns = 1 + ahead // self._slots
        return float(max(1, round(turns * step_s * (sum(left) / len(left) if left else 1))))

    def leave(self, job: Job) -> None:
        """Removes a running job, once its slot is free."""
        with self.changed:
            if job in self.running:
                self.running.remove(job)

    def deliver(self, job: Job, events: Sequence[Piece | Result]) -> None:
        """Delivers events. Nothing follows a result, which another thread may have delivered already."""
        with self._delivering:
            for event in events:
                if job.over:
                    return
                job.over = isinstance(event, Result)
                try:
                    job.deliver(event)
                except Exception:  # the client has disconnected; other texts must not fail because of it
                    job.cancelled = True

    def finish(self, job: Job, result: Result) -> bool:
        """Counts the end of a text. Returns whether this is the first end, whose result must be delivered."""
        with self.changed:
            if self._unfinished.pop(job.generation, None) is None:
                return False
            self.done[result.stopped] = self.done.get(result.stopped, 0) + 1
            return True
