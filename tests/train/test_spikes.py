"""Loss spikes: what is a spike, skipping and rewinding, and that a run that is stopped at any point ends as one that is not."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slm.core.errors import SlmError
from slm.train.prepare import CONFIG
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from slm.train.spikes import SpikeGuard, SpikeState
from slm.train.state import REWIND, load_state
from tests.progress import Notes, Stopper
from tests.train.damage import damaged

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")
LONG = {"schedule": {"micro_steps": 48, "learning_rate": 1e-2}, "evaluation": {"every_micro_steps": 16}}
# The 17th update has two micro-steps, 32 and 33; both are damaged.
DAMAGED, SPIKE = (32, 33), 17
POINT = 5


def guarded(make: MakeRecipe, action: str, variant: str = "plain", **changes: Any) -> Recipe:
    spikes = {"action": action, "window": 8, "every_updates": POINT, **changes}
    return make(variant, spikes=spikes, **LONG)


# The statistic


def guard_after(losses: list[float], norms: list[float] | None = None, **changes: Any) -> SpikeGuard:
    settings: dict[str, Any] = {"action": "skip", "threshold": 8.0, "window": 16, "limit": 3, "advice": "", **changes}
    guard = SpikeGuard(**settings)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        guard.accept(loss, norm)
    return guard


def test_a_spike_is_far_above_the_median_of_the_updates_before() -> None:
    falling = [5.0 - 0.05 * i + 0.02 * (i % 2) for i in range(16)]
    guard = guard_after(falling)
    assert guard.judge(4.5, 1.0, overflow=False) is None
    assert guard.judge(0.1, 1e-9, overflow=False) is None  # far below is no spike
    spike = guard.judge(6.0, 1.0, overflow=False)
    assert spike is not None and spike.reason == "the loss is 6, usually 4.635"
    assert spike.usual_loss == pytest.approx(4.635)
    steep = guard.judge(4.5, 30.0, overflow=False)
    assert steep is not None and steep.reason == "the gradient's norm is 30, usually 1"
    assert guard_after(falling, threshold=40.0).judge(6.0, 1.0, overflow=False) is None


def test_spikes_do_not_raise_the_noise_by_which_they_are_judged() -> None:
    losses = [3.0 + 0.01 * (i % 3) for i in range(16)]
    losses[4] = losses[9] = 50.0
    spike = guard_after(losses).judge(4.0, 1.0, overflow=False)
    assert spike is not None


def test_too_few_updates_are_no_statistic_but_nan_is_always_a_spike() -> None:
    guard = guard_after([3.0] * 3)
    assert guard.judge(100.0, 100.0, overflow=False) is None
    spike = guard.judge(math.nan, 1.0, overflow=False)
    assert spike is not None and spike.reason == "the loss is nan"
    assert spike.fields() == {"loss": None, "grad_norm": 1.0, "usual_loss": None, "usual_grad_norm": None}
    assert guard.judge(3.0, math.inf, overflow=False) is not None
    assert guard.judge(3.0, math.inf, overflow=True) is None  # the loss scale handles it


def test_the_limit_counts_spikes_within_a_thousand_updates() -> None:
    guard = guard_after([3.0] * 16)
    spike = guard.judge(9.0, 1.0, overflow=False)
    assert spike is not None
    for update in (0, 400, 800, 1500, 2600):  # never more than three within a thousand
        guard.count(update, spike)
    guard.left_out = 100
    for update in (2700, 2701):
        guard.count(update, spike)
    with pytest.raises(
        SlmError, match=r"^update 2,703: the loss is 9, usually 3; this is spike 4 within 1,000 updates"
    ):
        guard.count(2702, spike)


def test_a_guard_that_is_restored_judges_alike() -> None:
    guard = guard_after([3.0, 3.1, 3.2, 3.1] * 4)
    guard.left_out = 7
    again = guard_after([])
    again.restore(SpikeState.model_validate_json(guard.state().model_dump_json()))
    assert again.state() == guard.state()
    assert again.judge(4.0, 1.0, overflow=False) == guard.judge(4.0, 1.0, overflow=False) is not None


# Runs


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_run_without_spikes_is_the_same_with_the_guard(
    small_recipe: MakeRecipe, fingerprint: Fingerprint, action: str
) -> None:
    train(small_recipe("everything", **LONG), OUT)
    train(guarded(small_recipe, action, "everything"), Path("guarded"))
    plain, kept = fingerprint(OUT), fingerprint(Path("guarded"))
    differing = {name for name in plain.keys() | kept.keys() if plain.get(name) != kept.get(name)}
    assert {
        name for name in differing if not name.endswith(("config.yaml", "slm.json"))
    } == set()  # they have the recipe


def kinds(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in found if row["type"] == kind]


def test_damaged_data_is_skipped(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows, notes: Notes
) -> None:
    damaged(monkeypatch, DAMAGED)
    train(small_recipe(**LONG), Path("unguarded"))
    train(guarded(small_recipe, "skip"), OUT, notes)
    (spike,) = kinds(rows(OUT), "spike")
    assert (spike["at_update"], spike["updates"], spike["action"]) == (SPIKE, SPIKE, "skip")
    assert spike["loss"] > spike["usual_loss"] + 0.3
    made = {row["updates"]: row["loss"] for row in kinds(rows(OUT), "train")}
    assert SPIKE not in made and len(made) == 23
    other = {row["updates"]: row["loss"] for row in kinds(rows(Path("unguarded")), "train")}
    assert all(made[i] == other[i] for i in range(1, SPIKE))
    assert made[SPIKE + 1] != other[SPIKE + 1]  # the damage is not in the weights
    (said,) = (line for line in notes.lines if line.startswith(f"spike at update {SPIKE}: "))
    assert "usually" in said and said.endswith("; the update was skipped")
    assert not (OUT / REWIND).exists()


def test_damaged_data_is_rewound_and_left_out(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows, notes: Notes
) -> None:
    drawn = damaged(monkeypatch, DAMAGED)
    train(guarded(small_recipe, "rewind"), OUT, notes)
    (spike,) = kinds(rows(OUT), "spike")
    # The last multiple of 5 before update 17 is 15; updates 16 and 17 are made of the data behind.
    assert (spike["at_update"], spike["updates"], spike["action"]) == (SPIKE, 15, "rewind")
    assert drawn == [*range(34), *range(34, 34 + 2 * 9)]
    assert [row["updates"] for row in kinds(rows(OUT), "train")] == [*range(1, 25)]
    order = [(row["type"], row["updates"]) for row in rows(OUT)]
    assert order.index(("spike", 15)) == order.index(("train", 15)) + 1
    state = load_state(OUT)
    assert state is not None and state.counters.spikes.left_out == 2 and state.counters.micro_steps == 48
    assert any("went back to update 15, and the data of the 2 updates since then is left out" in x for x in notes.lines)
    point = load_state(OUT, REWIND)
    assert point is not None and point.counters.micro_steps == 2 * 20


@pytest.mark.parametrize(
    ("action", "variant", "stops"),
    [
        ("rewind", "everything", (33, 39)),
        pytest.param("rewind", "rounded", (3, 25, 33, 39), marks=pytest.mark.slow),
        pytest.param("rewind", "float16", (3, 25, 33, 39), marks=pytest.mark.slow),
        pytest.param("skip", "everything", (25, 33, 39), marks=pytest.mark.slow),
        pytest.param("skip", "float16", (33, 39), marks=pytest.mark.slow),
    ],
)
def test_a_guarded_run_that_is_stopped_ends_as_one_that_is_not(
    small_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    fingerprint: Fingerprint,
    action: str,
    variant: str,
    stops: tuple[int, ...],
) -> None:
    damaged(monkeypatch, (*DAMAGED, 36, 37))
    recipe = guarded(small_recipe, action, variant)
    train(recipe, OUT)
    # Before the first rewind point, between a point and the spike, on the spike, and after the rewind.
    for stop in stops:
        path = Path(f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, path, Stopper(stop))
        resume(path)
        assert fingerprint(path) == fingerprint(OUT), stop
    assert len(kinds([json.loads(x) for x in (OUT / "metrics.jsonl").read_text().splitlines()], "spike")) >= 1


def changed(run: Path, **sections: dict[str, Any]) -> None:
    """Changes values of a run's config.yaml, as a user does before --resume."""
    fields = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    for name, values in sections.items():
        fields[name] |= values
    (run / CONFIG).write_text(yaml.safe_dump(fields), encoding="utf-8")


