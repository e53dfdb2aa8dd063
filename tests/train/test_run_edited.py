"""Resumed runs whose `config.yaml` was edited: what may change between two parts of a run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm.core.errors import SlmError
from slm.train.recipe import Recipe
from slm.train.run import resume, train

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")


def edit(**values: Any) -> None:
    """Changes values of the run's recipe, as people do."""
    fields = yaml.safe_load((OUT / "config.yaml").read_text(encoding="utf-8"))
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            fields[section][key] = value
        else:
            fields[name] = value
    (OUT / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


def test_a_run_goes_on_with_its_updates_cut_into_other_micro_steps(small_recipe: MakeRecipe, rows: Rows) -> None:
    """What the advice on memory says: half the batch, twice the accumulation, twice the micro-steps."""
    done = train(small_recipe(), OUT)
    edit(batch__batch_size=2, batch__accumulation=4, schedule__micro_steps=32, schedule__warmup_micro_steps=4)
    more = resume(OUT)
    assert (done.updates, more.updates) == (6, 8)
    assert more.tokens == done.tokens * 8 // 6
    assert [row["updates"] for row in rows(OUT) if row["type"] == "train"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, "was saved with seed = 0, and config.yaml says 5"),
        ({"batch__batch_size": 8}, "batch.batch_size × accumulation = 8"),
        ({"data__sampler": "packed"}, "data.sampler = random"),
        ({"optimizer__name": "muon"}, "optimizer.name = adamw"),
        ({"model__hidden_size": 64}, "the saved weights are not those of this model"),
        ({"evaluation__context": 60, "evaluation__windows": 10**6}, None),
    ],
)
def test_what_a_run_cannot_change_on_its_way_is_refused(
    finished: Path, change: dict[str, Any], said: str | None
) -> None:
    before = (finished / "trainer" / "model.safetensors").read_bytes()
    edit(**change)
    if said is None:  # how it is measured may change
        assert resume(finished).updates == 6
        return
    with pytest.raises(SlmError, match=re.escape(said)):
        resume(finished)
    assert (finished / "trainer" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("first", "then"), [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_go_on_in_another_precision(small_recipe: MakeRecipe, first: str, then: str) -> None:
    train(small_recipe(machine={"precision": first}), OUT)
    edit(machine__precision=then, schedule__micro_steps=16)
    assert resume(OUT).updates == 8
