"""`batch.batch_size: auto`: the largest micro-step within memory, for the same updates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slm.core.errors import SlmError
from slm.core.machine import Memory, memory
from slm.train import batching as module
from slm.train.batching import Place, fitted, fitted_by_estimate, regrouped, resized
from slm.train.memory import training_bytes
from slm.train.parallel import Alone
from slm.train.precision import CPU, FLOAT32
from slm.train.recipe import Recipe, load_recipe
from slm.train.run import resume, train
from tests.progress import Notes, Stopper

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")
_MIB = 1 << 20
# float32 sums in another order, over six updates.
ROUNDING = 2e-5


def auto(*overrides: str, name: str = "modern") -> Recipe:
    return load_recipe(name, ["batch.batch_size=auto", *overrides])


def needed(recipe: Recipe, processes: int = 1) -> int:
    return training_bytes(recipe, recipe.model.config(), FLOAT32, processes).total


def test_an_override_keeps_the_update_of_the_recipe_and_a_file_says_it_by_accumulation(tmp_path: Path) -> None:
    batch = auto().batch
    assert (batch.batch_size, batch.accumulation, batch.automatic) == (16, 4, True)
    assert auto("batch.accumulation=8").batch.accumulation == 8
    fields = yaml.safe_load(load_recipe("modern").to_yaml())
    fields["batch"] = {"batch_size": "auto", "context": 512, "accumulation": 64}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    batch = load_recipe(file).batch
    assert (batch.batch_size, batch.accumulation, batch.automatic) == (1, 64, True)
    assert load_recipe(file, ["batch.batch_size=auto"]).batch == batch
    assert load_recipe(file, ["batch.batch_size=16", "batch.accumulation=4"]).batch.automatic is False
    for other in ("atuo", "automatic", "4x"):
        with pytest.raises(SlmError, match=r'batch\.batch_size: must be a whole number or "auto"$'):
            load_recipe("modern", [f"batch.batch_size={other}"])


def test_micro_steps_of_another_size_are_the_same_updates() -> None:
    recipe = load_recipe("modern")  # 16 x 4 windows, 25,000 micro-steps
    larger = resized(recipe, 64)
    assert (larger.batch.batch_size, larger.batch.accumulation) == (64, 1)
    assert larger.updates == recipe.updates
    assert larger.schedule.warmup_micro_steps * 64 == recipe.schedule.warmup_micro_steps * 16
    assert larger.evaluation.every_micro_steps * 64 == recipe.evaluation.every_micro_steps * 16
    assert larger.course == recipe.course
    assert resized(resized(recipe, 2), 16).schedule == recipe.schedule


def test_a_length_in_passes_is_the_same_number_of_updates() -> None:
    recipe = load_recipe("modern", ["schedule.epochs=1"])  # 64 windows of 512 tokens an update
    for tokens, updates in ((64 * 512 * 99 + 20_000, 100), (64 * 512 * 99 + 10_000, 99)):
        assert {resized(recipe, size).for_tokens(tokens).updates for size in (1, 4, 16, 64)} == {updates}


@pytest.mark.parametrize("sampler", ["random", "packed", "best_fit"])
def test_an_update_has_the_same_windows_however_it_is_divided(
    small_recipe: MakeRecipe, rows: Rows, sampler: str
) -> None:
    recipe = small_recipe(data={"sampler": sampler}, batch={"batch_size": 4, "accumulation": 2, "first_context": 6})
    losses = {}
    for size in (2, 4, 8):
        run = Path(f"of-{size}")
        train(resized(recipe, size), run)
        losses[size] = [row["loss"] for row in rows(run) if row["type"] == "train"]
    assert losses[2] == pytest.approx(losses[4], rel=ROUNDING) == losses[8]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_largest_that_fits_by_the_estimate(processes: int) -> None:
    recipe = auto()
    sizes = {size: needed(resized(recipe, size), processes) for size in (2, 4, 8, 16, 32, 64)}
    assert sorted(sizes.values()) == list(sizes.values())
    for size in (4, 16, 64):
        place = Place(CPU, FLOAT32, int(sizes[size] / 0.9) + 1)
        assert fitted_by_estimate(recipe, place, processes).batch.batch_size == size
    assert fitted_by_estimate(recipe, Place(CPU, FLOAT32, None), processes).batch.batch_size == 64
    with pytest.raises(SlmError, match="not even one window per process fits") as error:
        fitted_by_estimate(recipe, Place(CPU, FLOAT32, 300 * _MIB), processes)
    assert error.value.hint


def test_every_process_gets_as_many_windows() -> None:
    place = Place(CPU, FLOAT32, None)
    assert fitted_by_estimate(auto("batch.accumulation=3"), place, 3).batch.batch_size == 48
    with pytest.raises(SlmError, match="5 processes cannot share updates of 64 windows evenly"):
        fitted_by_estimate(auto(), place, 5)
    assert regrouped(load_recipe("modern"), 5) == load_recipe("modern")
    assert regrouped(load_recipe("modern"), 20).batch.batch_size == 32
    with pytest.raises(SlmError, match="65 processes cannot share updates of 64 windows"):
        regrouped(load_recipe("modern"), 65)


def test_what_the_container_uses_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    found = memory(v2=tmp_path / "memory.max")
    assert (found.container_limit, found.container_used, found.free) == (1000, 600, 400)
    assert Memory(10_000, 300, 1000, 600).free == 300
    assert Memory(10_000, 5000, None).free == 5000
    assert Memory(None, None, None).free is None


def test_a_run_keeps_what_was_found_when_it_is_resumed(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, notes: Notes, rows: Rows
) -> None:
    batch = {"batch_size": 2, "accumulation": 4, "automatic": True}
    recipe = small_recipe(batch=batch, schedule={"micro_steps": 24, "warmup_micro_steps": 4})
    room = int(needed(resized(recipe, 4)) / 0.9) + 1
    assert room < needed(resized(recipe, 8)) / 0.9
    monkeypatch.setattr(module, "memory", lambda: Memory(room, room, None))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, OUT, Stopper(6))
    written = yaml.safe_load((OUT / "config.yaml").read_text(encoding="utf-8"))
    assert (written["batch"]["batch_size"], written["batch"]["accumulation"]) == (4, 2)
    assert (written["batch"]["automatic"], written["schedule"]["micro_steps"]) == (False, 12)
    monkeypatch.setattr(module, "memory", lambda: Memory(1, 1, None))  # it is not searched again
    resume(OUT, notes)
    train(small_recipe(evaluation={"every_micro_steps": 2}), Path("fixed"))  # 4 x 2 windows, as found
    text = (OUT / "config.yaml").read_text(encoding="utf-8")
    (OUT / "config.yaml").write_text(text.replace("batch_size: 4", "batch_size: auto"), encoding="utf-8")
    with pytest.raises(SlmError, match=r"batch\.batch_size=auto is for new runs"):
        resume(OUT)
    figures = [
        [(row["loss"], row["tokens"]) for row in rows(run) if row["type"] == "train"] for run in (OUT, Path("fixed"))
    ]
    assert figures[0] == figures[1]


def test_the_choice_is_reported(small_recipe: MakeRecipe, notes: Notes) -> None:
    recipe = small_recipe(batch={"batch_size": 2, "accumulation": 4, "automatic": True})
    chosen = fitted(recipe, torch.device("cpu"), Alone(), notes.note)
    assert chosen.batch.batch_size == 8
    assert notes.lines[0].startswith(
        "batch.batch_size=auto: 8 windows a micro-step, 1 micro-steps an update (by the estimate: about "
    )
    assert fitted(small_recipe(), torch.device("cpu"), Alone(), notes.note) == small_recipe()


def test_a_gpu_tries_updates_and_halves_when_they_do_not_fit(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, notes: Notes
) -> None:
    recipe = small_recipe(batch={"batch_size": 4, "accumulation": 4, "automatic": True}, optimizer={"ema": 0.9})
    here = torch.device("cuda")
    tried: list[int] = []
    attempt = module._try

    def limited(way: Recipe, config: Any, device: torch.device, precision: Any, rows: int) -> None:
        tried.append(rows)
        attempt(way, config, torch.device("cpu"), precision, rows)  # a real step, on the device that is there
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "_try", limited)
    monkeypatch.setattr(module, "place_of", lambda *_: Place(CPU, FLOAT32, 1 << 34))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    state = torch.random.get_rng_state()
    chosen = fitted(recipe, here, Alone(), notes.note)
    assert tried == [16, 8, 4]
    assert (chosen.batch.batch_size, chosen.batch.accumulation) == (4, 4)
    assert "tried" in notes.lines[-1]
    assert torch.equal(state, torch.random.get_rng_state())
    tried.clear()
    sharded = small_recipe(batch={"batch_size": 4, "accumulation": 4, "automatic": True}, machine={"parallel": "fsdp"})

    class Two(Alone):
        size = 2

        def total(self, values: Any) -> list[float]:
            return [max(values)] * 2

    fitted(sharded, here, Two(), notes.note)
    assert tried == []  # no process holds the whole model


def test_an_error_that_is_not_about_memory_is_raised(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module, "_try", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        module._runs(small_recipe(), torch.device("cpu"), Place(CPU, FLOAT32, None), 4)


def test_the_dry_run_shows_what_would_be_found(slm: Callable[..., Any], story_file: Path) -> None:
    ended = slm(
        "train", "--recipe", "modern", "--data", str(story_file), "--tokenizer", "bpe", "--set", "batch.batch_size=auto",
        "--dry-run", "--on", "t4", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    batch = found["recipe"]["batch"]
    assert batch["batch_size"] * batch["accumulation"] == 64 and not batch["automatic"]
    assert found["memory"]["total"] < 0.9 * found["memory_available"]
    assert batch["batch_size"] > 8
