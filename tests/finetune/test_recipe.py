"""Recipes of fine-tuning: their values, what replaces what, and how mistakes are explained."""

from pathlib import Path

import pytest
import yaml

from slm.core.errors import SlmError
from slm.finetune.preparation import RowFiles
from slm.finetune.recipe import FinetuneRecipe, load_recipe, resolved
from slm.finetune.rows import Limits
from slm.finetune.settings import FinetuneSettings


def write(text: str, name: str = "recipe.yaml") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def test_every_setting_has_a_place() -> None:
    recipe = load_recipe(None)
    assert recipe.training == FinetuneSettings()
    fields = yaml.safe_load(recipe.to_yaml())
    assert fields["training"].keys() == FinetuneSettings.model_fields.keys()


def test_options_replace_overrides_and_these_the_file() -> None:
    file = write(
        "base: mine\ndata: {train: a.jsonl, hold_out: 20%}\ntraining: {rank: 4, alpha: 4, learning_rate: 1e-3}\n"
    )
    recipe = load_recipe(file, ["training.alpha=5", "training.rank=6"], {"training.rank": 7})
    assert (recipe.training.rank, recipe.training.alpha, recipe.training.learning_rate) == (7, 5, 1e-3)
    assert (recipe.base, recipe.data.train, recipe.data.hold_out) == ("mine", "a.jsonl", 0.2)
    assert recipe.training.epochs is None


@pytest.mark.parametrize(
    ("override", "option", "validation", "hold_out"),
    [
        ("data.hold_out=0.5", {}, None, 0.5),
        ("data.hold_out=null", {}, "v", None),  # nothing takes the place of the validation rows
        ("samples=1", {"data.hold_out": 0.5}, None, 0.5),
        ("samples=1", {}, "v", None),
    ],
)
def test_one_of_two_that_exclude_each_other_replaces_the_files(
    override: str, option: dict[str, object], validation: str | None, hold_out: float | None
) -> None:
    file = write("data: {train: a.jsonl, validation: v}\nname: one\n")
    recipe = load_recipe(file, [override, "out=there"], option)
    assert (recipe.data.validation, recipe.data.hold_out) == (validation, hold_out)
    assert (recipe.name, recipe.out) == (None, "there")


def test_the_resolved_recipe_reads_back() -> None:
    files = RowFiles(Path("a.jsonl"), None, 0.25, True, Limits(1000, 2000))
    settings = FinetuneSettings(rank=3, qat="int4", patience=None)
    recipe = resolved(Path("base"), files, settings, 2, ["mlflow"])
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe and again.training == settings
    assert again.files() == RowFiles(Path("a.jsonl").absolute(), None, 0.25, True, Limits(1000, 2000))
    assert again.out is None and again.log == ("mlflow",)


def test_a_patience_of_0_disables_it_and_empty_sections_are_defaults() -> None:
    assert load_recipe(write("training: {patience: 0}\ndata:\n")).training.patience is None
    assert load_recipe(write("training:\n")).training == FinetuneSettings()
    assert load_recipe(None, ["log=wandb"]).log == ("wandb",)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("training: {rnak: 4}", "training.rnak: Extra inputs", "did you mean training.rank or"),
        ("rank: 4", "rank: Extra inputs", "did you mean training.rank?"),
        ("training: {rank: many}", "training.rank: must be a whole number", None),
        ("training: {rank: 5000}", "training.rank: must be less than or equal to 4096", None),
        ("data: {hold_out: 30}", "data.hold_out: must be less than or equal to 1", None),
        ("data: rows.jsonl", "data: must be a mapping, as in {a: b}", None),
        ("data: {validation: a, hold_out: 0.1}", "set either data.validation or data.hold_out, not both", None),
        ("name: a\nout: b", "set either name or out, not both", None),
        ("log: [tensorbord]", "log.0: must be 'tensorboard', 'wandb' or 'mlflow'", None),
        ("training: {qat: int8, dropout: 0.1}", "dropout is not supported with qat", None),
        ("- a", "is not a mapping", None),
        ("a: [", "is not YAML", None),
        ("a: 2024-99-99", "is not YAML", None),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(SlmError) as error:
        load_recipe(write(text))
    assert message in error.value.message and "\n" not in error.value.message
    assert "recipe.yaml" in error.value.message
    assert hint is None or hint in (error.value.hint or "")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("training.rnk=4", "no value 'training.rnk'", "did you mean training.rank"),
        ("rank=4", "no value 'rank'", "did you mean training.rank?"),
        ("adapter.rank=4", "no value 'adapter.rank'", "did you mean training.rank?"),
        ("nothing.here=4", "no value 'nothing.here'", "the sections are data, training; slm finetune --dry-run"),
        ("training.rank", "there is no '='", "--set training.rank=16"),
        ("training.rank=[", "the value is not YAML", "quote it"),
    ],
)
def test_an_override_names_a_value(override: str, message: str, hint: str) -> None:
    with pytest.raises(SlmError) as error:
        load_recipe(None, [override])
    assert message in error.value.message and hint in (error.value.hint or "")


def test_an_override_does_not_hide_a_wrong_section() -> None:
    with pytest.raises(SlmError, match="data: must be"):
        load_recipe(write("data: rows.jsonl"), ["data.skip_bad=true"])


def test_paths_start_at_the_current_directory() -> None:
    Path("there").mkdir()
    file = write("data: {train: rows.jsonl}", "there/recipe.yaml")
    Path("there/rows.jsonl").write_text("")
    with pytest.raises(SlmError) as error:
        load_recipe(file)
    assert "not found: rows.jsonl" in error.value.message and "there is there/rows.jsonl" in (error.value.hint or "")
    Path("rows.jsonl").write_text("")
    assert load_recipe(file).train == Path("rows.jsonl")


def test_a_recipe_without_rows_says_how_to_name_them() -> None:
    with pytest.raises(SlmError, match=r"no data\.train"):
        FinetuneRecipe().files()
