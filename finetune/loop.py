"""Fine-tuning as a task of the training loop: records every update, and reports every epoch."""

import time
from pathlib import Path

from typing_extensions import override

from slm.core.progress import Progress
from slm.finetune.fit import Fit
from slm.finetune.midway import Midway
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import save_state
from slm.train.evaluate import Check
from slm.train.logs.logs import Logs
from slm.train.loop import Plan, Task, duration
from slm.train.sections import WatchdogRecipe
from slm.train.state import TRAINER
from slm.train.watchdog import Watchdog

# After this long without a line about an epoch, a line reports the updates since.
_LINE_EVERY_S = 60.0
# Characters of a sample's texts in its line.
_SHOWN = 100


def plan_of(fit: Fit, settings: FinetuneSettings) -> Plan:
    """Returns the schedule of a run: an evaluation after every epoch, and patience where the best epoch is kept."""
    return Plan(
        name="fine-tuning",
        unit="update",
        updates=fit.updates,
        accumulation=1,
        evaluate_every=fit.updates_per_epoch,
        evaluation="epoch",
        patience=settings.patience if settings.keep == "best" else None,
    )


class FineTuning(Task):
    """A run of `slm finetune`; see `slm.train.loop.Task`."""

    def __init__(
        self, fit: Fit, out: Path, progress: Progress, midway: Midway | None = None, logs: Logs | None = None
    ) -> None:
        """Prepares the task.

        Args:
            fit: The weights and the position.
            out: The directory of the result, which holds the saved state until then.
            progress: Receives progress and notes.
            midway: Answers rows after some epochs; None answers none.
            logs: Receive the rows of history; None for no logs.
        """
        self._fit, self._out, self._progress = fit, out, progress
        self._midway, self._logs = midway, logs or Logs()
        self._sent = len(fit.standing.history)
        self.watchdog = Watchdog(WatchdogRecipe(), lambda _, told, __: progress.note(f"warning: {told}"))
        self.began = time.perf_counter() - fit.standing.elapsed_s
        self._reported = time.perf_counter(), 0  # time of the last line, and the rows of history that it covers

    @property
    @override
    def micro_steps(self) -> int:
        return self._fit.standing.updates

    @property
    @override
    def evaluated(self) -> bool:
        rows = self._fit.standing.evaluations
        return bool(rows) and rows[-1]["updates"] == self.micro_steps

    @property
    @override
    def evaluations_since_best(self) -> int:
        standing = self._fit.standing
        if standing.loss is None:
            return 0
        return sum(row["epoch"] > standing.best_epoch for row in standing.evaluations)

    @override
    def update(self, check: Check) -> None:
        began = time.perf_counter()
        row, speed = self._fit.update(check)
        seconds = time.perf_counter() - began
        self.watchdog.updated(speed * seconds, seconds, 0.0)
        standing, per_epoch = self._fit.standing, self._fit.updates_per_epoch
        epoch = (standing.updates - 1) // per_epoch + 1
        is_spike = "action" in row
        standing.history.append(("spike" if is_spike else "train", {"epoch": epoch, **self._fit.position(), **row}))
        self._send()
        if is_spike:
            self._progress.advance()
            self._progress.note(f"spike at update {row['at_update']:,}: {row['reason']}; the update was skipped")
            return
        self._progress.advance(epoch=f"{epoch}/{self._fit.epochs}", loss=f"{row['loss']:.3f}", tok_s=f"{speed:,.0f}")
        if standing.updates % per_epoch and time.perf_counter() - self._reported[0] > _LINE_EVERY_S:
            self._report_updates(epoch, speed)

    @override
    def evaluate(self, check: Check) -> None:
        """Measures the loss, keeps the weights if they are the best so far, and reports the epoch."""
        loss = self._fit.evaluate(check)
        standing, name = self._fit.standing, self._fit.material.loss_name
        epoch: int = standing.evaluations[-1]["epoch"]
        judge = self._fit.judge
        scored = "" if judge is None else f", {judge.title} {standing.evaluations[-1]['score']:.1%}"
        if epoch == 0:
            self._send()
            self._progress.note(f"before training: {name} {loss:.3f}{scored}")
            return
        first = next(number for number, (_, row) in enumerate(standing.history) if row["epoch"] == epoch)
        best = " (best so far)" * (standing.best_epoch == epoch)
        self._progress.note(
            f"epoch {epoch}/{self._fit.epochs}: train loss {self._train_loss(first):.3f}, {name} {loss:.3f}{scored}{best}"
        )
        if self._midway is not None and self._midway.due(epoch):
            self._answer(self._midway, epoch)
        self._send()
        self._reported = time.perf_counter(), len(standing.history)

    @override
    def save(self, number: int | None) -> None:
        """Saves the state for resuming; there are no numbered checkpoints."""
        self._fit.standing.elapsed_s = self.elapsed_s
        self._fit.standing.logs = self._logs.run_ids
        save_state(self._out, self._fit.state())

    @override
    def finish_saving(self) -> None:
        """Does nothing: a save is on the disk when it ends."""

    @override
    def last_saved(self) -> str:
        saved = self._out / TRAINER
        return (
            f"the run is saved in {saved}; the same command resumes it" if saved.is_dir() else "nothing was saved yet"
        )

    @override
    def advice_on_divergence(self) -> str:
        return "try a lower --learning-rate" if self._fit.standing.evaluations else "slm eval measures the base"

    @override
    def advice_on_memory(self) -> str:
        return "lower --batch-size or --max-length"

    def _answer(self, midway: Midway, epoch: int) -> None:
        """Records and reports what the current weights answer."""
        where = {"epoch": epoch, **self._fit.position()}
        for sample in midway.answers():
            row = {**where, "prompt": sample.prompt, "wanted": sample.wanted, "text": sample.answered}
            self._fit.standing.history.append(("sample", row))
            wanted = "as wanted" if sample.answered == sample.wanted else f"wanted {_shown(sample.wanted)}"
            self._progress.note(f"sample: {_shown(sample.prompt)} -> {_shown(sample.answered)} ({wanted})")

    def _send(self) -> None:
        """Sends the new rows of history to the logs."""
        history = self._fit.standing.history
        for kind, row in history[self._sent :]:
            self._logs.add({"type": kind, **row})
        self._sent = len(history)

    def _report_updates(self, epoch: int, speed: float) -> None:
        """Reports the progress within a long epoch."""
        done = self.micro_steps
        left = duration(self.elapsed_s / done * (self._fit.updates - done))
        self._progress.note(
            f"update {done:,} of {self._fit.updates:,}, epoch {epoch}/{self._fit.epochs}: "
            f"train loss {self._train_loss(self._reported[1]):.3f}, {speed:,.0f} tokens/s, about {left} left"
        )
        self._reported = time.perf_counter(), len(self._fit.standing.history)

    def _train_loss(self, first: int) -> float:
        """Returns the mean loss of the updates in the history from a row on, in nats per learned token."""
        history = self._fit.standing.history
        before = next((row["tokens"] for _, row in reversed(history[:first])), 0)
        total, tokens = 0.0, before
        for kind, row in history[first:]:
            if kind == "train":
                total += row["loss"] * (row["tokens"] - tokens)
                tokens = row["tokens"]
        return total / max(1, tokens - before)


def _shown(text: str) -> str:
    """Returns a text in quotes, on one line, without its end if it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
