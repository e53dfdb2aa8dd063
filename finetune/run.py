"""`finetune`: from a checkpoint and a file of rows to a LoRA adapter, or to another checkpoint, kept at its best epoch."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from slm.core.adapter_base import base_record
from slm.core.chat import knows_turns
from slm.core.checkpoint import CHECKPOINT_FILES, INFO_FILE, is_checkpoint, notices_of, read_config, read_info
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_replaceable, recover, sha256_file, sole
from slm.core.licence import NOTICE_FILE, modified, recorded_notices, write_notice
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    TunableLM,
    adapter_state,
    attach,
    is_adapter,
    save_adapter,
)
from slm.finetune.batches import Packed, alone, pack
from slm.finetune.examples import Examples, Renderer
from slm.finetune.frozen import lighten
from slm.finetune.loop import Fit
from slm.finetune.rows import ChatRow, Row, read_rows
from slm.finetune.settings import FinetuneSettings
from slm.finetune.state import TRAINER, TRAINER_FILES, Standing, State, drop_state, load_state, save_state
from slm.train.build import pick_device
from slm.train.interrupt import held_back
from slm.train.metrics import CURVE_FILE, METRICS_FILE, Metrics
from slm.train.precision import Precision, capability, choose_precision
from slm.version import __version__

# All that an adapter's directory holds, and all that a run holds whose every weight was trained.
_ADAPTER_FILES = frozenset(
    (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, INFO_FILE, NOTICE_FILE, METRICS_FILE, CURVE_FILE, *TRAINER_FILES)
)
CHECKPOINT = Path("checkpoint", "best")
_METRICS = Path("finetune")
_RUN_FILES = frozenset(
    (
        *((CHECKPOINT / name).as_posix() for name in CHECKPOINT_FILES),
        *((_METRICS / name).as_posix() for name in (METRICS_FILE, CURVE_FILE)),
        *TRAINER_FILES,
    )
)

# One row in this many, the last ones, is held out when no validation file is given.
_HELD_OUT = 10
# Rows that are shown before they are learned.
_SHOWN = 2


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run made.

    Attributes:
        made: The adapter's directory, or the checkpoint's where every weight was trained.
        base: The checkpoint that it was made from.
        rows: Rows that were trained on.
        validation_rows: Rows that the losses are measured on; 0 when there were too few to hold any out, and the losses
            are then those of the training rows.
        trained_tokens: Tokens learned in one epoch: answers and the ends of them.
        truncated: Rows, of both kinds, that lost their end and with it their end-of-text.
        skipped: Rows left out because their prompt alone was too long.
        bad: Rows left out because they could not be read.
        loss_before: Nats a learned token, of the base.
        loss_after: The same of what was made.
        best_epoch: The pass over the rows that was kept, from 1.
        epochs: Passes in all.
        updates: Steps of the optimizer.
        trainable_parameters: Those that were trained.
        seconds: Wall time of training, that of the runs that it goes on from included.
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
    best_epoch: int
    epochs: int
    updates: int
    trainable_parameters: int
    seconds: float


@dataclass(frozen=True)
class _Data:
    """What is learned and what is measured."""

    train: Examples
    valid: Examples
    rows: tuple[Packed, ...]
    settings: FinetuneSettings
    chats: bool
    bad: int


def finetune(
    base: Path,
    data: Path,
    out: Path,
    settings: FinetuneSettings | None = None,
    progress: Progress | None = None,
    *,
    validation: Path | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> FinetuneResult:
    """Trains an adapter, or all weights, and writes the result whole or not at all.

    The same base, data, settings and machine give the same bytes. A run that was interrupted leaves `out/trainer`; the
    same call goes on from there, and what it makes is what the run would have made.

    Args:
        base: A checkpoint.
        data: Rows to train on; see `slm.finetune.rows`.
        out: The adapter's directory, to be made; of full fine-tuning a run's, whose `checkpoint/best` will be made.
        settings: Hyperparameters; the defaults when None.
        progress: Who is told how it goes.
        validation: Rows to measure the loss on; the last tenth of `data` when None.
        overwrite: Whether what is already there may be replaced.
        skip_bad: Whether rows that are not as they should be are left out and counted, not refused.

    Raises:
        SlmError: When an input is missing or wrong, the result exists, or there is nothing to learn.
        KeyboardInterrupt: After saving where the run stands, when Ctrl-C asked for it.
    """
    settings, progress = settings or FinetuneSettings(), progress or Silent()
    with sole(out.resolve()):
        return _finetune(base, data, out, settings, progress, validation, overwrite, skip_bad)


def _finetune(
    base: Path,
    data: Path,
    out: Path,
    settings: FinetuneSettings,
    progress: Progress,
    validation: Path | None,
    overwrite: bool,
    skip_bad: bool,
) -> FinetuneResult:
    check_free(out, settings.method, overwrite)
    config, tokenizer, base_info = read_config(base), Tokenizer.load(base), read_info(base)
    found = _prepare(data, validation, settings, config, Renderer(tokenizer, config), skip_bad, progress)
    settings = found.settings
    device = pick_device("auto")
    precision = choose_precision("auto", capability(device), config.hidden_size)
    course = {
        "settings": settings.model_dump(mode="json"),
        "base": base_record(base, tokenizer),
        "data": _provenance(data),
        "validation": None if validation is None else _provenance(validation),
        "skip_bad": skip_bad,
        "precision": f"{precision.name} on {device.type}",
    }
    state = _saved(out, course, overwrite)
    model = load_checkpoint(base).to(device)
    # A base trained on plain text has never seen a turn token: its rows of the embedding are still random.
    turns = [] if not found.chats or knows_turns(base_info, tokenizer) else Renderer(tokenizer, config).turn_token_ids()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapter = attach(model, settings, base, turns) if settings.method == "lora" else None
        fit = _fit(model, adapter, found, precision, Standing(course=course))
        if state is not None:
            fit.restore(state)
            progress.note(f"going on after update {state.standing.updates:,}, as saved in {out}")
        with held_back() as interruption:
            fit.run(progress, interruption, lambda now: save_state(out, now))
            standing = fit.standing
            assert standing.loss is not None and settings.epochs is not None
            if standing.loss >= standing.loss_before:
                progress.note("warning: the loss did not fall; try a lower learning rate or more rows")
            result = FinetuneResult(
                made=out if adapter is not None else out / CHECKPOINT,
                base=base,
                rows=len(found.train.kept),
                validation_rows=len(found.valid.kept),
                trained_tokens=found.train.trained,
                truncated=found.train.truncated + found.valid.truncated,
                skipped=found.train.skipped + found.valid.skipped,
                bad=found.bad,
                loss_before=standing.loss_before,
                loss_after=standing.loss,
                best_epoch=standing.best_epoch,
                epochs=settings.epochs,
                updates=standing.updates,
                trainable_parameters=sum(tensor.numel() for tensor in fit.best.values()),
                seconds=round(standing.seconds, 2),
            )
            info = {
                "made_by": "slm finetune",
                "slm_version": __version__,
                **course,
                "precision": precision.name,
                "turns": found.chats,
                "notices": modified(notices_of(base), "fine-tuned with LoRA" if adapter else "fine-tuned"),
                "metrics": {name: value for name, value in asdict(result).items() if name not in ("made", "base")},
            }
            if adapter is not None:
                _write_adapter(out, adapter, fit, info)
            else:
                _write_checkpoint(out, model, tokenizer, fit, info, base_info)
            if interruption.pending is not None:
                interruption.deliver()
    return result


def _fit(model: CausalLM, adapter: PeftModel | None, found: _Data, precision: Precision, standing: Standing) -> Fit:
    measured = found.valid.kept or found.train.kept
    if adapter is None:
        parameters = dict(model.named_parameters())
        return Fit(model, parameters, found.rows, measured, found.settings, precision, standing)
    tunable: TunableLM = adapter.get_base_model()
    lighten(tunable, precision.autocast)
    return Fit(tunable, _parameters(adapter), found.rows, measured, found.settings, precision, standing)


def _prepare(
    data: Path,
    validation: Path | None,
    settings: FinetuneSettings,
    config: ModelConfig,
    renderer: Renderer,
    skip_bad: bool,
    progress: Progress,
) -> _Data:
    """Reads rows and makes examples of them, and says what will be learned, before time is spent on it."""
    bad: list[SlmError] | None = [] if skip_bad else None
    rows = read_rows(data, bad)
    rows, held_out = _split(rows, None if validation is None else read_rows(validation, bad))
    max_length = settings.context(config)
    if max_length > config.max_position_embeddings:
        raise SlmError(f"max_length {max_length} is longer than the base's context of {config.max_position_embeddings}")
    train, valid = (renderer.examples(part, max_length, bad) for part in (rows, held_out))
    if bad:
        progress.note(
            f"warning: rows left out because they are not as they should be: {len(bad)}; the first: {bad[0].message}"
        )
    _check(train, valid, renderer, max_length)
    packed = pack(train.kept, max_length, random.Random(settings.seed)) if settings.pack else alone(train.kept)
    _tell(train, valid, renderer, max_length, progress)
    if settings.pack:
        progress.note(f"packed into {len(packed)} rows of at most {max_length} tokens")
    chats = any(isinstance(row, ChatRow) for row in rows)
    return _Data(train, valid, tuple(packed), settings.resolved(config, len(packed)), chats, len(bad or ()))


def _parameters(adapter: PeftModel) -> dict[str, Any]:
    """Returns what an adapter trains under the names of its file."""
    # peft's state holds the parameters detached; which is which is told by where they lie.
    places = {p.data_ptr(): p for p in adapter.parameters() if p.requires_grad}
    return {name: places[tensor.data_ptr()] for name, tensor in adapter_state(adapter).items()}


def _saved(out: Path, course: dict[str, Any], overwrite: bool) -> State | None:
    """Returns the state that a run of the same course left; one of another course is dropped when told."""
    try:
        state = load_state(out)
    except SlmError:
        if not overwrite:
            raise
        drop_state(out)
        return None
    if state is None or state.standing.course == course:
        return state
    if overwrite:
        drop_state(out)
        return None
    was = state.standing.course
    changed = [name for name in course if name != "settings" and was.get(name) != course[name]]
    settings = was.get("settings", {})
    changed += [name for name, value in course["settings"].items() if settings.get(name) != value]
    raise SlmError(
        f"{out} holds an interrupted run that differs in {', '.join(changed)}",
        "give the same values to go on with it; --overwrite begins anew",
    )


def _write_metrics(directory: Path, fit: Fit) -> None:
    metrics = Metrics(directory, updates=0)
    for kind, row in fit.standing.history:
        metrics.add(kind, row)
    metrics.draw()


def _write_adapter(out: Path, adapter: PeftModel, fit: Fit, info: dict[str, Any]) -> None:
    with atomic_directory(out, _ADAPTER_FILES) as directory:
        save_adapter(directory, adapter, fit.best)
        _write_metrics(directory, fit)
        write_notice(directory, recorded_notices(info))
        (directory / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _write_checkpoint(
    out: Path, model: CausalLM, tokenizer: Tokenizer, fit: Fit, info: dict[str, Any], base_info: dict[str, Any]
) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(fit.best[name])
    with atomic_directory(out, _RUN_FILES) as directory:
        (directory / _METRICS).mkdir()
        _write_metrics(directory / _METRICS, fit)
        notices = info.pop("notices")
        save_checkpoint(directory / CHECKPOINT, model, tokenizer, base_info | {"finetuned": info, "notices": notices})


def check_free(out: Path, method: str, overwrite: bool) -> None:
    """Makes sure that an adapter, or a run with a checkpoint, may be written to a directory.

    Raises:
        SlmError: When something else is there, or one of them that may not be replaced.
    """
    recover(out / TRAINER)  # what a process that was killed while it saved left half written is nobody's
    check_replaceable(out.resolve(), _ADAPTER_FILES if method == "lora" else _RUN_FILES)
    there = is_adapter(out) if method == "lora" else is_checkpoint(out / CHECKPOINT)
    if there and not overwrite:
        what = "an adapter" if method == "lora" else "a fine-tuned checkpoint"
        raise SlmError(f"there is already {what}: {out}", "--overwrite replaces it, --name names another")


def _split(rows: list[Row], validation: list[Row] | None) -> tuple[list[Row], list[Row]]:
    """Returns the rows to train on and those to hold out, the last tenth when none were given."""
    if validation is not None:
        return rows, validation
    held_out = len(rows) // _HELD_OUT
    return rows[: len(rows) - held_out], rows[len(rows) - held_out :]


def _check(train: Examples, valid: Examples, renderer: Renderer, max_length: int) -> None:
    """Refuses rows from which the model would learn nothing, or never learn to stop."""
    hint = f"rows may have {max_length} tokens; --max-length raises that"
    if not train.kept:
        raise SlmError("nothing to learn: every row's prompt alone is too long", hint)
    if not any(example.targets(renderer.end_of_text) for example in train.kept):
        raise SlmError("every row is cut before its end, so the model would never learn to stop", hint)
    if valid.skipped and not valid.kept:
        raise SlmError("nothing to measure: every validation row's prompt alone is too long", hint)


def _tell(train: Examples, valid: Examples, renderer: Renderer, max_length: int, progress: Progress) -> None:
    for number, example in enumerate(train.kept[:_SHOWN], 1):
        for learned, tokens in renderer.preview(example):
            progress.note(f"row {number}, {'learned:  ' if learned else 'read only:'} {tokens}")
    progress.note(
        f"{len(train.kept)} rows with {train.trained:,} learned tokens, "
        + (f"{len(valid.kept)} rows held out" if valid.kept else "none held out: the losses are the training rows'")
    )
    truncated, skipped = train.truncated + valid.truncated, train.skipped + valid.skipped
    if truncated:
        progress.note(f"warning: rows cut at {max_length} tokens, which lose their end-of-text: {truncated}")
    if skipped:
        progress.note(f"warning: rows left out, whose prompt alone has {max_length} tokens or more: {skipped}")


def _provenance(data: Path) -> dict[str, str]:
    return {"path": str(data), "sha256": sha256_file(data)}
