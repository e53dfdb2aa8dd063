"""A training run from recipe to checkpoint.

RUN/config.yaml data/ checkpoint/{best,last,update-N} trainer/ metrics.jsonl loss.png tensorboard/
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from typing_extensions import override

from slm.core.errors import SlmError
from slm.core.locks import held
from slm.core.machine import freed_memory_kept, memory
from slm.core.processes import peak_rss_mib
from slm.core.progress import Progress, Silent
from slm.train.attention import choose_flex
from slm.train.batching import fitted, regrouped
from slm.train.build import (
    build_average,
    build_learner,
    build_model,
    check_machine,
    make_guard,
    packing_of,
    phase_of,
    pick_device,
    positions_of,
    restore,
    tokens_seen,
    with_special_tokens,
)
from slm.train.data.dataset import open_dataset
from slm.train.evaluate import Check, Evaluation, evaluate
from slm.train.interrupt import held_back
from slm.train.keep import METRICS, Keeper
from slm.train.logs.log import About
from slm.train.logs.logs import Logs, check_packages
from slm.train.loop import Loop, Plan
from slm.train.memory import advise, training_bytes
from slm.train.metrics import Metrics, Row
from slm.train.parallel import Processes, by_first, joined, launch_id
from slm.train.precision import Precision, capability, choose_precision
from slm.train.prepare import CONFIG, DATA, check_lengths, prepare
from slm.train.pretraining import Actions, Pretraining
from slm.train.qat import Deployed, first_rounded_update
from slm.train.recipe import Recipe, load_recipe
from slm.train.review import review
from slm.train.samples import continue_prompts
from slm.train.state import REWIND, TRAINER, Counters, SavedState, load_state, rewind_position

_MIB = 1 << 20
# The values of a run that was saved by a version without these settings.
_WITHOUT = {"qat.precision": "none", "qat.start": 0.0, "optimizer.tail": 0.0, "distillation.teachers": []}


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. Losses are in nats per token, on the held-out text.

    It stands for the path of the best checkpoint: `slm.export` and others accept it.

    Attributes:
        run: The directory of the run.
        checkpoint: The best checkpoint.
        loss_before: Loss before the first update.
        loss: Loss of the best checkpoint.
        perplexity: Its exponential.
        bits_per_byte: The loss in bits per byte of text.
        parameters: Parameters of the model; a tied head counts once.
        micro_steps: Micro-steps done, fewer than planned if the run stopped early.
        updates: Updates done.
        tokens: Tokens in those updates.
        passes: Passes over the training text; below 1 if only a part of it was read.
        tokens_s: Tokens per second of training, evaluations included.
        elapsed_s: Seconds of training, including those before the run was resumed.
        peak_rss_mib: Peak resident memory of the process.
        processes: Number of processes.
    """

    run: Path
    checkpoint: Path
    loss_before: float
    loss: float
    perplexity: float
    bits_per_byte: float
    parameters: int
    micro_steps: int
    updates: int
    tokens: int
    passes: float
    tokens_s: float
    elapsed_s: float
    peak_rss_mib: float
    processes: int

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    @property
    def path(self) -> Path:
        """The best checkpoint."""
        return self.checkpoint


def train(
    recipe: Recipe,
    out: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
    *,
    overwrite: bool = False,
) -> TrainResult:
    """Trains a model from scratch.

    Args:
        recipe: The recipe; see `slm.train.recipe.load_recipe`.
        out: The run directory to create; nothing is left of it if the preparation fails.
        progress: Receives progress and notes.
        processes: The processes that torchrun started; None joins them, if any, for the run.
        overwrite: Whether another run in the directory may be replaced.

    Raises:
        SlmError: When data, tokenizer or directory are not usable, or a loss or gradient is not finite.
    """
    with nullcontext(processes) if processes else joined() as together:
        device = pick_device(recipe.machine.device)
        heard = (progress if together.rank == 0 else None) or Silent()
        recipe = fitted(recipe, device, together, heard.note)
        check_machine(recipe, device, together)  # before the work begins
        check_packages(recipe.log)
        by_first(together, lambda: prepare(recipe, out, heard, overwrite=overwrite, launch=launch_id()))
        return _go(out, together, heard)


