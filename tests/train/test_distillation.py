"""Teachers of pretraining: blended targets against their definition, what they change, resuming, and what is refused.

Dimensions: N positions, D hidden, E hidden of a teacher, V vocabulary.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.train import prepare
from slm.train.estimate import training_flops
from slm.train.loss import IGNORED, linear_cross_entropy, linear_loss
from slm.train.memory import training_bytes
from slm.train.precision import Precision
from slm.train.recipe import Recipe
from slm.train.review import review
from slm.train.run import resume, train
from slm.train.teacher import BlendedTargets
from tests.gradients import N, V, assert_same, drawn
from tests.train.recipes import small

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
FLOAT32 = Precision(None, scale_loss=False)


@pytest.fixture(scope="module")
def teachers(story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two trained models with the tokenizer of the small recipe: one as small, one wider."""
    place = tmp_path_factory.mktemp("teachers")
    for name, width in (("narrow", 48), ("wide", 64)):
        train(small(story_file, {"model": {"intermediate_size": width}}), place / name)
    return [str(place / name / "checkpoint/best") for name in ("narrow", "wide")]


def taught(make: MakeRecipe, teachers: list[str], weight: float = 0.5, **sections: dict[str, Any]) -> Recipe:
    return make(distillation={"teachers": teachers, "weight": weight}, **sections)


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 8, None])
def test_the_loss_is_the_cross_entropy_for_the_blend(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, weight: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weights = drawn(draw)
    targets = torch.randint(0, 90, (N,), generator=draw)
    targets[::5] = IGNORED
    # The second teacher's vocabulary is shorter than the student's, the first one's longer.
    predictions = [
        (torch.randn(N, e, generator=draw), torch.randn(v, e, generator=draw)) for e, v in ((40, 120), (16, 90))
    ]

    def definition(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        mean = torch.zeros(N, V)
        for theirs, head in predictions:
            shared = head[:V]
            mean[:, : len(shared)] += (theirs @ shared.T).softmax(-1) / 2
        learned = targets != IGNORED
        blend = weight * mean + (1 - weight) * torch.nn.functional.one_hot(targets.clamp(min=0), V)
        return -(blend * (hidden @ weights.T).log_softmax(-1)).sum(-1)[learned].mean()

    def found(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return linear_loss(hidden, weights, BlendedTargets(targets, predictions, weight), chunk)

    value = assert_same(monkeypatch, found, definition, hidden, weights)
    plain = linear_cross_entropy(hidden, weights, targets)
    assert abs(plain.item() - value) > 1e-2  # the control


def test_teachers_change_what_is_learned_and_none_of_it_is_saved(
    small_recipe: MakeRecipe, teachers: list[str], rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    runs = {
        "plain": small_recipe(),
        "one": taught(small_recipe, teachers[:1]),
        "two": taught(small_recipe, teachers),
        "more": taught(small_recipe, teachers, 0.9),
    }
    evaluated = {}
    for name, recipe in runs.items():
        train(recipe, Path(name))
        evaluated[name] = [row["loss"] for row in rows(Path(name)) if row["type"] == "eval"]
    assert len({losses[0] for losses in evaluated.values()}) == 1  # measured on the text alone
    assert len({losses[-1] for losses in evaluated.values()}) == 4
    names = {name for name, _ in load_checkpoint(Path("plain/checkpoint/last")).named_parameters()}
    assert {name for name, _ in load_checkpoint(Path("two/checkpoint/last")).named_parameters()} == names


@pytest.mark.parametrize("sampler", ["packed", "best_fit"])
def test_a_taught_run_cut_in_two_is_the_run_in_one_piece(
    small_recipe: MakeRecipe, teachers: list[str], sampler: str, stopper: Any, fingerprint: Fingerprint
) -> None:
    recipe = taught(small_recipe, teachers, data={"sampler": sampler}, regularization={"dropout": 0.1})
    train(recipe, Path("uncut"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Path("cut"), stopper(5))
    resume(Path("cut"))
    assert fingerprint(Path("cut")) == fingerprint(Path("uncut"))


def test_teachers_take_part_in_the_estimates(small_recipe: MakeRecipe, teachers: list[str]) -> None:
    plain, recipe = small_recipe(), taught(small_recipe, teachers)
    config = recipe.model.config()
    weights = sum(4 * read_config(Path(path)).parameter_count() for path in teachers)
    assert training_bytes(recipe, config, FLOAT32).teachers == weights
    assert training_bytes(plain, config, FLOAT32).teachers == 0
    half = training_bytes(recipe, config, Precision(torch.bfloat16, scale_loss=False)).teachers
    assert weights / 2 < half < weights
    one = training_flops(plain, config)
    assert 1.6 < training_flops(recipe, config) / one < 1.9  # two forward passes beside three, one of them wider


def test_a_weight_without_teachers_is_named(small_recipe: MakeRecipe) -> None:
    assert "distillation.weight has no effect without distillation.teachers" in review(
        small_recipe(distillation={"weight": 0.9})
    )


@pytest.mark.parametrize("batch_size", ["4", "auto"])
def test_a_teacher_that_does_not_exist_is_named_before_the_text_is_read(
    small_recipe: MakeRecipe,
    teachers: list[str],
    slm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: str,
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the text was read")

    Path("recipe.yaml").write_text(small_recipe().to_yaml(), encoding="utf-8")
    monkeypatch.setattr(prepare, "open_corpus", read)
    settings = ("--set", "distillation.teachers=[~/nowhere]", "--set", f"batch.batch_size={batch_size}")
    for more in ((), ("--dry-run",)):
        ended = slm("train", "--recipe", "recipe.yaml", *settings, *more)
        where = Path("~/nowhere").expanduser()
        assert ended.code == 1 and f"distillation.teachers: checkpoint not found: {where}" in ended.err


def test_a_teacher_in_the_home_directory(
    small_recipe: MakeRecipe, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path(teachers[0]).parent))
    recipe = taught(small_recipe, ["~/best"])
    assert training_bytes(recipe, recipe.model.config(), FLOAT32).teachers
    train(recipe, Path("run"))
    resume(Path("run"))


def test_the_dry_run_rejects_a_teacher_that_training_rejects(
    small_recipe: MakeRecipe, teachers: list[str], tokenizer: Tokenizer, slm: Callable[..., Any]
) -> None:
    save_checkpoint(Path("foreign"), load_checkpoint(Path(teachers[0])), tokenizer, {})
    for name, code in (("foreign", 1), (teachers[0], 0)):
        Path("recipe.yaml").write_text(taught(small_recipe, [name]).to_yaml(), encoding="utf-8")
        ended = slm("train", "--recipe", "recipe.yaml", "--dry-run")
        assert (ended.code, "another tokenizer than the run" in ended.err) == (code, code == 1)


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    small_recipe: MakeRecipe, teachers: list[str], tokenizer: Tokenizer
) -> None:
    model = load_checkpoint(Path(teachers[0]))
    save_checkpoint(Path("foreign"), model, tokenizer, {})
    with pytest.raises(SlmError, match="another tokenizer than the run"):
        train(taught(small_recipe, ["foreign"]), Path("run"))
    shutil.copytree(teachers[0], "cut")
    os.truncate("cut/model.safetensors", 5000)
    with pytest.raises(SlmError, match="cannot read the weights: cut"):
        train(taught(small_recipe, ["cut"]), Path("run"))
    with pytest.raises(SlmError, match=r"^not a checkpoint: "):
        Path("empty").mkdir()
        train(taught(small_recipe, ["empty"]), Path("run"))
    longer = {"max_position_embeddings": 128}
    with pytest.raises(SlmError, match="rows have up to 100 tokens") as error:
        train(taught(small_recipe, teachers, model=longer, batch={"context": 100, "batch_size": 1}), Path("run"))
    assert error.value.hint == "--set batch.context=64"
    assert not Path("run").exists()
