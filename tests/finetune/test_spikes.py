"""Fine-tuning that skips updates whose loss or gradient spikes, and the watchdog's warnings about it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.finetune import loop
from slm.finetune import material as module
from slm.finetune.adapter import ADAPTER_WEIGHTS_FILE
from slm.finetune.fit import Fit
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings
from slm.train.sections import WatchdogRecipe
from tests.progress import Notes, Stopper
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("short_answers")

WriteRows = Callable[..., Path]
ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(30)]
SETTINGS = FinetuneSettings(rank=4, epochs=2, batch_size=4)
GUARDED = SETTINGS.model_copy(update={"skip_spikes": True})
# Updates in two epochs of 30 rows.
UPDATES = 16


def nan_at(patch: pytest.MonkeyPatch, *updates: int) -> None:
    """Makes the loss of some updates NaN, counted from 1 in each run of this process."""
    loss, number = module.batch_loss, [0]

    def sometimes(*rest: Any) -> Any:
        value = loss(*rest)
        if not value.requires_grad:
            return value
        number[0] += 1
        return value * math.nan if number[0] in updates else value

    patch.setattr(module, "batch_loss", sometimes)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(out: Path) -> bytes:
    return (out / ADAPTER_WEIGHTS_FILE).read_bytes()


def test_a_run_without_spikes_is_the_same_with_the_guard(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(ROWS)
    finetune(shared_checkpoint, data, Path("plain"), SETTINGS)
    finetune(shared_checkpoint, data, Path("guarded"), GUARDED)
    assert weights(Path("plain")) == weights(Path("guarded"))
    assert rows_of(Path("plain")) == rows_of(Path("guarded"))


def test_a_spike_is_skipped_and_a_stopped_run_ends_as_one_that_is_not(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, notes = write_rows(ROWS), Notes()
    with monkeypatch.context() as patch:
        nan_at(patch, 3)
        finetune(shared_checkpoint, data, Path("whole"), GUARDED, notes)
    (spike,) = (row for row in rows_of(Path("whole")) if row["type"] == "spike")
    assert (spike["at_update"], spike["updates"], spike["loss"]) == (3, 3, None)
    assert "spike at update 3: the loss is nan" in "".join(notes.lines)
    assert sum(row["type"] == "train" for row in rows_of(Path("whole"))) == UPDATES - 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        nan_at(patch, 3)
        finetune(shared_checkpoint, data, Path("parts"), GUARDED, Stopper(5))
    finetune(shared_checkpoint, data, Path("parts"), GUARDED)
    assert weights(Path("parts")) == weights(Path("whole"))
    assert rows_of(Path("parts")) == rows_of(Path("whole"))


def test_too_many_spikes_end_the_run(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, *range(2, 100))
    with pytest.raises(
        SlmError, match=r"update 12: the loss is nan.*spike 11 within 1,000 updates, and the limit is 10"
    ):
        finetune(shared_checkpoint, write_rows(ROWS), Path("out"), GUARDED)


def test_a_hang_is_reported(shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WatchdogRecipe", lambda: WatchdogRecipe(hang_minutes=0.2 / 60))
    notes, update = Notes(), Fit.update

    def hanging(self: Fit, check: Any) -> Any:
        if self.standing.updates == 3:
            wait_for(lambda: any("has ended for" in line for line in notes.lines))
        return update(self, check)

    monkeypatch.setattr(Fit, "update", hanging)
    finetune(shared_checkpoint, write_rows(ROWS), Path("out"), SETTINGS, notes)
    assert any(
        line.startswith("warning: no micro-step, evaluation batch or save has ended for") for line in notes.lines
    )
