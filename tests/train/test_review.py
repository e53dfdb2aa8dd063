"""Each contradiction is named, by the value that is wrong, and a recipe without any is left alone."""

import pytest

from slm.train.recipe import load_recipe
from slm.train.review import review

SOUND = ("stories-4m", ["schedule.micro_steps=2000"])


def sentences(name: str, overrides: list[str], passes: float | None = None, processes: int = 1) -> list[str]:
    return review(load_recipe(name, overrides), passes, processes)


def test_a_sound_recipe_is_left_alone() -> None:
    assert sentences(*SOUND, passes=3.0) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.final_learning_rate=0.02", "rises after the warm-up, from 0.01 to 0.02"),
        ("schedule.warmup_micro_steps=2000", "warm-up of 2,000 micro-steps is as long as the training of 2,000"),
        ("schedule.decay=0.99", "schedule.decay begins before the warm-up ends"),
        ("batch.accumulation=100", "no longer than one update of 100"),
        ("batch.accumulation=128", "no longer than one update of 128"),
        ("batch.context=128", "sliding attention never differs from full attention"),
        ("model.num_hidden_layers=5", "none of the 5 layers is global"),
        ("evaluation.every_micro_steps=2001", "longer than the run"),
        ("evaluation.patience=20", "never stops early"),
        ("schedule.start=1", "schedule.warmup_micro_steps has no effect with schedule.start=1"),
        ("checkpoints.keep=5", "checkpoints.keep has no effect without checkpoints.every_updates"),
        ("evaluation.prompts=[]", "evaluation.sample_tokens has no effect without evaluation.prompts"),
        ("machine.parallel=fsdp", "machine.parallel has no effect in one process"),
    ],
)
def test_a_contradiction_is_named(override: str, said: str) -> None:
    name, sound = SOUND
    (sentence,) = sentences(name, [*sound, override])
    assert said in sentence


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optimizer.name=adamw", "optimizer.momentum=0.9"],
            "optimizer.momentum has no effect with optimizer.name=adamw",
        ),
        (["schedule.shape=cosine"], "schedule.decay has no effect with schedule.shape=cosine"),
        (["schedule.shape=constant", "schedule.decay=0.5", "schedule.final_learning_rate=1e-3"], "final_learning_rate"),
        (["schedule.warmup_micro_steps=0", "schedule.start=0.5"], "schedule.start has no effect without"),
        (["optimizer.weight_decay=0", "optimizer.decay=all"], "optimizer.decay has no effect with"),
        (["optimizer.weight_decay=0", "optimizer.cautious=true"], "optimizer.cautious has no effect with"),
        (["optimizer.weight_decay=0", "optimizer.decay_shape=linear"], "optimizer.decay_shape has no effect with"),
        (
            ["optimizer.name=adamw", "optimizer.momentum=0.95", "optimizer.momentum_warmup=0.2"],
            "optimizer.momentum_warmup has no effect with optimizer.name=adamw",
        ),
        (["optimizer.momentum_start=0.5"], "optimizer.momentum_start has no effect without"),
        (
            ["optimizer.name=muon", "optimizer.row_beta=0.5"],
            "optimizer.row_beta has no effect without optimizer.name=normuon",
        ),
        (["batch.context_warmup=0.5"], "batch.context_warmup has no effect without batch.first_context"),
    ],
)
def test_what_has_no_effect_is_named(overrides: list[str], said: str) -> None:
    name, sound = SOUND
    (sentence,) = sentences(name, [*sound, *overrides])
    assert said in sentence


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (["checkpoints.keep=5", "checkpoints.every_updates=10"], 1),
        (["evaluation.prompts=[]", "evaluation.sample_tokens=60"], 1),
        (["machine.parallel=fsdp"], 2),
        (["schedule.start=0.5"], 1),
        (["optimizer.decay=all"], 1),
        (["optimizer.cautious=true", "optimizer.decay_shape=linear"], 1),
        (["optimizer.name=normuon", "optimizer.row_beta=0.5"], 1),
        (["optimizer.name=muon", "optimizer.momentum_start=0.5", "optimizer.momentum_warmup=0.2"], 1),
        (["batch.accumulation=99"], 1),
    ],
)
def test_what_has_an_effect_is_not(overrides: list[str], processes: int) -> None:
    """The control of the tests above."""
    name, sound = SOUND
    assert sentences(name, [*sound, *overrides], processes=processes) == []


def test_many_passes_are_warned_of_unless_something_guards_against_them() -> None:
    assert "17.0 times" in sentences("tiny", [], passes=17.0)[0]
    assert sentences("tiny", [], passes=15.0) == []
    assert sentences("tiny", ["regularization.dropout=0.1"], passes=17.0) == []
    assert sentences("tiny", ["evaluation.patience=2"], passes=17.0) == []


def test_the_documented_recipe_is_odd_in_two_ways() -> None:
    rises, slides = sentences("documented", [])
    assert "from 0.0001 to 0.0005" in rises and "sliding" in slides


def test_text_that_is_read_in_part_is_named_with_what_reads_all_of_it() -> None:
    recipe = load_recipe("tiny")
    (said,) = review(recipe, 0.25, 1, 9_000_000)
    assert said.startswith(
        "the run reads 2.2 of 9.0 MB of the training text: --set schedule.epochs=1 reads all of it once"
    )
    assert "in about 2,240 updates instead of 560" in said and "--recipe stories-4m" in said
    # What is named does read it.
    tokens = round(recipe.updates * recipe.tokens_per_micro_step / 0.25)
    for name, overrides in (("tiny", ["schedule.epochs=1"]), ("stories-4m", [])):
        whole = load_recipe(name, overrides).for_tokens(tokens)
        assert whole.micro_steps * whole.tokens_per_micro_step >= 0.99 * tokens
    assert "25%" in review(recipe, 0.25)[0]
    assert review(recipe, 1.0, 1, 9_000_000) == [] == review(recipe, None)
