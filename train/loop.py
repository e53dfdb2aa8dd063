"""The training loop: updates, evaluations, saving, and stopping where the run can be gone on from."""

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch

from slm.core.errors import SlmError
from slm.core.machine import peak_rss_mib
from slm.core.progress import Progress
from slm.train.evaluate import Check, Evaluation
from slm.train.interrupt import Interruption
from slm.train.learner import Learner, Update
from slm.train.metrics import Metrics, Row
from slm.train.parallel import Processes
from slm.train.state import Counters

# Saving takes time and disk; a killed run loses this much at most. Ctrl-C and SIGTERM save first.
_SAVE_EVERY_S = 300.0
# The speed told at the start is that of this micro-step: the ones before it also pay for allocations.
_TYPICAL_MICRO_STEP = 3


@dataclass(frozen=True)
class Plan:
    """What happens when.

    Attributes:
        updates: Of the whole run.
        tokens_per_micro_step: Learned from in a micro-step, by all processes.
        evaluate_every: Interval in micro-steps.
        patience: Evaluations without a new best after which the run ends; None goes on to the end.
        checkpoint_every: Interval of numbered checkpoints in updates; None keeps none.
    """

    updates: int
    tokens_per_micro_step: int
    evaluate_every: int
    patience: int | None = None
    checkpoint_every: int | None = None


class Actions(Protocol):
    """What the loop asks for; in every process, for each may be needed."""

    def updated(self) -> None:
        """Is told that the weights have changed."""

    def evaluate(self, check: Check) -> Evaluation:
        """Measures the model as it stands; calls what it is given between batches."""

    def samples(self) -> list[tuple[str, str]]:
        """Returns prompts, and texts that the model as it stands makes of them."""

    def keep_best(self, row: Row) -> None:
        """Saves the model as it stands as the best, with its metrics."""

    def save(self, counters: Counters, number: int | None = None) -> None:
        """Saves everything that going on needs; the checkpoint under a number too, where one is given."""

    def last_saved(self) -> str:
        """Says in a few words what was saved last."""

    def best_saved(self) -> str:
        """Says in a few words which checkpoint was measured and found good."""

    def less_memory(self) -> str:
        """Advises what to lower, and by how much, when memory ran out."""


class _Stopped(Exception):
    """Unwinds to where the weights, not their average, are in place."""


