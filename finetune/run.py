"""Fine-tuning: trains a LoRA adapter, or all weights, of a checkpoint on a file of rows, and keeps the best epoch."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from slm.core.chat import ending_turns
from slm.core.checkpoint import CHECKPOINT_FILES, INFO_FILE, is_checkpoint
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_replaceable, recover, write_text
from slm.core.licence import NOTICE_FILE, modified, recorded_notices, write_notice
from slm.core.locks import sole
from slm.core.machine import freed_memory_kept
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.nn.fake_quant import round_weights, rounded_in_place
from slm.core.progress import Progress, Silent
from slm.core.qat import RECORD, without_grid
from slm.core.tokenizer import Tokenizer
from slm.core.tuned_rows import tuned_on
from slm.finetune.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, TunableLM, is_adapter, save_adapter
from slm.finetune.build import build
from slm.finetune.examples import Renderer
from slm.finetune.fit import Fit
from slm.finetune.loop import FineTuning, plan_of
from slm.finetune.midway import Midway
from slm.finetune.preparation import Prepared, RowFiles
from slm.finetune.recipe import CONFIG, SAMPLES, FinetuneRecipe, resolved
from slm.finetune.samples import Sample, sample_answers
from slm.finetune.settings import FinetuneSettings
from slm.finetune.start import start_of
from slm.finetune.state import TRAINER_FILES, Standing, State, drop_state, resumable
from slm.finetune.teaching import notices
from slm.finetune.writing import ANSWERS_FILE
from slm.train.choices import LogName
from slm.train.interrupt import held_back
from slm.train.logs.board import TENSORBOARD, board_files, drop_board
from slm.train.logs.log import About
from slm.train.logs.logs import Logs, check_packages
from slm.train.loop import Loop
from slm.train.metrics import CURVE_FILE, METRICS_FILE, Metrics, Row
from slm.train.parallel import Alone
from slm.train.precision import Precision
from slm.train.state import TRAINER
from slm.version import __version__

# The files of an adapter's directory, and of a run of full fine-tuning.
_ADAPTER_FILES = frozenset(
    (
        ADAPTER_CONFIG_FILE,
        ADAPTER_WEIGHTS_FILE,
        INFO_FILE,
        NOTICE_FILE,
        METRICS_FILE,
        CURVE_FILE,
        CONFIG,
        ANSWERS_FILE,
        *TRAINER_FILES,
    )
)
CHECKPOINT = Path("checkpoint", "best")
_METRICS = Path("finetune")
_RUN_FILES = frozenset(
    (
        *((CHECKPOINT / name).as_posix() for name in CHECKPOINT_FILES),
        *((_METRICS / name).as_posix() for name in (METRICS_FILE, CURVE_FILE, CONFIG)),
        ANSWERS_FILE,
        *TRAINER_FILES,
    )
)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning run. Losses are in nats per token that counts in the loss; of preferences, in nats per pair.

    It stands for the path of the adapter or the checkpoint: `slm.export` and others accept it.

    Attributes:
        made: The directory of the adapter, or of the checkpoint if every weight was trained.
        base: The base checkpoint.
        rows: Number of training rows.
        validation_rows: Number of held-out rows; 0 if there were too few rows to hold any out, and the losses are then those
            of the training rows.
        trained_tokens: Tokens per epoch that count in the loss: answers and their ends.
        truncated: Number of rows, training and held-out, that lost their end.
        skipped: Number of rows left out because their prompt was too long.
        bad: Number of rows left out because they could not be read.
        loss_before: Loss of the base.
        loss_after: Loss of the result.
        kept_epoch: The epoch that was kept, from 1.
        best_epoch: The epoch with the highest score, or the lowest loss without a metric.
        epochs: Number of epochs planned.
        updates: Number of optimizer steps.
        trainable_parameters: Number of trained parameters.
        keep: Which epoch was to be kept: "best" or "last".
        teacher: The teacher, if there was one; the losses are then divergences from its predictions.
        metric: The metric of the replies, if epochs were chosen by one.
        metric_rows: The number of rows that were answered for it.
        score_before: The base's score, from 0 to 1.
        score_after: The score of the result.
        score_low: The lower end of its 95 % confidence interval.
        score_high: The upper end.
        preferred_before: For preferences, the share of the measured pairs whose chosen answer the base finds likelier.
        preferred_after: The same share of the result.
        seconds: Seconds of training, including those before the run was resumed.
        samples: Answers to some of the held-out rows.
    """

    made: Path
    base: Path
    rows: int
    validation_rows: int
    trained_tokens: int
    truncated: int
    skipped: int
    bad: int
    loss_before: float
    loss_after: float
    kept_epoch: int
    best_epoch: int
    epochs: int
    updates: int
    trainable_parameters: int
    seconds: float
    samples: tuple[Sample, ...] = ()
    keep: str = "best"
    preferred_before: float | None = None
    preferred_after: float | None = None
    teacher: Path | None = None
    metric: str | None = None
    metric_rows: int = 0
    score_before: float | None = None
    score_after: float | None = None
    score_low: float | None = None
    score_high: float | None = None

    def __fspath__(self) -> str:
        return str(self.made)

    @property
    def path(self) -> Path:
        """The adapter, or the checkpoint if every weight was trained."""
        return self.made


