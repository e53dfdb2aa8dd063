"""Training from scratch as a task of the loop: makes updates, records metrics, and keeps the best checkpoint."""

import math
import time
from collections.abc import Callable, Hashable
from typing import Literal, Protocol

import torch
from typing_extensions import override

from slm.core.processes import peak_rss_mib
from slm.core.progress import Progress
from slm.train.evaluate import Check, Evaluation
from slm.train.learner import Learner, Update
from slm.train.loop import Plan, Task, duration
from slm.train.metrics import Metrics, Row
from slm.train.sections import WatchdogRecipe
from slm.train.spikes import Spike, SpikeGuard
from slm.train.state import Counters
from slm.train.watchdog import Watchdog

# The speed reported at the start is that of this micro-step: the earlier ones also pay for allocations.
_TYPICAL_MICRO_STEP = 3


class Actions(Protocol):
    """What a run directory does for the task; every process of a group calls it."""

    def updated(self) -> None:
        """Takes the new weights into account after an update."""

    def evaluate(self, check: Check) -> Evaluation:
        """Evaluates the current weights, calling `check` between batches."""

    def samples(self) -> list[tuple[str, str]]:
        """Returns prompts with the texts that the current weights write for them."""

    def keep_best(self, row: Row) -> None:
        """Saves the current weights as the best checkpoint, with their metrics."""

    def save(self, counters: Counters, number: int | None = None, *, rewind_point: bool = False) -> None:
        """Saves the state for resuming, a checkpoint under a number if one is given, and the state to rewind to if asked."""

    def finish_saving(self) -> None:
        """Waits until what was saved is on the disk."""

    def await_save(self, seconds: float) -> None:
        """Waits for a save of this process in the background, for at most so many seconds; another thread may call it."""

    def rewind_position(self) -> int | None:
        """Returns the micro-steps of the state to which a spike rewinds; None if there is none."""

    def rewind(self) -> Counters:
        """Goes back to that state, and returns its position."""

    def last_saved(self) -> str:
        """Returns a phrase that names the last checkpoint."""

    def best_saved(self) -> str:
        """Returns a phrase that names the best checkpoint."""

    def less_memory(self) -> str:
        """Returns a hint that names the settings to lower when memory runs out."""


