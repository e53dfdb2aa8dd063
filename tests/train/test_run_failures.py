"""Runs that fail: losses that are not finite, and memory that is exhausted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.errors import SlmError
from slm.train import learner
from slm.train import run as module
from slm.train.evaluate import Evaluation
from slm.train.recipe import Recipe
from slm.train.run import train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]


@pytest.mark.parametrize("saved", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(small_recipe: MakeRecipe, saved: bool) -> None:
    recipe = small_recipe(
        schedule={"learning_rate": 1e30},
        optimizer={"weight_decay": 0.0},
        checkpoints={"every_updates": 1 if saved else None},
    )
    with pytest.raises(
        SlmError, match=r"^update 2, micro-step 3: the (loss|gradient's norm) is (nan|inf) \(hint: "
    ) as error:
        train(recipe, OUT)
    hint = error.value.hint or ""
    assert (f"checkpoint is {OUT / 'checkpoint/last'};" in hint) is saved
    assert ("no checkpoint was saved yet" in hint) is not saved
    assert "schedule.learning_rate" in hint
    assert leftovers(OUT) == []


def test_a_validation_loss_that_is_not_finite_is_no_best(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    losses = iter([5.0, 4.0, float("nan")])
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    with pytest.raises(SlmError, match=r"^update 4, micro-step 8: the validation loss is nan \(hint: ") as error:
        train(small_recipe(), OUT)
    assert "schedule.learning_rate" in (error.value.hint or "")
    best = json.loads((OUT / "checkpoint/best/slm.json").read_text(encoding="utf-8"))
    assert best["metrics"]["loss"] == 4.0
    assert [row["loss"] for row in rows(OUT) if row["type"] == "eval"] == [5.0, 4.0]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    MemoryError(),
]


def fail_after(monkeypatch: pytest.MonkeyPatch, losses: int, error: Exception) -> None:
    """Lets so many losses be computed and raises from then on."""
    left = iter(range(losses))
    cross_entropy = learner.linear_cross_entropy

    def failing(*arguments: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise error
        return cross_entropy(*arguments)

    monkeypatch.setattr(learner, "linear_cross_entropy", failing)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_says_what_to_lower(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_after(monkeypatch, 2 + 4, error)  # 8 windows are measured first, 4 at a time
    with pytest.raises(SlmError, match=r"^out of memory at micro-step 5 \(hint: ") as raised:
        train(small_recipe(), OUT)
    hint = raised.value.hint or ""
    assert "--set batch.batch_size=2 --set batch.accumulation=4 saves about" in hint
    assert "--set machine.gradient_checkpointing=true saves about" in hint
    assert "no checkpoint was saved yet" in hint
    assert leftovers(OUT) == []


def test_another_error_stays_what_it_is(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 6, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        train(small_recipe(), OUT)