# Fields of the result that are elsewhere in `slm.json`.
_NO_METRICS = ("made", "base", "samples", "keep", "teacher")


@dataclass(frozen=True)
class _Task:
    """The arguments of `finetune`, which documents them."""

    base: Path
    files: RowFiles
    out: Path
    settings: FinetuneSettings
    overwrite: bool
    samples: int
    log: tuple[LogName, ...]
    teacher: Path | None


def finetune(
    base: Path,
    data: Path | RowFiles,
    out: Path,
    settings: FinetuneSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    samples: int = SAMPLES,
    log: Sequence[LogName] = (),
    teacher: Path | None = None,
) -> FinetuneResult:
    """Trains an adapter, or all weights, and writes the result whole or not at all.

    The same base, data, settings and machine give the same bytes. An interrupted run leaves `out/trainer`; the same call
    resumes it, with the same result as without the interruption.

    Args:
        base: A checkpoint.
        data: A file or directory of training rows, or `RowFiles`, which also name held-out rows and limits.
        out: The directory to create: of the adapter, or of a run with `checkpoint/best` for full fine-tuning.
        settings: Hyperparameters; the defaults when None.
        progress: Receives progress and notes.
        overwrite: Whether an existing result may be replaced.
        samples: Number of held-out rows that the result answers at the end; 0 also disables the answers during training.
        log: Where metrics go besides `metrics.jsonl`.
        teacher: A checkpoint with the same tokenizer, whose predictions are learned; it also answers rows that end with a
            request. None trains on the answers of the rows.

    Raises:
        SlmError: When an input is missing or wrong, the result exists, or there is nothing to learn.
        KeyboardInterrupt: After saving, when Ctrl-C asked to stop.
    """
    settings, progress = settings or FinetuneSettings(), progress or Silent()
    files = data if isinstance(data, RowFiles) else RowFiles(data)
    check_packages(log)
    task = _Task(base, files, out, settings, overwrite, samples, tuple(log), teacher)
    with sole(out.resolve()):
        return _finetune(task, progress)


