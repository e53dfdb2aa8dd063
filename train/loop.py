"""The loop of `slm train` and `slm finetune`: when a run evaluates, saves, stops early, and stops on request."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from slm.core.errors import SlmError
from slm.core.progress import Progress
from slm.train.evaluate import Check
from slm.train.interrupt import Interruption
from slm.train.parallel import Processes
from slm.train.watchdog import Watchdog

# Saving costs time and disk writes; a killed run loses at most this much work. Ctrl-C and SIGTERM save first.
_SAVE_EVERY_S = 300.0


@dataclass(frozen=True)
class Plan:
    """The schedule of a run.

    Attributes:
        name: Name of the work, for the progress bar.
        unit: Name of a micro-step, singular: "micro-step", or "update" where an update has only one.
        updates: Updates in the whole run.
        accumulation: Micro-steps per update.
        evaluate_every: Interval between evaluations, in micro-steps.
        evaluation: Name of the interval between evaluations, singular.
        patience: Evaluations without a new best after which the run ends; None disables early stopping.
        checkpoint_every: Interval between numbered checkpoints, in updates; None keeps none.
    """

    name: str
    unit: str
    updates: int
    accumulation: int
    evaluate_every: int
    evaluation: str = "evaluation"
    patience: int | None = None
    checkpoint_every: int | None = None

    @property
    def micro_steps(self) -> int:
        """Micro-steps in the whole run."""
        return self.updates * self.accumulation


class Task(Protocol):
    """The work that a loop drives. Every process of a group calls the same methods in the same order."""

    began: float  # `time.perf_counter()` of the start, as if the run had never been interrupted

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return time.perf_counter() - self.began

    @property
    def micro_steps(self) -> int:
        """Micro-steps done, a multiple of the plan's accumulation."""

    @property
    def evaluated(self) -> bool:
        """Whether the current weights have been evaluated."""

    @property
    def evaluations_since_best(self) -> int:
        """Evaluations after the best one; 0 before the first update was evaluated."""

    def update(self, check: Check) -> None:
        """Makes the next update and records it.

        Args:
            check: Called after each micro-step; may raise to abandon the update, which then changes nothing.

        Raises:
            FloatingPointError: When the loss or the gradient is not finite; the weights are unchanged.
        """

    def evaluate(self, check: Check) -> None:
        """Evaluates the current weights, records the result, and keeps the weights if they are the best so far.

        Args:
            check: Called between batches; may raise to abandon the evaluation.

        Raises:
            FloatingPointError: When the loss is not finite; nothing is recorded or kept.
        """

    def save(self, number: int | None) -> None:
        """Saves the state for resuming, and a checkpoint under a number if one is given.

        The files may be written in the background.

        Raises:
            SlmError: When the previous save failed in the background.
        """

    def finish_saving(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            SlmError: When it could not be written.
        """

    def last_saved(self) -> str:
        """Returns a phrase that names the last save."""

    def advice_on_divergence(self) -> str:
        """Returns a hint for a loss or gradient that is not finite."""

    def advice_on_memory(self) -> str:
        """Returns a hint that names the settings to lower when memory runs out."""


class _Stopped(Exception):
    """Unwinds to a frame in which the weights, not their moving average, are in place."""


class Loop:
    """Runs a task from its current position to its end."""

    def __init__(
        self,
        plan: Plan,
        task: Task,
        interruption: Interruption,
        processes: Processes,
        progress: Progress,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Prepares the loop.

        Args:
            plan: The schedule.
            task: The work.
            interruption: Pending requests to stop or to save.
            processes: The group of processes that run this loop together.
            progress: Receives the progress bar and notes.
            watchdog: Is told that the run goes on; None for no watch.
        """
        self._plan, self._task, self._watchdog = plan, task, watchdog
        self._interruption, self._processes, self._progress = interruption, processes, progress
        self._saved_at = time.perf_counter()

    def run(self) -> None:
        """Trains to the end, or until patience runs out. The end itself is not saved.

        Raises:
            SlmError: When a loss or gradient is not finite, or memory runs out.
            KeyboardInterrupt: After saving, when Ctrl-C asked to stop.
            SystemExit: After saving, when SIGTERM asked to stop.
        """
        task = self._task
        self._progress.start(self._plan.name, self._plan.micro_steps, f"{self._plan.unit}s")
        self._progress.advance(task.micro_steps)
        try:
            with self._explained(), self._watchdog or nullcontext():
                while True:
                    if self._evaluation_is_due():
                        self._evaluate()
                    if task.micro_steps >= self._plan.micro_steps or self._out_of_patience():
                        return
                    self._update()
                    self._between_updates()
        except _Stopped:
            self._stop()
        finally:
            self._progress.finish()

    def save(self, number: int | None = None) -> None:
        """Saves the state for resuming, and a checkpoint under a number if one is given.

        Raises:
            SlmError: When memory runs out.
        """
        with self._explained():
            self._task.save(number)
        self._saved_at = time.perf_counter()
        self._beat()

    def finish_saving(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            SlmError: When it could not be written.
        """
        self._task.finish_saving()

    def _update(self) -> None:
        first = self._task.micro_steps
        try:
            self._task.update(self._within_update)
        except FloatingPointError as error:
            raise self._diverged(first // self._plan.accumulation + 1, first + 1, str(error)) from None

    def _evaluate(self) -> None:
        try:
            self._task.evaluate(self._safe_point)
        except FloatingPointError as error:
            done = self._task.micro_steps
            raise self._diverged(done // self._plan.accumulation, done, str(error)) from None

    def _evaluation_is_due(self) -> bool:
        if self._task.evaluated:
            return False
        done, every = self._task.micro_steps, self._plan.evaluate_every
        before = done - self._plan.accumulation
        return done == 0 or done >= self._plan.micro_steps or done // every > before // every

    def _out_of_patience(self) -> bool:
        since = self._task.evaluations_since_best
        out = self._plan.patience is not None and since >= self._plan.patience
        if out:
            self._progress.note(f"stopping early: no new best in {since} {self._plan.evaluation}s")
        return out

    def _between_updates(self) -> None:
        """Saves when a save is due or requested, and stops on request."""
        self._beat()
        overdue = time.perf_counter() - self._saved_at > _SAVE_EVERY_S
        updates, every = self._task.micro_steps // self._plan.accumulation, self._plan.checkpoint_every
        numbered = every is not None and updates % every == 0
        wanted, stop, overdue = self._agreed(
            self._interruption.checkpoint_wanted, self._interruption.pending is not None, overdue
        )
        if wanted or overdue or numbered:
            self.save(updates if numbered else None)
        if wanted:
            self.finish_saving()
            self._interruption.checkpoint_wanted = False
            self._progress.note(f"checkpoint after {updates:,} updates, as asked: {self._task.last_saved()}")
        if stop:
            self._stop()

    def _agreed(self, *requests: bool) -> list[bool]:
        """Returns which requests any of the processes has."""
        return [count > 0 for count in self._processes.total([float(request) for request in requests])]

    def _beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat()

    def _within_update(self) -> None:
        self._beat()
        if self._processes.size == 1:  # a group would have to communicate: it agrees between updates instead
            self._safe_point()

    def _safe_point(self) -> None:
        """Stops here on request: weights and optimizer are as the last update left them."""
        self._beat()
        (stop,) = self._agreed(self._interruption.pending is not None)
        if stop:
            raise _Stopped

    def _stop(self) -> None:
        self._progress.note("stopping: saving the run as the last update left it")
        self.save()
        self.finish_saving()
        self._interruption.deliver()

    def _diverged(self, update: int, micro_step: int, what: str) -> SlmError:
        place = f"update {update:,}"
        if self._plan.unit != "update":
            place += f", {self._plan.unit} {micro_step:,}"
        return SlmError(f"{place}: {what}", self._task.advice_on_divergence())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error about memory into one that names the place and the settings to lower."""
        try:
            yield
        except MemoryError:
            raise self._out_of_memory() from None
        except RuntimeError as error:  # CUDA's OutOfMemoryError is one; the CPU's allocator has none of its own
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise self._out_of_memory() from None
            raise

    def _out_of_memory(self) -> SlmError:
        return SlmError(
            f"out of memory at {self._plan.unit} {self._task.micro_steps + 1:,}",
            f"{self._task.advice_on_memory()}; {self._task.last_saved()}",
        )


def duration(seconds: float) -> str:
    """Returns a length of time in the largest unit of which there are at least two."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
