"""Quantization-aware training: checkpoints on the grid, trained weights that are not, and when rounding begins."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slm.core.checkpoint import read_info
from slm.core.errors import SlmError
from slm.core.grid import distance
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.nn.fake_quant import fake_quantize
from slm.core.qat import GRIDS, QatPrecision, recorded_grid
from slm.train.data.dataset import open_dataset
from slm.train.estimate import estimate
from slm.train.evaluate import evaluate
from slm.train.learner import Objective
from slm.train.memory import training_bytes
from slm.train.precision import FLOAT32
from slm.train.recipe import Recipe, load_recipe
from slm.train.run import TrainResult, resume, train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]

# The distance of weights from their grid, in steps: that of rounded weights, and less than that of any others.
ON_GRID, OFF_GRID = 1e-5, 0.1


@pytest.fixture(scope="module")
def runs(small_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """A run without quantization, and one for each grid; not to be changed."""
    home = tmp_path_factory.mktemp("qat")
    return {
        name: train(small_recipe(qat={"precision": name}, data={"sampler": "random"}), home / name)
        for name in ("none", "int8", "int4")
    }


def distances(weights: dict[str, torch.Tensor], model: CausalLM, precision: QatPrecision) -> list[float]:
    return [distance(weights[name].numpy(), scheme) for name, scheme in GRIDS[precision].schemes(model.config)]


def held_out_loss(run: Path, model: CausalLM) -> float:
    recipe = load_recipe(run / "config.yaml")
    return evaluate(
        Objective(model),
        open_dataset(run / "data").validation,
        windows=recipe.evaluation.windows,
        context=recipe.batch.context,
        batch_size=recipe.batch.batch_size,
        check=lambda: None,
    ).loss


@pytest.mark.parametrize("precision", GRIDS)
def test_checkpoints_are_on_the_grid_and_the_state_is_not(
    runs: dict[str, TrainResult], precision: QatPrecision
) -> None:
    run = runs[precision].run
    for name in ("best", "last"):
        path = run / "checkpoint" / name
        model = load_checkpoint(path)
        assert max(distances(dict(model.state_dict()), model, precision)) < ON_GRID
        assert recorded_grid(read_info(path)) == GRIDS[precision]
    masters = safetensors.torch.load_file(run / "trainer/model.safetensors")
    assert min(distances(masters, model, precision)) > OFF_GRID
    plain = load_checkpoint(runs["none"].checkpoint)
    assert min(distances(dict(plain.state_dict()), plain, precision)) > OFF_GRID
    assert recorded_grid(read_info(runs["none"].checkpoint)) is None


@pytest.mark.parametrize("precision", GRIDS)
def test_the_loss_is_that_of_the_rounded_model(runs: dict[str, TrainResult], precision: QatPrecision) -> None:
    result = runs[precision]
    model = load_checkpoint(result.checkpoint)
    as_quantized = held_out_loss(result.run, fake_quantize(model, GRIDS[precision]))
    assert as_quantized == pytest.approx(result.loss, abs=2e-5)
    in_floats = held_out_loss(result.run, load_checkpoint(result.checkpoint))
    assert abs(in_floats - result.loss) > 1e-6  # activations are not rounded there
    assert len({run.loss for run in runs.values()}) == 3


def test_rounding_begins_after_a_share_of_the_run(
    small_recipe: MakeRecipe, runs: dict[str, TrainResult], rows: Rows
) -> None:
    train(small_recipe(qat={"precision": "int4", "start": 0.5}), Path("late"))

    def losses(run: Path) -> list[float]:
        return [row["loss"] for row in rows(run) if row["type"] == "train"]

    late, floats, rounded = losses(Path("late")), losses(runs["none"].run), losses(runs["int4"].run)
    assert late[:3] == floats[:3] != rounded[:3]
    assert all(a != b for a, b in zip(late[3:], floats[3:], strict=True))
    first = [
        next(row["loss"] for row in rows(run) if row["type"] == "eval") for run in (Path("late"), runs["none"].run)
    ]
    assert first[0] != first[1]  # evaluations always round


@pytest.mark.parametrize(
    "machine", [{"precision": "bfloat16"}, {"precision": "float16"}, {"gradient_checkpointing": True}]
)
def test_it_trains_in_other_types_and_with_recomputation(
    small_recipe: MakeRecipe, runs: dict[str, TrainResult], machine: dict[str, Any]
) -> None:
    result = train(small_recipe(qat={"precision": "int8"}, machine=machine), Path("run"))
    assert result.loss == pytest.approx(runs["int8"].loss, rel=0.01)
    model = load_checkpoint(result.checkpoint)
    assert max(distances(dict(model.state_dict()), model, "int8")) < ON_GRID


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_it_compiles(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces a run before and after rounding begins; tests/core/test_training_modes.py has the kernels, which take long."""
    plain, compiled = (
        small_recipe(qat={"precision": "int4", "start": 0.5}, machine={"compile": each}) for each in (False, True)
    )
    losses = [train(plain, Path("plain")).loss]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses.append(train(compiled, Path("compiled")).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.005)


def test_a_run_cannot_change_its_grid(small_recipe: MakeRecipe, stopper: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(qat={"precision": "int8"}), Path("run"), stopper(5))
    config = Path("run/config.yaml")
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("precision: int8", "precision: none"), encoding="utf-8")
    with pytest.raises(SlmError, match=r"saved with qat\.precision = int8, and config\.yaml says none"):
        resume(Path("run"))


def test_a_run_of_an_older_version_continues(small_recipe: MakeRecipe, stopper: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), Path("run"), stopper(5))
    file = Path("run/trainer/state.json")
    state = json.loads(file.read_text(encoding="utf-8"))
    state["course"] = {name: value for name, value in state["course"].items() if not name.startswith("qat")}
    file.write_text(json.dumps(state), encoding="utf-8")
    config = Path("run/config.yaml")
    before = config.read_text(encoding="utf-8")
    config.write_text(before.replace("precision: none", "precision: int4"), encoding="utf-8")
    with pytest.raises(SlmError, match=r"saved with qat\.precision = none, and config\.yaml says int4"):
        resume(Path("run"))
    config.write_text(before, encoding="utf-8")
    assert resume(Path("run")).updates == 6


def test_a_model_that_fits_no_grid_is_rejected_with_the_recipe(small_recipe: MakeRecipe) -> None:
    odd = {"hidden_size": 40, "num_attention_heads": 2}
    small_recipe(model=odd)
    with pytest.raises(SlmError, match="has 40 inputs, not a multiple of the block size 16"):
        small_recipe(model=odd, qat={"precision": "int8"})


def test_estimates_count_the_rounded_copies(small_recipe: MakeRecipe) -> None:
    plain, rounded = small_recipe(), small_recipe(qat={"precision": "int4"})
    config = plain.model.config()
    without, with_grid = (training_bytes(recipe, config, FLOAT32) for recipe in (plain, rounded))
    assert with_grid.weights == without.weights and with_grid.moments == without.moments
    # a copy of each matrix, and of the head
    assert with_grid.total - without.total > 4 * sum(
        shape.numel() for shape in (p.shape for p in CausalLM(config).parameters()) if len(shape) > 1
    )
    a100 = [estimate(recipe, "a100", None) for recipe in (plain, rounded)]
    assert a100[1].seconds > a100[0].seconds and a100[1].memory.total > a100[0].memory.total
    assert estimate(rounded, None, None).seconds > 0