class Pretraining(Task):
    """A run of `slm train`; see `slm.train.loop.Task`."""

    def __init__(
        self,
        plan: Plan,
        actions: Actions,
        learner: Learner,
        counters: Counters,
        metrics: Metrics,
        progress: Progress,
        tokens: Callable[[int], int],
        guard: SpikeGuard | None = None,
        rewind_every: int = 0,
        watch: WatchdogRecipe | None = None,
        processes: int = 1,
        phase: Callable[[int], Hashable] = lambda _: None,
    ) -> None:
        """Prepares the task.

        Args:
            plan: The schedule.
            actions: The run directory.
            learner: Makes the updates.
            counters: The position in the run.
            metrics: The metrics so far.
            progress: Receives progress and notes.
            tokens: Returns the tokens of the first micro-steps of the run, over all processes.
            guard: Judges the updates; None if every update is made.
            rewind_every: Interval between the states to which a spike can rewind, in updates.
            watch: What counts as slow and as a hang; None watches nothing.
            processes: Number of processes that train together.
            phase: What is trained in an update, by its number from 0; see `slm.train.watchdog.Watchdog.updated`.
        """
        self.counters = counters
        self._tokens = tokens
        self._plan, self._actions, self._learner = plan, actions, learner
        self._metrics, self._progress = metrics, progress
        self._guard, self._rewind_every = guard, rewind_every
        self._rewinds = guard is not None and guard.action == "rewind"
        self._rewind_point = actions.rewind_position() if self._rewinds else None
        self._phase = phase
        self.watchdog = None if watch is None else Watchdog(watch, self._warn, processes, actions.await_save)
        self.began = time.perf_counter() - counters.elapsed_s
        self._micro_steps_timed = 0
        self._micro_step_ended = 0.0

    @property
    @override
    def micro_steps(self) -> int:
        return self.counters.micro_steps

    @property
    @override
    def evaluated(self) -> bool:
        rows = self._metrics.evaluations
        return bool(rows) and rows[-1]["updates"] == self._updates

    @property
    @override
    def evaluations_since_best(self) -> int:
        best = self._metrics.best
        return 0 if best is None else sum(row["updates"] > best["updates"] for row in self._metrics.evaluations)

    @property
    def _updates(self) -> int:
        return self.micro_steps // self._plan.accumulation

    @override
    def update(self, check: Check) -> None:
        if self._rewinds and not self._has_rewind_point():
            self._save(None, rewind_point=True)
            self._rewind_point = self.micro_steps
            self._beat()
        began = time.perf_counter()

        def after_micro_step() -> None:
            self._progress.advance()
            self._report_speed()
            check()

        update = self._learner.update(self.micro_steps, after_micro_step)
        if update.spike is not None:
            self._spiked(update.spike)
            self._beat()
            return
        self._made()
        seconds = time.perf_counter() - began
        tokens = self._tokens(self.micro_steps) - self._tokens(self.micro_steps - self._plan.accumulation)
        self._record(update, tokens / seconds)
        if self.watchdog is not None:
            self.watchdog.updated(tokens, seconds, update.data_s, self._phase(self._updates - 1))

    def _beat(self) -> None:
        if self.watchdog is not None:
            self.watchdog.beat()

    def _has_rewind_point(self) -> bool:
        """Returns whether there is a state to rewind to since the last multiple of the interval.

        There is none at such a multiple, and none where rewinding was switched on when the run was resumed.
        """
        interval = self._rewind_every * self._plan.accumulation
        least = self.micro_steps // interval * interval
        return self._rewind_point is not None and least <= self._rewind_point <= self.micro_steps

    def _warn(self, kind: Literal["slow", "hang"], told: str, numbers: Row) -> None:
        self._progress.note(f"warning: {told}")  # first: a disk that does not answer may be the cause
        self._metrics.add(kind, {**self._position(), **numbers})

    def _made(self) -> None:
        """Takes an update into account. One that was left out for a spike counts too, as one that overflowed in float16."""
        self._actions.updated()
        self.counters = self.counters.model_copy(update={"micro_steps": self.micro_steps + self._plan.accumulation})

    def _spiked(self, spike: Spike) -> None:
        """Leaves an update out, or goes back to the state before it, and records that."""
        guard, at_update = self._guard, self._updates
        assert guard is not None
        guard.count(at_update, spike)
        told = f"spike at update {at_update + 1:,}: {spike.reason}"
        if not self._rewinds:
            self._made()
            self._metrics.add("spike", self._spike_row(spike, at_update))
            self._progress.note(f"{told}; the update was skipped")
            return
        first = self.micro_steps
        back = self._actions.rewind()
        guard.restore_statistic(back.spikes)
        guard.left_out += at_update + 1 - back.micro_steps // self._plan.accumulation
        self.counters = self.counters.model_copy(update={"micro_steps": back.micro_steps})
        row = self._spike_row(spike, at_update)
        guard.rewinds.append(dict(row))
        # Before the metrics, and not in the background: a run that is killed until then repeats the spike.
        self._save(None)
        self._actions.finish_saving()
        self._metrics.rewind(self._updates, row)
        self._progress.advance(self.micro_steps - first - self._plan.accumulation)
        self._progress.note(
            f"{told}; went back to update {self._updates:,}, and the data of the {at_update + 1 - self._updates:,} updates "
            "since then is left out"
        )

    def _spike_row(self, spike: Spike, at_update: int) -> Row:
        assert self._guard is not None
        return {**self._position(), "action": self._guard.action, "at_update": at_update + 1, **spike.fields()}

    def _record(self, update: Update, speed: float) -> None:
        self._metrics.add(
            "train",
            {
                **self._position(),
                "loss": update.loss,
                "learning_rate": update.learning_rate,
                # JSON has no infinity.
                "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
                "tokens_s": round(speed, 1),
            },
        )
        self._progress.advance(0, loss=f"{update.loss:.3f}", tok_s=f"{speed:,.0f}")

    @override
    def evaluate(self, check: Check) -> None:
        """Evaluates the current weights, draws samples, and keeps the weights if they are the best so far."""
        measured = self._actions.evaluate(check)
        self._beat()
        if not math.isfinite(measured.loss):
            raise FloatingPointError(f"the validation loss is {measured.loss}")
        row = {
            **self._position(),
            "loss": measured.loss,
            "perplexity": measured.perplexity,
            "bits_per_byte": measured.bits_per_byte,
        }
        best = self._metrics.best
        if self.micro_steps > 0 and (best is None or measured.loss < best["loss"]):
            self._actions.keep_best(row)  # before the row is written that claims it
            self._beat()
        samples = self._actions.samples()
        self._beat()
        for prompt, text in samples:
            self._metrics.add("sample", {**self._position(), "prompt": prompt, "text": text})
            self._progress.note(f"sample: {text!r}")
        self._metrics.add("eval", row)
        self._metrics.draw()
        self._progress.note(
            f"{self.micro_steps:,} micro-steps: validation loss {measured.loss:.4f}, "
            f"{measured.bits_per_byte:.4f} bits per byte"
        )

    @override
    def save(self, number: int | None) -> None:
        self._save(number)

    def _save(self, number: int | None, *, rewind_point: bool = False) -> None:
        now: dict[str, object] = {
            "elapsed_s": self.elapsed_s,
            "scaler": self._learner.scaler.state_dict(),
            "logs": self._metrics.logs.run_ids,
        }
        if self._guard is not None:
            now["spikes"] = self._guard.state()
        else:  # a guard that is switched on later must not judge by updates of long before
            now["spikes"] = self.counters.spikes.without_statistic()
        self._actions.save(self.counters.model_copy(update=now), number, rewind_point=rewind_point)

    @override
    def finish_saving(self) -> None:
        self._actions.finish_saving()

    @override
    def last_saved(self) -> str:
        return self._actions.last_saved()

    @override
    def advice_on_divergence(self) -> str:
        return (
            f"{self._actions.best_saved()}; try a lower schedule.learning_rate, a longer warm-up, or "
            "machine.precision=float32"
        )

    @override
    def advice_on_memory(self) -> str:
        return self._actions.less_memory()

    def _position(self) -> Row:
        return {
            "micro_steps": self.micro_steps,
            "updates": self._updates,
            "tokens": self._tokens(self.micro_steps),
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def _report_speed(self) -> None:
        """Reports once the time of a micro-step, the peak memory, and the time that the run will take."""
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
            rest = seconds * (self._plan.micro_steps - self.micro_steps)
            self._progress.note(
                f"{seconds:.2f} s a micro-step, {self._tokens(1) / seconds:,.0f} tokens/s, peak memory "
                f"{memory:,.0f} MiB; about {duration(rest)} for all of it at this speed"
            )