def _finetune(task: _Task, progress: Progress) -> FinetuneResult:
    base, out = task.base, task.out
    recover(out / TRAINER)  # removes files that a killed process left half written
    check_free(out, task.settings.method, task.overwrite)
    start = start_of(base, task.files, task.settings, task.teacher, (out, task.overwrite), progress, answer=True)
    found, renderer, precision = start.found, start.renderer, start.precision
    state = _saved(out, start.course, task.overwrite)
    settings, grid = found.settings, found.settings.grid
    recipe = resolved(base, task.files, settings, task.samples, task.log, task.teacher)
    logged = {} if state is None else state.standing.logs
    logs = Logs(task.log, About(out, recipe.model_dump(mode="json"), _board_step), logged, progress)
    with torch.random.fork_rng():
        built = build(base, start.info, found, renderer, start.device, precision, progress)
        model, adapter = built.model, built.adapter
        teacher = None if start.teaching is None else start.teaching.load()
        fit = built.fit(found, Standing(course=dict(start.course)), teacher=teacher, judge=start.judge)
        if state is not None:
            fit.restore(state)
            progress.note(f"going on after update {state.standing.updates:,}, as saved in {out}")
        midway = Midway(built.tuned, renderer, found, task.samples, precision.autocast)
        with _board_dropped(out), held_back() as interruption:
            with logs, freed_memory_kept():
                logs.begin([{"type": kind, **row} for kind, row in fit.standing.history])
                training = FineTuning(fit, out, progress, midway, logs)
                Loop(plan_of(fit, settings), training, interruption, Alone(), progress, training.watchdog).run()
            standing, seconds = fit.standing, training.elapsed_s
            assert standing.loss_before is not None
            _warn(fit, progress)
            fit.put_kept()
            with rounded_in_place(model):
                answers = _answers(built.tuned, renderer, found, task.samples, precision)
            made = out if adapter is not None else out / CHECKPOINT
            result = _result(made, task, found, fit, round(seconds, 2), answers)
            info = {
                "made_by": "slm finetune",
                "slm_version": __version__,
                **start.course,
                "precision": precision.name,
                "turns": found.chats,
                "declares_tools": found.declares_tools,
                "notices": modified(notices(base, task.teacher), "fine-tuned with LoRA" if adapter else "fine-tuned"),
                "held_out_rows": list(found.split.numbers),
                "metrics": {name: value for name, value in asdict(result).items() if name not in _NO_METRICS},
                "samples": [asdict(answer) for answer in answers],
            }
            of_grid = {} if grid is None else {RECORD: grid.model_dump(mode="json")}
            if adapter is not None:
                _write_adapter(out, adapter, fit, info | of_grid, recipe)
            else:
                if grid is not None:
                    round_weights(model, grid)
                base_info = without_grid(start.info) | of_grid
                _write_checkpoint(out, model, start.tokenizer, fit, info, base_info, recipe)
            if interruption.pending is not None:
                interruption.deliver()
    return result


def _result(
    made: Path, task: _Task, found: Prepared, fit: Fit, seconds: float, samples: tuple[Sample, ...]
) -> FinetuneResult:
    standing = fit.standing
    assert standing.loss_before is not None
    preferred, scores = fit.preferred or (None, None), fit.scores
    return FinetuneResult(
        made=made,
        base=task.base,
        teacher=task.teacher,
        rows=len(found.train.kept),
        validation_rows=len(found.valid.kept),
        trained_tokens=found.train.trained,
        truncated=found.train.truncated + found.valid.truncated,
        skipped=found.train.skipped + found.valid.skipped,
        bad=found.bad,
        loss_before=standing.loss_before,
        loss_after=fit.kept_loss,
        kept_epoch=fit.kept_epoch,
        best_epoch=standing.best_epoch,
        epochs=fit.epochs,
        updates=standing.updates,
        trainable_parameters=sum(tensor.numel() for tensor in fit.kept.values()),
        seconds=seconds,
        samples=samples,
        keep=found.settings.keep,
        preferred_before=preferred[0],
        preferred_after=preferred[1],
        metric=found.settings.metric,
        metric_rows=0 if fit.judge is None else fit.judge.rows,
        **({} if scores is None else _score_figures(*scores)),
    )


def _score_figures(before: Row, after: Row) -> dict[str, Any]:
    return {
        "score_before": before["score"],
        "score_after": after["score"],
        "score_low": after["score_low"],
        "score_high": after["score_high"],
    }


def _warn(fit: Fit, progress: Progress) -> None:
    """Warns about a result that is no better than the base."""
    before = fit.standing.loss_before
    assert before is not None
    scores = fit.scores
    if scores is not None:
        if scores[1]["score"] < 1 and scores[1]["score"] <= scores[0]["score"]:
            progress.note("warning: the score did not rise; try more epochs, another learning rate or more rows")
    elif fit.kept_loss >= before:
        progress.note("warning: the loss did not fall; try a lower learning rate or more rows")


