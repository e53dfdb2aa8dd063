"""Resumed runs of fine-tuning: a run that was interrupted or killed leaves the bytes of the run in one piece."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slm.core.checkpoint import read_info
from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.finetune.run import finetune
from tests.finetune.runs import FILES, PAIRS, QUICK
from tests.precision import pretend_speedup
from tests.progress import Notes, Stopper

pytestmark = pytest.mark.usefixtures("short_answers", "nothing_half_written")

WriteRows = Callable[..., Path]
METHODS: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.2}, "dora": {"dora": True}, "full": {"method": "full"}}


def bytes_made(out: Path) -> dict[str, bytes]:
    """The files of a run, without those that differ each time: the times in `slm.json`, and the date in the picture."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("loss.png", "slm.json"))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_leaves_the_bytes_of_the_run_in_one_piece(
    shared_checkpoint: Path, write_rows: WriteRows, method: str
) -> None:
    data, settings = write_rows(PAIRS), QUICK.model_copy(update=METHODS[method])
    finetune(shared_checkpoint, data, Path("whole"), settings)
    for update in (1, 3, 4):  # within the first epoch, at its end, and after it
        parts = Path(f"parts-{update}")
        with pytest.raises(KeyboardInterrupt):
            finetune(shared_checkpoint, data, parts, settings, Stopper(update))
        assert [path.name for path in parts.iterdir()] == ["trainer"]
        heard = Notes()
        result = finetune(shared_checkpoint, data, parts, settings, heard)
        assert f"going on after update {update}, as saved in {parts}" in heard.lines
        assert result.updates == 6
        assert bytes_made(parts) == bytes_made(Path("whole")), update


def test_a_resumed_run_keeps_its_precision_when_the_measurement_changes(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(PAIRS)
    pretend_speedup(monkeypatch, 2.0)
    finetune(shared_checkpoint, data, Path("whole"), QUICK)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("parts"), QUICK, Stopper(3))
    pretend_speedup(monkeypatch, 0.5)
    finetune(shared_checkpoint, data, Path("parts"), QUICK)
    assert bytes_made(Path("parts")) == bytes_made(Path("whole"))
    assert read_info(Path("whole"))["precision"] == "bfloat16 autocast"
    finetune(shared_checkpoint, data, Path("later"), QUICK)
    assert read_info(Path("later"))["precision"] == "float32"


class Killed(Silent):
    """Ends the run during an update as a kill does: nothing is saved at that moment."""

    def __init__(self, update: int) -> None:
        self.left = update

    def advance(self, amount: int = 1, **fields: str) -> None:
        self.left -= amount if fields else 0
        if not self.left:
            raise SystemExit(137)


def test_a_killed_run_continues_from_the_last_save(
    shared_checkpoint: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(PAIRS)
    finetune(shared_checkpoint, data, Path("whole"), QUICK)
    monkeypatch.setattr("slm.train.loop._SAVE_EVERY_S", 0.0)
    with pytest.raises(SystemExit):
        finetune(shared_checkpoint, data, Path("parts"), QUICK, Killed(5))
    half_written = Path("parts/.trainer.partial-999999999")  # of a process that has ended
    half_written.mkdir()
    (half_written / "weights.safetensors").write_bytes(b"half")
    heard = Notes()
    finetune(shared_checkpoint, data, Path("parts"), QUICK, heard)
    assert "going on after update 4, as saved in parts" in heard.lines
    assert bytes_made(Path("parts")) == bytes_made(Path("whole"))


def test_resuming_needs_everything_that_was_saved(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS)
    finetune(shared_checkpoint, data, Path("whole"), QUICK)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("cut"), QUICK, Stopper(3))
    for lost in ("optimizer", "weights"):
        parts = Path(shutil.copytree("cut", f"without-{lost}"))
        file = parts / "trainer" / f"{lost}.safetensors"
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file)
        finetune(shared_checkpoint, data, parts, QUICK)
        assert bytes_made(parts) != bytes_made(Path("whole")), lost


def test_an_interrupted_run_of_other_settings_is_not_resumed(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, other = write_rows(PAIRS), write_rows(PAIRS[:9], "other.jsonl")
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), QUICK, Stopper(3))
    with pytest.raises(SlmError, match="an interrupted run that differs in data, rank, seed") as caught:
        finetune(shared_checkpoint, other, Path("out"), QUICK.model_copy(update={"seed": 5, "rank": 2}))
    assert caught.value.hint and "--overwrite" in caught.value.hint
    assert Path("out/trainer").is_dir()
    finetune(shared_checkpoint, other, Path("out"), QUICK, overwrite=True)
    assert sorted(path.name for path in Path("out").iterdir()) == FILES


def test_a_damaged_state_is_named(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(PAIRS)
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), QUICK, Stopper(3))
    file = Path("out/trainer/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SlmError, match="the saved state is damaged"):
        finetune(shared_checkpoint, data, Path("out"), QUICK)
    finetune(shared_checkpoint, data, Path("out"), QUICK, overwrite=True)


def test_a_damaged_history_is_named(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    data, file = write_rows(PAIRS), Path("out/trainer/state.json")
    with pytest.raises(KeyboardInterrupt):
        finetune(shared_checkpoint, data, Path("out"), QUICK, Stopper(3))
    fields = json.loads(file.read_text(encoding="utf-8"))
    whole = {"epoch": 0, "updates": 0, "tokens": 0, "loss": 1.0}
    for row, message in (
        (whole | {"epoch": {"": {}}}, "no whole number as 'epoch'"),
        ({name: whole[name] for name in ("updates", "tokens", "loss")}, "no whole number as 'epoch'"),
        (whole | {"updates": 0.5}, "no whole number as 'updates'"),
        (whole | {"tokens": -1}, "no whole number as 'tokens'"),
        (whole | {"loss": "low"}, "no number as 'loss'"),
        (whole | {"epoch": 7}, "best_epoch: was not measured"),
    ):
        file.write_text(json.dumps(fields | {"history": [["eval", row]], "best_epoch": 0}), encoding="utf-8")
        with pytest.raises(SlmError, match=f"the saved state is damaged: .*{message}"):
            finetune(shared_checkpoint, data, Path("out"), QUICK)