def resume(out: Path, progress: Progress | None = None, processes: Processes | None = None) -> TrainResult:
    """Resumes a run. The result is the same as without the interruption, bit for bit, on the same CPU.

    The number of processes may change; rounding and dropout depend on it.

    Raises:
        SlmError: When the directory holds no run, or its files are damaged.
    """
    if not (out / CONFIG).is_file():
        raise SlmError(f"no run to go on with: {out} has no {CONFIG}", "slm train --data FILE starts one")
    with nullcontext(processes) if processes else joined() as together:
        recipe = load_recipe(out / CONFIG)
        if recipe.batch.automatic:
            raise SlmError(
                f"{out / CONFIG}: batch.batch_size=auto is for new runs",
                "write a number, such that batch.batch_size x batch.accumulation stays the same",
            )
        check_machine(recipe, pick_device(recipe.machine.device), together, resumed=True)
        check_packages(recipe.log)
        return _go(out, together, (progress if together.rank == 0 else None) or Silent())


def _go(run: Path, processes: Processes, progress: Progress) -> TrainResult:
    """Trains in a prepared directory, which the first process locks meanwhile."""
    with ExitStack() as stack:
        by_first(processes, lambda: stack.enter_context(held(run)))
        return _Run(run, processes, progress).go()


class _Run(Actions):
    """A prepared run directory, opened to train in it; see `slm.train.pretraining.Actions`."""

    def __init__(self, path: Path, processes: Processes, progress: Progress) -> None:
        self.path, self.processes, self.progress = path, processes, progress
        self.dataset = open_dataset(path / DATA)
        written = load_recipe(path / CONFIG)
        written = written.for_tokens(positions_of(written, self.dataset.train))
        self.recipe = recipe = regrouped(written, processes.size)
        check_lengths(recipe, len(self.dataset.train.ids), len(self.dataset.validation.ids))
        self.device = pick_device(recipe.machine.device)
        self.memory = memory_of(self.device)
        self.config = with_special_tokens(recipe.model.config(), self.dataset.tokenizer)
        self.able = capability(self.device)
        saved = load_state(path) if processes.rank == 0 else None  # this also repairs what a killed run left
        processes.from_first(None)
        saved = saved if processes.rank == 0 else load_state(path)
        self.precision = self._choose_precision(saved)
        self.counters = _gone_on(saved, recipe, path).model_copy(update={"precision": self.precision.name})
        flex = choose_flex(recipe, self.config, self.able, self.precision, self.device, progress.note)
        self.model = build_model(recipe, self.config, self.device, saved, processes, flex=flex)
        self.guard = make_guard(recipe, self.counters)
        self.learner = build_learner(
            recipe, self.model, self.dataset.train, self.device, self.precision, saved, processes, self.guard
        )
        average = build_average(recipe, self.model, self._updates_done)
        if average is not None and saved is not None:
            average.load_tensors(saved.average)
        self.deployed = Deployed(self.model, average, recipe.qat.grid is not None)
        about = {"device": self.device.type, "precision": self.precision.name, "processes": processes.size}
        self.keeper = Keeper(path, recipe, self.dataset, self.model, self.deployed, processes, about)
        # Every process has every row, so that all decide the same; the first one writes them.
        first = processes.rank == 0
        if first:
            shown = About(path, recipe.model_dump(mode="json"), _board_step)
            logs = Logs(recipe.log, shown, self.counters.logs, progress)
            self.metrics = self._metrics(logs)
        processes.from_first(None)
        if not first:
            self.metrics = self._metrics(None)

    def _metrics(self, logs: Logs | None) -> Metrics:
        """Returns the metrics; without logs, of a process that writes none."""
        return Metrics(
            self.path,
            self._updates_done,
            best=self.keeper.best_measured(),
            write=logs is not None,
            logs=logs,
            rewinds=self.counters.spikes.rewinds,
        )

    def _choose_precision(self, saved: SavedState | None) -> Precision:
        """Returns the precision: the first process measures, and a resumed run keeps its own."""
        before = None if saved is None else saved.counters.precision
        if self.recipe.machine.precision == "auto" and self.processes.rank == 0:
            before = choose_precision("auto", self.able, self.config, before).name
        chosen = self.processes.from_first(before)
        return choose_precision(self.recipe.machine.precision, self.able, self.config, chosen)

    @property
    def _updates_done(self) -> int:
        return self.counters.micro_steps // self._accumulation

    def go(self) -> TrainResult:
        """Trains to the end."""
        recipe = self.recipe
        self._describe()
        plan = Plan(
            name="training",
            unit="micro-step",
            updates=recipe.updates,
            accumulation=recipe.batch.accumulation,
            evaluate_every=recipe.evaluation.every_micro_steps,
            patience=recipe.evaluation.patience,
            checkpoint_every=recipe.checkpoints.every_updates,
        )
        tokens = partial(tokens_seen, recipe, self.dataset.train)
        task = Pretraining(
            plan,
            self,
            self.learner,
            self.counters,
            self.metrics,
            self.progress,
            tokens,
            guard=self.guard,
            rewind_every=recipe.spikes.every_updates,
            watch=recipe.watchdog,
            processes=self.processes.size,
            phase=phase_of(recipe),
        )
        with held_back() as interruption, self.metrics.logs, freed_memory_kept():
            loop = Loop(plan, task, interruption, self.processes, self.progress, task.watchdog)
            with self._written():
                loop.run()
                loop.save()
                loop.finish_saving()
        return self._result(task)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Waits for a save in the background before the run ends with an error: another process may then resume it."""
        try:
            yield
        except BaseException:
            try:
                self.keeper.finish()
            except Exception as error:  # must not replace the reason for which the run ends
                self.progress.note(f"warning: {error.message if isinstance(error, SlmError) else error!r}")
            raise

    @property
    def _accumulation(self) -> int:
        return self.recipe.batch.accumulation

    @override
    def updated(self) -> None:
        if self.deployed.average is not None:
            self.deployed.average.update()

    @override
    def evaluate(self, check: Check) -> Evaluation:
        batch, evaluation = self.recipe.batch, self.recipe.evaluation
        with self.deployed.in_place():
            return evaluate(
                self.learner.objective,
                self.dataset.validation,
                windows=evaluation.windows,
                context=evaluation.context or batch.context,
                batch_size=max(1, batch.batch_size // self.processes.size),
                check=check,
                processes=self.processes,
            )

    @override
    def samples(self) -> list[tuple[str, str]]:
        evaluation = self.recipe.evaluation
        with self.deployed.in_place(), self.processes.gathered(self.learner.objective):
            texts = continue_prompts(
                self.model,
                self.dataset.tokenizer,
                evaluation.prompts,
                evaluation.sample_tokens,
                self.recipe.seed,
                self.processes,
            )
        return list(zip(evaluation.prompts, texts, strict=True))

    @override
    def keep_best(self, row: Row) -> None:
        with self.deployed.in_place():
            self.keeper.save_checkpoint(self.keeper.best, row["micro_steps"], row)

    @override
    def save(self, counters: Counters, number: int | None = None, *, rewind_point: bool = False) -> None:
        # After a rewind, later evaluations are still listed.
        measured = [row for row in self.metrics.evaluations if row["micro_steps"] <= counters.micro_steps]
        last = measured[-1] if measured else None
        self.keeper.save(counters, self.learner.optimizers, last, number, rewind_point=rewind_point)

    @override
    def finish_saving(self) -> None:
        by_first(self.processes, self.keeper.finish)

    @override
    def await_save(self, seconds: float) -> None:
        self.keeper.await_save(seconds)

    @override
    def rewind_position(self) -> int | None:
        def position() -> int | None:
            found = rewind_position(self.path)
            return None if found is None else _in_micro_steps(found, self.recipe)

        return by_first(self.processes, position)

    @override
    def rewind(self) -> Counters:
        self.finish_saving()
        saved = load_state(self.path, REWIND)
        if saved is None:
            raise SlmError(
                f"the state to rewind to is gone: {self.path / REWIND}", "start a new run with another --out"
            )
        counters = _gone_on(saved, self.recipe, self.path)
        restore(self.model, self.learner, saved)
        if self.deployed.average is not None:
            self.deployed.average.load_tensors(saved.average, counters.micro_steps // self._accumulation)
        return counters

    @override
    def last_saved(self) -> str:
        last = self.keeper.last
        return f"the last checkpoint is {last}" if last.exists() else "no checkpoint was saved yet"

    @override
    def best_saved(self) -> str:
        best = self.keeper.best
        return f"the last good checkpoint is {best}" if best.exists() else self.last_saved()

    @override
    def less_memory(self) -> str:
        return advise(self.recipe, self.config, self.precision, self.processes.size, self.memory, self.able)

    def _describe(self) -> None:
        """Reports the model, the device and the length of the run, with warnings about the recipe."""
        recipe, note = self.recipe, self.progress.note
        needed = training_bytes(recipe, self.config, self.precision, self.processes.size, self.able)
        note(
            f"model: {self.config.parameter_count():,} parameters; context {recipe.batch.context}, vocabulary "
            f"{self.config.vocab_size:,}; training needs about {needed.total / _MIB:,.0f} MiB besides Python and PyTorch "
            "(an estimate)"
        )
        together = f", {self.processes.size} processes ({recipe.machine.parallel})" if self.processes.size > 1 else ""
        note(f"device: {_device_name(self.device)}, {self.precision.name}{together}")
        per_update = self._accumulation * recipe.tokens_per_micro_step
        train, whole_rows = self.dataset.train, packing_of(recipe, self.dataset.train)
        tokens, stream = tokens_seen(recipe, train, recipe.updates * self._accumulation), len(train.ids)
        if whole_rows is not None:
            note(f"rows: {whole_rows.about}")
        note(
            f"run: {recipe.updates:,} updates of {'' if whole_rows is None else 'up to '}{per_update:,} tokens, "
            f"{tokens:,} in all: {tokens / stream:.1f} times the training text's {stream:,}"
        )
        if recipe.qat.grid is not None:
            grid, first = recipe.qat.grid, first_rounded_update(recipe)
            begins = f", from update {first + 1:,} on" if first else ""
            note(
                f"quantization-aware training for {grid.precision.upper()}{begins}: layers in {grid.description}; evaluations "
                "and checkpoints have rounded weights"
            )
        uneven = recipe.batch.batch_size % self.processes.size
        if uneven:
            note(
                f"warning: {self.processes.size} processes share micro-steps of {recipe.batch.batch_size} windows unevenly, "
                "and wait for those with more"
            )
        text_bytes = self.dataset.train.header.text_bytes
        for sentence in review(recipe, tokens / stream, self.processes.size, text_bytes):
            note(f"warning: {sentence}")
        if self.counters.micro_steps:
            note(f"going on after {self.counters.micro_steps:,} micro-steps")

    def _result(self, task: Pretraining) -> TrainResult:
        best = self.metrics.best
        assert best is not None  # a run has at least one update, and an evaluation after the last one
        micro_steps = task.micro_steps
        tokens, elapsed_s = tokens_seen(self.recipe, self.dataset.train, micro_steps), task.elapsed_s
        return TrainResult(
            run=self.path,
            checkpoint=self.keeper.best,
            loss_before=self.metrics.evaluations[0]["loss"],
            **{name: best[name] for name in METRICS},
            parameters=self.config.parameter_count(),
            micro_steps=micro_steps,
            updates=micro_steps // self._accumulation,
            tokens=tokens,
            passes=tokens / len(self.dataset.train.ids),
            tokens_s=tokens / elapsed_s,
            elapsed_s=elapsed_s,
            peak_rss_mib=peak_rss_mib(),
            processes=self.processes.size,
        )


def _gone_on(saved: SavedState | None, recipe: Recipe, run: Path) -> Counters:
    """Returns the position of a run. The number of micro-steps per update may have changed since it was saved.

    Raises:
        SlmError: When the saved state is missing, or does not fit the current recipe.
    """
    if saved is None:
        if (run / "checkpoint" / "last").exists():
            raise SlmError(f"the state to go on from is gone: {run / TRAINER}", "start a new run with another --out")
        return Counters(micro_steps=0, course=recipe.course | {"batch.accumulation": recipe.batch.accumulation})
    counters = saved.counters
    for name, value in recipe.course.items():
        before = counters.course.get(name, _WITHOUT.get(name))
        if before != value:
            raise SlmError(
                f"the run was saved with {name} = {before}, and config.yaml says {value}",
                "put it back, or start a new run with another --out",
            )
    course = counters.course | {"batch.accumulation": recipe.batch.accumulation}
    return counters.model_copy(update={"micro_steps": _in_micro_steps(counters, recipe), "course": course})


def _in_micro_steps(counters: Counters, recipe: Recipe) -> int:
    """Returns a saved position in the micro-steps of the recipe."""
    return counters.micro_steps // int(counters.course["batch.accumulation"]) * recipe.batch.accumulation


def _board_step(row: Row) -> int:
    """Returns TensorBoard's step, in thousands of tokens: some readers store steps in 32 bits."""
    tokens: int = row["tokens"]
    return tokens // 1000


def memory_of(device: torch.device) -> int | None:
    """Returns the bytes of a device that training may use; None if unknown."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory().usable


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"