def _answers(
    model: TunableLM | CausalLM, renderer: Renderer, found: Prepared, count: int, precision: Precision
) -> tuple[Sample, ...]:
    """Returns answers to some of the held-out rows, or of the training rows if none are held out."""
    held_out, autocast = bool(found.valid.kept), precision.autocast
    rows = found.split.held_out if held_out else found.split.train
    return tuple(sample_answers(model, renderer, rows, count, found.settings, held_out=held_out, autocast=autocast))


def _saved(out: Path, course: Mapping[str, Any], overwrite: bool) -> State | None:
    """Returns the saved state of a run with the same course. With `overwrite`, drops any other state."""
    try:
        return resumable(out, course)
    except SlmError:
        if not overwrite:
            raise
        drop_state(out)
        return None


def _write_course(directory: Path, fit: Fit, recipe: FinetuneRecipe) -> None:
    """Writes the recipe, the metrics and the curves."""
    write_text(directory / CONFIG, recipe.to_yaml())
    metrics = Metrics(directory, updates=0)
    for kind, row in fit.standing.history:
        metrics.add(kind, row)
    metrics.draw()


def _write_adapter(out: Path, adapter: PeftModel, fit: Fit, info: dict[str, Any], recipe: FinetuneRecipe) -> None:
    with atomic_directory(out, _ADAPTER_FILES | board_files(out)) as directory:
        save_adapter(directory, adapter, fit.kept)
        _write_course(directory, fit, recipe)
        _take_board(out, directory, recipe)
        write_notice(directory, recorded_notices(info))
        (directory / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8", newline="")


def _write_checkpoint(
    out: Path,
    model: CausalLM,
    tokenizer: Tokenizer,
    fit: Fit,
    info: dict[str, Any],
    base_info: dict[str, Any],
    recipe: FinetuneRecipe,
) -> None:
    with atomic_directory(out, _RUN_FILES | board_files(out)) as directory:
        (directory / _METRICS).mkdir()
        _write_course(directory / _METRICS, fit, recipe)
        _take_board(out, directory, recipe)
        notices = info.pop("notices")
        if info["turns"]:
            model.config = ending_turns(model.config, tokenizer)
        save_checkpoint(
            directory / CHECKPOINT,
            model,
            tokenizer,
            base_info | {"finetuned": info, "notices": notices} | tuned_on(info),
        )


def _take_board(out: Path, directory: Path, recipe: FinetuneRecipe) -> None:
    """Copies TensorBoard's files, which were written during the run, to the directory that replaces the run's."""
    if "tensorboard" in recipe.log and (out / TENSORBOARD).is_dir():
        shutil.copytree(out / TENSORBOARD, directory / TENSORBOARD)


@contextmanager
def _board_dropped(out: Path) -> Iterator[None]:
    """Removes TensorBoard's files of a run that ends with an error and cannot be resumed."""
    try:
        yield
    except BaseException:
        if not (out / TRAINER).is_dir():
            drop_board(out)
        raise


def _board_step(row: Row) -> int:
    """Returns TensorBoard's step of a row."""
    updates: int = row["updates"]
    return updates


def check_free(out: Path, method: str, overwrite: bool) -> None:
    """Checks that an adapter, or a run with a checkpoint, may be written to a directory.

    Raises:
        SlmError: When the directory holds something else, or a result that may not be replaced.
    """
    ours = _ADAPTER_FILES if method == "lora" else _RUN_FILES
    check_replaceable(out.resolve(), ours | board_files(out))
    there = is_adapter(out) if method == "lora" else is_checkpoint(out / CHECKPOINT)
    if there and not overwrite:
        what = "an adapter" if method == "lora" else "a fine-tuned checkpoint"
        raise SlmError(f"there is already {what}: {out}", "--overwrite replaces it, --name names another")
