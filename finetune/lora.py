"""`finetune`: from a checkpoint and a file of rows to a LoRA adapter, kept at its best epoch."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from slm.core.checkpoint import INFO_FILE, notices_of, read_config
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_replaceable, sha256_file
from slm.core.licence import NOTICE_FILE, modified, recorded_notices, write_notice
from slm.core.nn import load_checkpoint
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import weights_sha256
from slm.finetune.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, attach, is_adapter, save_adapter
from slm.finetune.examples import Examples, Renderer
from slm.finetune.loop import Fit, fit
from slm.finetune.rows import InstructionRow, Row, read_rows
from slm.finetune.settings import LoraSettings
from slm.train.build import pick_device
from slm.train.metrics import Metrics
from slm.train.precision import capability, choose_precision
from slm.version import __version__

# All that an adapter's directory holds.
_FILES = frozenset((ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, INFO_FILE, NOTICE_FILE, "metrics.jsonl", "loss.png"))

# One row in this many, the last ones, is held out when no validation file is given.
_HELD_OUT = 10


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run made.

    Attributes:
        adapter: The adapter's directory.
        base: The checkpoint that it belongs to.
        rows: Rows that were trained on.
        validation_rows: Rows that the losses are measured on; 0 when there were too few to hold any out, and the losses
            are then those of the training rows.
        trained_tokens: Tokens learned in one epoch: answers and the ends of them.
        truncated: Rows, of both kinds, that lost their end and with it their end-of-text.
        skipped: Rows left out because their prompt alone was too long.
        loss_before: Nats a learned token, without the adapter.
        loss_after: The same with it.
        best_epoch: The pass over the rows whose adapter was kept, from 1.
        epochs: Passes in all.
        updates: Steps of the optimizer.
        trainable_parameters: The adapter's.
        seconds: Wall time.
    """

    adapter: Path
    base: Path
    rows: int
    validation_rows: int
    trained_tokens: int
    truncated: int
    skipped: int
    loss_before: float
    loss_after: float
    best_epoch: int
    epochs: int
    updates: int
    trainable_parameters: int
    seconds: float


def finetune(
    base: Path,
    data: Path,
    out: Path,
    settings: LoraSettings | None = None,
    progress: Progress | None = None,
    *,
    validation: Path | None = None,
    overwrite: bool = False,
) -> FinetuneResult:
    """Trains a LoRA adapter and writes it whole or not at all.

    The same base, data, settings and machine give the same adapter, byte for byte.

    Args:
        base: A checkpoint.
        data: Rows to train on; see `slm.finetune.rows`.
        out: The adapter's directory, to be made.
        settings: Hyperparameters; the defaults when None.
        progress: Who is told how it goes.
        validation: Rows to measure the loss on; the last tenth of `data` when None.
        overwrite: Whether an adapter that is already there may be replaced.

    Raises:
        SlmError: When an input is missing or wrong, the adapter exists, or there is nothing to learn.
    """
    started = time.perf_counter()
    settings, progress = settings or LoraSettings(), progress or Silent()
    check_free(out, overwrite)
    config = read_config(base)
    rows, held_out = _split(read_rows(data), None if validation is None else read_rows(validation))
    settings = settings.resolved(config, len(rows))
    assert settings.max_length is not None and settings.epochs is not None
    if settings.max_length > config.max_position_embeddings:
        raise SlmError(
            f"max_length {settings.max_length} is longer than the base's context of {config.max_position_embeddings}"
        )

    renderer = Renderer(Tokenizer.load(base), config)
    train, valid = (renderer.examples(part, settings.max_length) for part in (rows, held_out))
    _check(train, valid, renderer, settings.max_length)
    _tell(train, valid, renderer, settings.max_length, progress)

    device = pick_device("auto")
    precision = choose_precision("auto", capability(device), config.hidden_size)
    model = load_checkpoint(base).to(device)
    # A base trained on plain text has never seen a turn token: its rows of the embedding are still random.
    turns = renderer.turn_token_ids() if any(isinstance(row, InstructionRow) for row in rows) else []
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapter = attach(model, settings, base, turns)
        trained = fit(adapter, train.kept, valid.kept or train.kept, settings, precision, progress)
    if trained.loss >= trained.loss_before:
        progress.note("warning: the loss did not fall; try a lower learning rate or more rows")

    result = FinetuneResult(
        adapter=out,
        base=base,
        rows=len(train.kept),
        validation_rows=len(valid.kept),
        trained_tokens=train.trained,
        truncated=train.truncated + valid.truncated,
        skipped=train.skipped + valid.skipped,
        loss_before=trained.loss_before,
        loss_after=trained.loss,
        best_epoch=trained.best_epoch,
        epochs=settings.epochs,
        updates=trained.updates,
        trainable_parameters=sum(tensor.numel() for tensor in trained.state.values()),
        seconds=round(time.perf_counter() - started, 2),
    )
    info = {
        "made_by": "slm finetune",
        "slm_version": __version__,
        "base": {"path": str(base.resolve()), "weights_sha256": weights_sha256(base)},
        "data": _provenance(data),
        "validation": None if validation is None else _provenance(validation),
        "settings": settings.model_dump(mode="json"),
        "precision": precision.name,
        "notices": modified(notices_of(base), "fine-tuned with LoRA"),
        "metrics": {name: value for name, value in asdict(result).items() if name not in ("adapter", "base")},
    }
    _write(out, adapter, trained, info)
    return result


def _write(out: Path, adapter: PeftModel, trained: Fit, info: dict[str, Any]) -> None:
    with atomic_directory(out, _FILES) as directory:
        save_adapter(directory, adapter, trained.state)
        metrics = Metrics(directory, updates=0)
        for kind, row in trained.history:
            metrics.add(kind, row)
        metrics.draw()
        write_notice(directory, recorded_notices(info))
        (directory / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def check_free(out: Path, overwrite: bool) -> None:
    """Makes sure that an adapter may be written to a directory.

    Raises:
        SlmError: When something is there that is not an adapter, or an adapter that may not be replaced.
    """
    check_replaceable(out.resolve(), _FILES)
    if is_adapter(out) and not overwrite:
        raise SlmError(f"there is already an adapter: {out}", "--overwrite replaces it, --name names another")


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
    if not any(example.ids[-1] == renderer.end_of_text for example in train.kept):
        raise SlmError("every row is cut before its end, so the model would never learn to stop", hint)
    if valid.skipped and not valid.kept:
        raise SlmError("nothing to measure: every validation row's prompt alone is too long", hint)


def _tell(train: Examples, valid: Examples, renderer: Renderer, max_length: int, progress: Progress) -> None:
    """Says what will be learned, before time is spent on it."""
    read, learned = renderer.preview(train.kept[0])
    progress.note(f"first row, read only: {read}")
    progress.note(f"first row, learned:   {learned}")
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