@pytest.mark.parametrize("before", ["none", "rewind"])
def test_rewinding_is_switched_on_when_a_run_is_resumed(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows, fingerprint: Fingerprint, before: str
) -> None:
    """Then there is no state to rewind to, or one of long before."""
    drawn = damaged(monkeypatch, DAMAGED)
    with pytest.raises(KeyboardInterrupt):
        train(guarded(small_recipe, before, every_updates=100), OUT, Stopper(19))  # after nine updates
    assert (OUT / REWIND).exists() == (before == "rewind")
    changed(OUT, spikes={"action": "none"})
    with pytest.raises(KeyboardInterrupt):
        resume(OUT, Stopper(6))
    changed(OUT, spikes={"action": "rewind", "every_updates": 10})
    shutil.copytree(OUT, "stopped")
    drawn.clear()
    resume(OUT)
    (spike,) = kinds(rows(OUT), "spike")
    assert (spike["at_update"], spike["updates"]) == (SPIKE, 11)  # where it was resumed
    assert drawn == [*range(22, 34), *range(34, 34 + 2 * 13)]
    with pytest.raises(KeyboardInterrupt):
        resume(Path("stopped"), Stopper(3))
    resume(Path("stopped"))
    assert fingerprint(Path("stopped")) == fingerprint(OUT)


