"""Recipes: the ones that ship, overrides, and what is refused."""

from pathlib import Path

import pytest
import yaml

from slm.core.errors import SlmError
from slm.train.recipe import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", ["documented", "stories-4m", "tiny"])
def test_packaged_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert name in recipe_names()
    assert recipe.name == name
    assert recipe.schedule.warmup_micro_steps < recipe.schedule.micro_steps
    if name != "documented":  # which has its leftover on purpose
        assert recipe.schedule.micro_steps % recipe.batch.accumulation == 0


def test_the_documented_numbers() -> None:
    recipe = load_recipe("documented")
    config = recipe.model.config()
    assert (recipe.batch.batch_size, recipe.batch.context, recipe.batch.accumulation) == (32, 128, 32)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ((0.9, 0.95), 1e-9, 0.1)
    assert recipe.optimizer.max_grad_norm == 0.5
    assert (recipe.schedule.micro_steps, recipe.schedule.warmup_micro_steps) == (150_000, 10_000)
    assert (recipe.schedule.learning_rate, recipe.schedule.final_learning_rate) == (1e-4, 5e-4)
    assert recipe.evaluation.every_micro_steps == 500
    assert recipe.data.tokenizer == "gpt2"
    assert recipe.updates == 4_687
    assert recipe.schedule.micro_steps * recipe.tokens_per_micro_step == 614_400_000
    assert config.parameter_count() == 132_490_496 + (50_304 - 50_257) * 640


def test_the_windows_of_tiny_pass_its_sliding_window() -> None:
    recipe = load_recipe("tiny")
    assert recipe.batch.context > recipe.model.config().sliding_window


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["model.hidden_size=96", "batch.accumulation=2", "data.validation=a b.txt"])
    file = tmp_path / "config.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert recipe.model.config().hidden_size == 96


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("batch.accumulation=3", "batch", "accumulation", 3),
        ("schedule.learning_rate=1e-3", "schedule", "learning_rate", 1e-3),  # to YAML 1.1 text, to pydantic a number
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("data.train=[a.txt, b.txt]", "data", "train", ("a.txt", "b.txt")),
        ("data.train=a.txt", "data", "train", ("a.txt",)),
        ("machine.precision=float32", "machine", "precision", "float32"),
    ],
)
def test_set(override: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(load_recipe("tiny", [override]), section), field) == value


def test_set_fills_a_section_that_is_empty_in_the_file(tmp_path: Path) -> None:
    fields = load_recipe("tiny").model_dump(mode="json") | {"optimizer": None}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert load_recipe(file, ["optimizer.eps=1e-8"]).optimizer.eps == 1e-8


def test_another_depth_brings_its_layer_types() -> None:
    assert len(load_recipe("tiny", ["model.num_hidden_layers=8"]).model.config().layer_types) == 8


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("batch.size=3", "no value 'batch.size'", "batch.batch_size, batch.context, batch.accumulation"),
        ("btch.batch_size=3", "no value 'btch.batch_size'", "batch.batch_size"),
        ("batch=3", "no value 'batch'", "batch.context"),
        ("model.hidden=3", "no value 'model.hidden'", "model.hidden_size"),
        ("model.eos_token_id=3", "no value", "model.vocab_size"),  # comes with the tokenizer
        ("batch.context", "there is no '='", "--set"),
        ("batch.context=0", r"batch.context: .*greater than 1", None),
        ("batch.context=9999", "max_position_embeddings", None),
        ("batch.accumulation=9999999", "there would be no update", None),
        ("model.preset=giant", "no preset is called 'giant'", "tiny"),
        ("model.head_dim=63", "head_dim", None),
        ("seed=-1", "seed", None),
    ],
)
def test_overrides_that_are_refused(override: str, message: str, hint: str | None) -> None:
    with pytest.raises(SlmError, match=message) as error:
        load_recipe("tiny", [override])
    if hint is not None:
        assert error.value.hint is not None
        assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not YAML"),
        ("- a", "not a mapping"),
        ("{}", "name: Field required"),
        ("optimizer: {momentum: 1}", "momentum|name"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SlmError, match=message):
        load_recipe(file)


def test_an_unknown_key_in_a_file_lists_the_valid_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_recipe("tiny").to_yaml().replace("  eps:", "  epsilon:"), encoding="utf-8")
    with pytest.raises(SlmError, match=r"optimizer.epsilon") as error:
        load_recipe(file)
    assert error.value.hint is not None
    assert "optimizer.eps" in error.value.hint


def test_unknown_names() -> None:
    with pytest.raises(SlmError, match="no recipe is called 'big'") as error:
        load_recipe("big")
    assert "documented, stories-4m, tiny" in (error.value.hint or "")
    with pytest.raises(SlmError, match="recipe not found"):
        load_recipe("missing.yaml")


def test_recipes_are_frozen() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("value", ["x", "2.5", "[]"])
def test_a_number_of_layers_that_is_none(value: str) -> None:
    with pytest.raises(SlmError, match="num_hidden_layers"):
        load_recipe("tiny", [f"model.num_hidden_layers={value}"]).model.config()
