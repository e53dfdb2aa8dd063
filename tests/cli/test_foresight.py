"""`slm train --dry-run`: the recipe as it would run, what it takes, what is odd; and nothing is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm.train.recipe import Recipe, load_recipe

Slm = Callable[..., Any]


def test_it_prints_a_recipe_that_can_be_run_and_makes_nothing(slm: Slm) -> None:
    result = slm("train", "--recipe", "tiny", "--dry-run", "--set", "schedule.warmup_micro_steps=600", "--on", "t4")
    assert result.code == 0, result.err
    shown = result.out[: result.out.index("what it would take")]
    wanted = load_recipe("tiny", ["schedule.warmup_micro_steps=600"])
    assert Recipe.model_validate(yaml.safe_load(shown)) == wanted
    for part in ("1,511,296 parameters", "560 updates of 1,024 tokens", "573,440", "T4", "MiB", "not run on that"):
        assert part in result.out
    assert "warning: the warm-up of 600 micro-steps is as long as the training of 560" in result.err
    assert not Path("runs").exists()


def test_for_machines(slm: Slm) -> None:
    result = slm("train", "--recipe", "documented", "--dry-run", "--on", "T4", "--json")
    fields = json.loads(result.out)
    assert fields["updates"] == 4687 and fields["device"] == "T4"
    assert fields["memory"]["total"] == sum(size for part, size in fields["memory"].items() if part != "total")
    assert len(fields["warnings"]) == 2
    assert Recipe.model_validate(fields["recipe"]) == load_recipe("documented")


def test_passes_become_updates_when_the_text_is_prepared(slm: Slm, stories: list[str]) -> None:
    Path("text.txt").write_text("\n<|endoftext|>\n".join(stories[:80]), encoding="utf-8")
    prepared = slm("data", "prepare", "--data", "text.txt", "--vocab-size", "300", "--out", "prepared", "--json")
    assert prepared.code == 0, prepared.err
    recipe = ("train", "--recipe", "stories-4m", "--dry-run", "--on", "t4", "--json", "--set", "batch.batch_size=2")
    fields = json.loads(slm(*recipe, "--data", "prepared").out)
    assert fields["micro_steps"] == round(4 * fields["text_tokens"] / 512)
    guessed = json.loads(slm(*recipe, "--data", "text.txt").out)
    assert guessed["text_tokens"] != fields["text_tokens"]  # by its size


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "tiny", "--dry-run", "--on", "t5"], 1, "error: slm has no figures for a t5"),
        (["--recipe", "tiny", "--on", "t4"], 2, "error: --on goes with --dry-run"),
        (["--resume", "--dry-run"], 2, "leave out --dry-run"),
        (["--recipe", "stories-4m", "--dry-run"], 1, "error: schedule.epochs cannot be turned into updates"),
    ],
)
def test_mistakes(slm: Slm, arguments: list[str], code: int, message: str) -> None:
    result = slm("train", *arguments)
    assert (result.code, message in result.err) == (code, True), result.err
