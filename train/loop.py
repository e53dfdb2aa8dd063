"""The training loop: updates, evaluations, saving, and stopping where the run can be gone on from."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slm.core.errors import SlmError
from slm.core.machine import peak_rss_mib
from slm.core.progress import Progress
from slm.train.evaluate import Check, Evaluation
from slm.train.interrupt import Interruption
from slm.train.learner import Learner, Update
from slm.train.metrics import Metrics, Row
from slm.train.state import Counters

# Saving takes time and disk; a killed run loses this much at most. Ctrl-C and SIGTERM save first.
_SAVE_EVERY_S = 300.0
# The speed told at the start is that of this micro-step: the ones before it also pay for allocations.
_TYPICAL_MICRO_STEP = 3


class Loop:
    """A run from where it stands to its end."""

    def __init__(
        self,
        learner: Learner,
        counters: Counters,
        metrics: Metrics,
        *,
        updates: int,
        tokens_per_micro_step: int,
        evaluate: Callable[[Check], Evaluation],
        evaluate_every: int,
        keep_best: Callable[[Row], None],
        save: Callable[[Counters], None],
        last: Path,
        interruption: Interruption,
        progress: Progress,
    ) -> None:
        """Puts together what a run needs.

        Args:
            learner: Makes the updates.
            counters: Where the run stands.
            metrics: Those of the run so far.
            updates: Of the whole run.
            tokens_per_micro_step: Learned from in a micro-step.
            evaluate: Measures the model as it stands; calls what it is given between batches.
            evaluate_every: Interval in micro-steps.
            keep_best: Saves the model as it stands as the best, with its metrics.
            save: Saves everything that going on needs.
            last: The checkpoint that `save` makes.
            interruption: Says when the run is to stop.
            progress: Is told how it goes.
        """
        self.counters = counters
        self._learner, self._metrics, self._interruption, self._progress = learner, metrics, interruption, progress
        self._evaluate, self._evaluate_every, self._keep_best, self._save = evaluate, evaluate_every, keep_best, save
        self._last = last
        self._total = updates * learner.accumulation
        self._tokens_per_micro_step = tokens_per_micro_step
        self._began = time.perf_counter() - counters.elapsed_s
        self._saved_at = time.perf_counter()
        self._micro_steps_timed = 0
        self._micro_step_ended = 0.0

    def run(self) -> None:
        """Trains to the end.

        Raises:
            SlmError: When the loss is no longer finite.
            KeyboardInterrupt: After saving, when Ctrl-C asked for it.
            SystemExit: After saving, when SIGTERM asked for it.
        """
        self._progress.start("training", self._total, "micro-steps")
        self._progress.advance(self.counters.micro_steps)
        try:
            while True:
                if self._evaluation_is_due():
                    self._measure()
                if self.counters.micro_steps >= self._total:
                    break
                self._update()
                if time.perf_counter() - self._saved_at > _SAVE_EVERY_S:
                    self._save_now()
            self._save_now()
        finally:
            self._progress.finish()

    def _update(self) -> None:
        first = self.counters.micro_steps
        began = time.perf_counter()
        try:
            update = self._learner.update(first, self._after_micro_step)
        except FloatingPointError as error:
            number = first // self._learner.accumulation + 1
            kept = f"the last good checkpoint is {self._last}" if self._last.exists() else "no checkpoint was saved yet"
            raise SlmError(f"update {number:,}: {error}", f"{kept}; try a lower schedule.learning_rate") from None
        micro_steps = first + self._learner.accumulation
        self.counters = self.counters.model_copy(update={"micro_steps": micro_steps})
        speed = self._learner.accumulation * self._tokens_per_micro_step / (time.perf_counter() - began)
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
        if self._metrics.evaluations and self._metrics.evaluations[-1]["micro_steps"] == done:
            return False
        before = done - self._learner.accumulation
        return done in (0, self._total) or done // self._evaluate_every > before // self._evaluate_every

    def _measure(self) -> None:
        measured = self._evaluate(self._safe_point)
        row = {
            **self._position(),
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "bits_per_byte": measured.bits_per_byte,
        }
        best = self._metrics.best
        if self.counters.micro_steps > 0 and (best is None or measured.loss < best["loss"]):
            self._keep_best(row)  # before the row that says so
        self._metrics.add("eval", row)
        self._metrics.draw()
        self._progress.note(
            f"{self.counters.micro_steps:,} micro-steps: validation loss {measured.loss:.4f}, "
            f"{measured.bits_per_byte:.4f} bits per byte"
        )

    def _position(self) -> Row:
        done = self.counters.micro_steps
        return {
            "micro_steps": done,
            "updates": done // self._learner.accumulation,
            "tokens": done * self._tokens_per_micro_step,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those before the run was resumed included."""
        return time.perf_counter() - self._began

    def _after_micro_step(self) -> None:
        self._progress.advance()
        self._tell_speed()
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
                f"{seconds:.2f} s a micro-step, {self._tokens_per_micro_step / seconds:,.0f} tokens/s, peak memory "
                f"{memory:,.0f} MiB; about {duration(rest)} for all of it at this speed"
            )

    def _save_now(self) -> None:
        scaler = self._learner.scaler.state_dict()
        self._save(self.counters.model_copy(update={"elapsed_s": self.elapsed_s, "scaler": scaler}))
        self._saved_at = time.perf_counter()

    def _safe_point(self) -> None:
        """Stops here if asked to: model and optimizer are as the last update left them."""
        if self._interruption.pending is not None:
            self._progress.note("stopping: saving the run as the last update left it")
            self._save_now()
            self._interruption.deliver()


def duration(seconds: float) -> str:
    """Returns a length of time as people say it."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