class Loop:
    """A run from where it stands to its end."""

    def __init__(
        self,
        plan: Plan,
        actions: Actions,
        learner: Learner,
        counters: Counters,
        metrics: Metrics,
        interruption: Interruption,
        processes: Processes,
        progress: Progress,
    ) -> None:
        """Puts together what a run needs.

        Args:
            plan: What happens when.
            actions: What happens then.
            learner: Makes the updates.
            counters: Where the run stands.
            metrics: Those of the run so far.
            interruption: Says when the run is to stop or to be saved.
            processes: Those that run the same loop.
            progress: Is told how it goes.
        """
        self.counters = counters
        self._plan, self._actions, self._learner, self._metrics = plan, actions, learner, metrics
        self._interruption, self._processes, self._progress = interruption, processes, progress
        self._total = plan.updates * learner.accumulation
        self._began = time.perf_counter() - counters.elapsed_s
        self._saved_at = time.perf_counter()
        self._micro_steps_timed = 0
        self._micro_step_ended = 0.0

    def run(self) -> None:
        """Trains to the end.

        Raises:
            SlmError: When the loss is no longer finite, or memory runs out.
            KeyboardInterrupt: After saving, when Ctrl-C asked for it.
            SystemExit: After saving, when SIGTERM asked for it.
        """
        self._progress.start("training", self._total, "micro-steps")
        self._progress.advance(self.counters.micro_steps)
        try:
            while True:
                if self._evaluation_is_due():
                    self._measure()
                if self.counters.micro_steps >= self._total or self._out_of_patience():
                    break
                self._update()
                self._between_updates()
            self._save_now()
        except _Stopped:
            self._stop()
        except MemoryError:
            raise self._out_of_memory() from None
        except RuntimeError as error:  # CUDA's OutOfMemoryError is one; the CPU's allocator has none of its own
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise self._out_of_memory() from None
            raise
        finally:
            self._progress.finish()

    def _update(self) -> None:
        first = self.counters.micro_steps
        began = time.perf_counter()
        try:
            update = self._learner.update(first, self._after_micro_step)
        except FloatingPointError as error:
            raise self._diverged(first // self._learner.accumulation + 1, first + 1, str(error)) from None
        self._actions.updated()
        self.counters = self.counters.model_copy(update={"micro_steps": first + self._learner.accumulation})
        speed = self._learner.accumulation * self._plan.tokens_per_micro_step / (time.perf_counter() - began)
        self._record(update, speed)

    def _record(self, update: Update, speed: float) -> None:
        self._metrics.add(
            "train",
            {
                **self._position(),
                "loss": update.loss,
                "learning_rate": update.learning_rate,
                # JSON knows no infinity
                "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
                "tokens_s": round(speed, 1),
            },
        )
        self._progress.advance(0, loss=f"{update.loss:.3f}", tok_s=f"{speed:,.0f}")

    def _evaluation_is_due(self) -> bool:
        done = self.counters.micro_steps
        if self._metrics.evaluations and self._metrics.evaluations[-1]["updates"] == done // self._learner.accumulation:
            return False
        before, every = done - self._learner.accumulation, self._plan.evaluate_every
        return done == 0 or done >= self._total or done // every > before // every

    def _measure(self) -> None:
        measured = self._actions.evaluate(self._safe_point)
        if not math.isfinite(measured.loss):  # before it passes for the best, or for the end of the run
            done = self.counters.micro_steps
            raise self._diverged(done // self._learner.accumulation, done, f"the validation loss is {measured.loss}")
        row = {
            **self._position(),
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "bits_per_byte": measured.bits_per_byte,
        }
        best = self._metrics.best
        if self.counters.micro_steps > 0 and (best is None or measured.loss < best["loss"]):
            self._actions.keep_best(row)  # before the row that says so
        for prompt, text in self._actions.samples():
            self._metrics.add("sample", {**self._position(), "prompt": prompt, "text": text})
            self._progress.note(f"sample: {text!r}")
        self._metrics.add("eval", row)
        self._metrics.draw()
        self._progress.note(
            f"{self.counters.micro_steps:,} micro-steps: validation loss {measured.loss:.4f}, "
            f"{measured.bits_per_byte:.4f} bits per byte"
        )

    def _out_of_patience(self) -> bool:
        best = self._metrics.best
        if best is None:
            return False
        since_best = sum(row["updates"] > best["updates"] for row in self._metrics.evaluations)
        out = self._plan.patience is not None and since_best >= self._plan.patience
        if out:
            self._progress.note(f"stopping early: no new best in {since_best} evaluations")
        return out

    def _position(self) -> Row:
        done = self.counters.micro_steps
        return {
            "micro_steps": done,
            "updates": done // self._learner.accumulation,
            "tokens": done * self._plan.tokens_per_micro_step,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those before the run was resumed included."""
        return time.perf_counter() - self._began

    def _after_micro_step(self) -> None:
        self._progress.advance()
        self._tell_speed()
        if self._processes.size == 1:  # several must agree, which takes time: they do it between two updates
            self._safe_point()

    def _tell_speed(self) -> None:
        """Says once how long a micro-step takes, what memory it took, and how long the rest will take."""
        if self._micro_steps_timed == _TYPICAL_MICRO_STEP:
            return
        cuda = self._learner.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._micro_step_ended = now - self._micro_step_ended, now
        self._micro_steps_timed += 1
        if self._micro_steps_timed == _TYPICAL_MICRO_STEP:
            memory = torch.cuda.max_memory_allocated() / (1 << 20) if cuda else peak_rss_mib()
            rest = seconds * (self._total - self.counters.micro_steps)
            self._progress.note(
                f"{seconds:.2f} s a micro-step, {self._plan.tokens_per_micro_step / seconds:,.0f} tokens/s, peak memory "
                f"{memory:,.0f} MiB; about {duration(rest)} for all of it at this speed"
            )

    def _between_updates(self) -> None:
        """Saves when it is time to, when somebody asked for it, and before stopping."""
        overdue = time.perf_counter() - self._saved_at > _SAVE_EVERY_S
        updates = self.counters.micro_steps // self._learner.accumulation
        every = self._plan.checkpoint_every
        numbered = every is not None and updates % every == 0
        wanted, stop, overdue = self._agreed(
            self._interruption.checkpoint_wanted, self._interruption.pending is not None, overdue
        )
        if wanted or overdue or numbered:
            self._save_now(updates if numbered else None)
        if wanted:
            self._interruption.checkpoint_wanted = False
            self._progress.note(f"checkpoint after {updates:,} updates, as asked: {self._actions.last_saved()}")
        if stop:
            self._stop()

    def _agreed(self, *wishes: bool) -> list[bool]:
        """Returns what any of the processes wishes."""
        return [count > 0 for count in self._processes.total([float(wish) for wish in wishes])]

    def _save_now(self, number: int | None = None) -> None:
        scaler = self._learner.scaler.state_dict()
        self._actions.save(self.counters.model_copy(update={"elapsed_s": self.elapsed_s, "scaler": scaler}), number)
        self._saved_at = time.perf_counter()

    def _safe_point(self) -> None:
        """Stops here if asked to: model and optimizer are as the last update left them."""
        (stop,) = self._agreed(self._interruption.pending is not None)
        if stop:
            raise _Stopped

    def _stop(self) -> None:
        self._progress.note("stopping: saving the run as the last update left it")
        self._save_now()
        self._interruption.deliver()

    def _diverged(self, update: int, micro_step: int, what: str) -> SlmError:
        return SlmError(
            f"update {update:,}, micro-step {micro_step:,}: {what}",
            f"{self._actions.best_saved()}; try a lower schedule.learning_rate, a longer warm-up, or "
            "machine.precision=float32",
        )

    def _out_of_memory(self) -> SlmError:
        return SlmError(
            f"out of memory at micro-step {self.counters.micro_steps + 1:,}",
            f"{self._actions.less_memory()}; {self._actions.last_saved()}",
        )


def duration(seconds: float) -> str:
    """Returns a length of time as people say it."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
