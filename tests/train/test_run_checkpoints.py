"""The checkpoints of a run: which are kept, when they are saved, and what is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slm.core.nn import load_checkpoint
from slm.train import keep
from slm.train import run as module
from slm.train.evaluate import Evaluation
from slm.train.recipe import Recipe
from slm.train.run import resume, train

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")
# Our logits and transformers' are two float32 implementations that add in different orders.
LOGITS_TOLERANCE = 3e-5


def test_the_saved_weights_outlive_the_checkpoint_they_were_linked_to(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    trainer, last = (OUT / part / "model.safetensors" for part in ("trainer", "checkpoint/last"))
    assert trainer.samefile(last)
    tensors = safetensors.torch.load_file(trainer)
    shutil.rmtree(OUT / "checkpoint")
    assert safetensors.torch.load_file(trainer).keys() == tensors.keys()


def test_the_state_is_saved_while_it_runs(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save_state = keep.save_state
    monkeypatch.setattr("slm.train.loop._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(keep, "save_state", lambda run, counters, *rest: (
        saved.append(counters.micro_steps), save_state(run, counters, *rest)
    ))  # fmt: skip
    train(small_recipe(), OUT)
    assert saved == [2, 4, 6, 8, 10, 12, 12]


def test_an_interval_that_no_update_meets_exactly(small_recipe: MakeRecipe, rows: Rows) -> None:
    train(
        small_recipe(batch={"accumulation": 4}, evaluation={"every_micro_steps": 5}, schedule={"micro_steps": 15}), OUT
    )
    # Measured after the update that reaches 5 and 10, and at the end; 3 micro-steps are left over and fill no update.
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 8, 12]
    assert rows(OUT)[-1]["updates"] == 3


def test_the_best_is_kept_when_the_loss_rises_again(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 4.0, 3.0, 5.0])  # the one before the first update is no candidate
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    result = train(small_recipe(), OUT)
    assert (result.loss_before, result.loss) == (1.0, 3.0)
    made = {name: json.loads((OUT / f"checkpoint/{name}/slm.json").read_text("utf-8")) for name in ("best", "last")}
    assert made["best"]["micro_steps"] == 8
    assert made["best"]["metrics"]["loss"] == 3.0
    assert made["last"]["micro_steps"] == 12
    assert made["last"]["metrics"]["loss"] == 5.0


def test_the_average_is_what_is_measured_and_kept_and_the_weights_are_what_is_trained(
    small_recipe: MakeRecipe, whole_run: Path, rows: Rows
) -> None:
    train(small_recipe(optimizer={"ema": 0.9}), OUT)

    def weights(*parts: str) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(Path(*parts))

    def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    average, raw = weights(str(OUT), "trainer/average.safetensors"), weights(str(OUT), "trainer/model.safetensors")
    assert same(weights(str(OUT), "checkpoint/last/model.safetensors"), average)
    assert not same(average, raw)
    assert same(raw, weights(str(whole_run), "trainer/model.safetensors"))  # it takes no part in the training
    assert not (whole_run / "trainer/average.safetensors").exists()
    losses = [[row["loss"] for row in rows(run) if row["type"] == "eval"] for run in (OUT, whole_run)]
    assert losses[0][0] == losses[1][0]  # before the first update there is nothing to average
    assert not set(losses[0][1:]) & set(losses[1][1:])


def test_numbered_checkpoints(small_recipe: MakeRecipe, stopper: Any, fingerprint: Fingerprint) -> None:
    transformers = pytest.importorskip("transformers")
    train(small_recipe(checkpoints={"every_updates": 2, "keep": 2}), OUT)
    numbered = sorted(path.name for path in (OUT / "checkpoint").iterdir())
    assert numbered == ["best", "last", "update-0000004", "update-0000006"]
    kept, last = OUT / "checkpoint/update-0000004", OUT / "checkpoint/last"
    assert json.loads((kept / "slm.json").read_text(encoding="utf-8"))["updates"] == 4
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in last.iterdir())
    ids = torch.arange(20)[None]
    ours = load_checkpoint(kept)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(kept, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < LOGITS_TOLERANCE
        assert (
            load_checkpoint(last)(ids) - theirs(ids).logits
        ).abs().max() > 100 * LOGITS_TOLERANCE  # it is the older one
    assert transformers.AutoTokenizer.from_pretrained(kept)("The dog").input_ids
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(checkpoints={"every_updates": 2, "keep": 2}), Path("cut"), stopper(9))
    resume(Path("cut"))
    assert fingerprint(Path("cut")) == fingerprint(OUT)


def test_no_numbered_checkpoints_by_default(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoint").iterdir()) == ["best", "last"]


@pytest.mark.parametrize(
    ("patience", "losses", "stops_at"),
    [
        (1, [5.0, 4.0, 4.5], 8),
        (2, [5.0, 4.0, 4.5, 3.5], 12),  # a new best in time
        (1, [5.0, 4.0, 4.0], 8),  # equal is not better
        (2, [1.0, 4.0, 3.0, 2.0], 12),  # what was there before the first update is no best to wait for
        (1, [1.0, 4.0, 5.0], 8),
        (None, [5.0, 4.0, 4.5, 4.6], 12),
    ],
    ids=["out", "in-time", "equal", "before-training", "worse-than-before", "none"],
)
def test_patience(
    small_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    patience: int | None,
    losses: list[float],
    stops_at: int,
    notes: Any,
) -> None:
    left = iter(losses)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(left), bits_per_byte=1.0, tokens=1))
    result = train(small_recipe(evaluation={"patience": patience}), OUT, notes)
    assert result.micro_steps == stops_at
    assert result.loss == min(losses[1:])
    assert list(left) == []
    assert json.loads((OUT / "trainer/state.json").read_text(encoding="utf-8"))["micro_steps"] == stops_at
    assert any("stopping early" in line for line in notes.lines) is (stops_at < 12)
    assert resume(OUT).micro_steps == stops_at  # which measures nothing anew and goes no further
