"""Scheduling of jobs on a cluster whose machines may be lost: a lost job is done again elsewhere."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from slm.core.errors import SlmError
from slm.core.progress import Progress

# How often a job may be lost before it is taken for the cause.
MOST_LOSSES = 4
# Jobs handed out per free processor, so that none waits for the next one.
_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: What the job makes, for messages, such as "encode train-00012".
        task: Name of the function in `slm.train.data.cluster.tasks`.
        spec: Its arguments, which JSON can hold.
    """

    name: str
    task: str
    spec: dict[str, Any]


class LostError(Exception):
    """The worker of a job ended before the job did; the message has the reason."""


class Cluster(Protocol):
    """Runs tasks on machines."""

    def slots(self) -> int:
        """Returns the number of tasks that can run at once now; 0 while no machine is there."""

    def submit(self, task: str, spec: dict[str, Any]) -> Any:
        """Starts a task; returns a handle, which can be hashed."""

    def wait(self, handles: list[Any]) -> Any | None:
        """Returns a handle whose task has ended; None if none does within some seconds."""

    def result(self, handle: Any) -> bytes:
        """Returns the result of a task that has ended.

        Raises:
            LostError: When its worker or machine is lost.
            SlmError: When the task failed.
        """

    def cancel(self, handles: list[Any]) -> None:
        """Ends tasks whose results are not needed."""


def run_jobs(
    jobs: Iterable[Job], cluster: Cluster, progress: Progress, most: int | None = None
) -> Iterator[tuple[Job, bytes]]:
    """Runs jobs and yields them with their results, as they end.

    Args:
        jobs: The jobs, in the order in which they start.
        cluster: The machines.
        progress: Receives a note when a job is lost, and when no machine is left.
        most: Maximum number of jobs that run at once; None uses all machines.

    Raises:
        SlmError: When a job fails, or is lost too often.
    """
    waiting = iter(jobs)
    running: dict[Any, Job] = {}
    losses: dict[str, int] = {}
    again: list[Job] = []
    more, alone = True, False
    try:
        while True:
            room = most or _AHEAD * max(1, cluster.slots())
            while len(running) < room and (again or more):
                job = again.pop() if again else next(waiting, None)
                if job is None:
                    more = False
                else:
                    running[cluster.submit(job.task, job.spec)] = job
            if not running:
                return
            handle = cluster.wait(list(running))
            if handle is None:
                if cluster.slots() == 0 and not alone:
                    alone = True
                    progress.note("no machine is left in the cluster: waiting for one to join")
                continue
            alone = False
            job = running.pop(handle)
            try:
                result = cluster.result(handle)
            except LostError as error:
                losses[job.name] = losses.get(job.name, 0) + 1
                if losses[job.name] >= MOST_LOSSES:
                    raise SlmError(
                        f"{job.name} was lost {MOST_LOSSES} times ({error})",
                        "out of memory is the usual reason: give each task more, or try a lower --max-document-bytes",
                    ) from None
                progress.note(f"{job.name} was lost ({error}): it is done again")
                again.append(job)
                continue
            yield job, result
    finally:
        if running:
            cluster.cancel(list(running))