def test_what_was_left_out_stays_left_out_when_rewinding_is_switched_off(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = damaged(monkeypatch, DAMAGED)
    with pytest.raises(KeyboardInterrupt):
        train(guarded(small_recipe, "rewind"), OUT, Stopper(39))  # micro-steps 0 to 33, and five behind them
    changed(OUT, spikes={"action": "none"})
    drawn.clear()
    resume(OUT)
    assert drawn == [*range(38, 34 + 2 * 9)]
    state = load_state(OUT)
    assert state is not None and state.counters.spikes.left_out == 2
    # When rewinding is switched on again, the updates of long before are no measure.
    assert state.counters.spikes.losses == [] == state.counters.spikes.norms


@pytest.mark.parametrize(
    "sections", [{"qat": {"precision": "int4", "start": 0.5}}, {"batch": {"first_context": 12, "context_warmup": 0.5}}]
)
def test_updates_before_the_task_changes_do_not_judge_those_after(
    small_recipe: MakeRecipe, sections: dict[str, dict[str, Any]]
) -> None:
    """Rounding and longer rows raise the loss, which is no spike: skipping such updates would never end."""
    spikes = {"action": "skip", "window": 64}
    train(small_recipe(spikes=spikes, **LONG, **sections), OUT)
    state = load_state(OUT)
    assert state is not None and len(state.counters.spikes.losses) == len(state.counters.spikes.norms) == 12


@pytest.mark.parametrize("when", ["before-saving", "after-saving"])
def test_a_run_that_dies_between_a_spike_and_the_end_of_its_rewind(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, fingerprint: Fingerprint, when: str
) -> None:
    damaged(monkeypatch, DAMAGED)
    recipe = guarded(small_recipe, "rewind", "everything")
    train(recipe, OUT)

    class Died(Exception):
        pass

    def die(*_: object) -> None:
        raise Died

    from slm.train import run as module
    from slm.train.metrics import Metrics

    with monkeypatch.context() as patch, pytest.raises(Died):
        if when == "before-saving":
            patch.setattr(module._Run, "rewind", die)
        else:
            patch.setattr(Metrics, "rewind", die)
        train(recipe, Path("died"))
    resume(Path("died"))
    assert fingerprint(Path("died")) == fingerprint(OUT)


def test_more_spikes_than_the_limit_stop_the_run(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(monkeypatch, range(32, 200))
    with pytest.raises(SlmError, match=r"this is spike 3 within 1,000 updates, and the limit is 2") as error:
        train(guarded(small_recipe, "rewind", limit=2), OUT)
    assert "spikes.limit" in (error.value.hint or "")
    state = load_state(OUT)
    assert state is not None and state.counters.micro_steps == 2 * 15  # what the last rewind saved


def test_a_loss_that_is_not_finite_is_skipped_where_spikes_are(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    from slm.train import learner

    calls = iter(range(1000))
    cross_entropy = learner.linear_cross_entropy

    def sometimes(*arguments: Any) -> torch.Tensor:
        loss = cross_entropy(*arguments)
        return loss * math.nan if loss.requires_grad and next(calls) == 3 else loss

    monkeypatch.setattr(learner, "linear_cross_entropy", sometimes)
    train(guarded(small_recipe, "skip"), OUT)
    (spike,) = kinds(rows(OUT), "spike")
    assert spike["at_update"] == 2 and spike["loss"] is None
    shutil.rmtree(OUT)
    calls = iter(range(1000))
    with pytest.raises(SlmError, match="the loss is nan"):
        train(small_recipe(**LONG), OUT)


def test_the_picture_and_slm_compare_show_spikes(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, slm: Callable[..., Any]
) -> None:
    from slm.train import metrics

    drawn: list[Any] = []
    draw_losses = metrics.draw_losses

    def draw(*arguments: Any, spikes: Any = (), **rest: Any) -> None:
        drawn.append([*arguments, spikes])
        draw_losses(*arguments, spikes=spikes, **rest)

    monkeypatch.setattr(metrics, "draw_losses", draw)
    damaged(monkeypatch, DAMAGED)
    train(guarded(small_recipe, "rewind"), OUT)
    assert [row["at_update"] for row in drawn[-1][-1][0]] == [SPIKE]
    train(guarded(small_recipe, "skip"), Path("runs/other"))
    ended = slm("compare", "small", "other", "--json")
    assert ended.code == 0, ended.err
    figures = {run["name"]: run["spikes"] for run in json.loads(ended.out)["runs"]}
    assert figures == {"small": "1 rewound", "other": "1 skipped"}
    table = slm("compare", "small", "other", "--out", "other.png")
    assert "loss spikes" in table.out and "1 rewound" in table.out


@pytest.mark.draws
def test_spikes_are_lines_in_the_picture(tmp_path: Path) -> None:
    from slm.train.metrics import draw_losses

    rows = [{"tokens": 10 * i, "updates": i, "loss": 5.0} for i in range(5)]
    spike = {"tokens": 20, "updates": 2, "action": "skip"}
    sizes = []
    for spikes in ([], [[spike]], [[{**spike, "action": "rewind"}]]):
        draw_losses([("", rows, rows)], tmp_path / "loss.png", spikes=spikes)
        sizes.append((tmp_path / "loss.png").read_bytes())
    assert len(set(sizes)) == 3
