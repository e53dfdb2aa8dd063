"""Each contradiction is named, by the value that is wrong, and a recipe without any is left alone."""

import pytest

from slm.train.recipe import load_recipe
from slm.train.review import review

SOUND = ("stories-4m", ["schedule.micro_steps=2000"])


def sentences(name: str, overrides: list[str], passes: float | None = None) -> list[str]:
    return review(load_recipe(name, overrides), passes)


def test_a_sound_recipe_is_left_alone() -> None:
    assert sentences(*SOUND, passes=3.0) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.final_learning_rate=0.02", "rises after the warm-up, from 0.01 to 0.02"),
        ("schedule.warmup_micro_steps=2000", "warm-up of 2,000 micro-steps is as long as the training of 2,000"),
        ("schedule.decay=0.99", "schedule.decay begins before the warm-up ends"),
        ("batch.accumulation=128", "shorter than one update of 128"),
        ("batch.context=128", "sliding attention never differs from full attention"),
        ("model.num_hidden_layers=5", "none of the 5 layers is global"),
        ("evaluation.every_micro_steps=2001", "longer than the run"),
        ("evaluation.patience=20", "never stops early"),
    ],
)
def test_a_contradiction_is_named(override: str, said: str) -> None:
    name, sound = SOUND
    (sentence,) = sentences(name, [*sound, override])
    assert said in sentence


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.name=adamw", "optimizer.momentum=0.9"], "optimizer.momentum is Muon's"),
        (["schedule.shape=cosine"], "schedule.decay has no effect with schedule.shape=cosine"),
        (["schedule.shape=constant", "schedule.decay=0.5", "schedule.final_learning_rate=1e-3"], "final_learning_rate"),
    ],
)
def test_what_has_no_effect_is_named(overrides: list[str], said: str) -> None:
    name, sound = SOUND
    (sentence,) = sentences(name, [*sound, *overrides])
    assert said in sentence


def test_many_passes_are_warned_of_unless_something_guards_against_them() -> None:
    assert "12.0 times" in sentences("tiny", [], passes=12.0)[0]
    assert sentences("tiny", ["regularization.dropout=0.1"], passes=12.0) == []
    assert sentences("tiny", ["evaluation.patience=2"], passes=12.0) == []


def test_the_documented_recipe_is_odd_in_two_ways() -> None:
    rises, slides = sentences("documented", [])
    assert "from 0.0001 to 0.0005" in rises and "sliding" in slides
