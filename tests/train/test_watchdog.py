"""The watchdog: a run that becomes slow, one that hangs, likely causes, and the end of a process that hangs."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from slm.core.load import Load, causes
from slm.train import watchdog as module
from slm.train.learner import Learner
from slm.train.recipe import Recipe
from slm.train.run import train
from slm.train.sections import WatchdogRecipe
from slm.train.watchdog import HUNG, Watchdog
from tests.forks import Forks
from tests.progress import Notes
from tests.waiting import wait_for

MakeRecipe = Callable[..., Recipe]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")
CALM = Load(0.0, 0.5, 0, 1.0, 0, 0.0, 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the watchdog sees."""
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(module.Load, "now", classmethod(lambda _: CALM))
    return seconds


def watch(clock: list[float], speeds: list[float], data_share: float = 0.01, **settings: Any) -> list[tuple[Any, ...]]:
    """Returns what is reported of updates of a second each."""
    reports: list[tuple[Any, ...]] = []
    watchdog = Watchdog(
        WatchdogRecipe(slow_minutes=1.0, **settings), lambda *report: reports.append((*report, clock[0]))
    )
    for speed in speeds:
        clock[0] += 1.0
        watchdog.updated(speed, 1.0, data_share if speed < 100 else 0.01)
    return reports


def test_a_slow_run_is_reported_once_until_it_recovers(clock: list[float]) -> None:
    speeds = [100.0] * 200 + [30.0] * 300 + [100.0] * 100 + [30.0] * 100
    first, second = watch(clock, speeds)
    kind, told, numbers, at = first
    assert kind == "slow" and 200 + 30 < at < 200 + 60  # most of the minute has to be slow
    assert told.endswith("likely: no cause was found on this machine: the time is in computing")
    assert (numbers["usual_tokens_s"], numbers["tokens_s"] < 50) == (100.0, True)
    assert second[-1] > 600


def test_a_run_that_is_as_fast_as_usual_is_not_reported(clock: list[float]) -> None:
    assert watch(clock, [100.0, 80.0, 120.0] * 200) == []
    assert watch(clock, [100.0] * 200 + [30.0] * 20 + [100.0] * 100) == []  # a few slow updates, such as a save
    assert watch(clock, [20.0] * 3 + [100.0] * 300) == []  # the first updates allocate
    assert watch(clock, [100.0] * 200 + [60.0] * 200) == []
    assert len(watch(clock, [100.0] * 200 + [60.0] * 200, slow_share=0.8)) == 1


def test_slow_minutes_switch_it_off(clock: list[float]) -> None:
    reports: list[Any] = []
    off = Watchdog(WatchdogRecipe(slow_minutes=None), lambda *report: reports.append(report))
    for speed in [100.0] * 200 + [1.0] * 200:
        clock[0] += 1.0
        off.updated(speed, 1.0, 0.0)
    assert reports == []


def test_waiting_for_data_is_named(clock: list[float]) -> None:
    ((_, told, numbers, _),) = watch(clock, [100.0] * 200 + [30.0] * 200, data_share=0.9)
    assert "a slow disk or network" in told
    assert numbers["data_share"] > 0.5 > numbers["usual_data_share"]


@pytest.mark.parametrize(
    ("now", "cause"),
    [
        ({"average": 9.0}, "other programs compete for the processor: the load average is 9.0 on 2 cores"),
        ({"swapped": 512 << 20}, "memory is short: 512 MiB were swapped"),
        ({"heat": 3}, "the processor lowered its clock because of heat 3 times"),
        ({"clock": 0.4}, "the processor runs at 40% of its highest clock"),
        ({"waited_s": 30.0}, "the container's CPU quota stopped its processes for 30 s"),
        ({"stolen_s": 60.0}, "the host gave 60 s of processor time to other virtual machines"),
    ],
)
def test_causes(now: Mapping[str, Any], cause: str) -> None:
    later = {name: getattr(CALM, name) for name in Load.__dataclass_fields__} | {"at": 60.0}
    assert causes(CALM, Load(**{**later, **now}), cores=2) == [cause]
    assert causes(CALM, Load(**later), cores=2) == []
    nothing = Load(60.0, None, None, None, None, None, None)
    assert causes(CALM, nothing, cores=2) == []


def test_the_load_of_this_machine() -> None:
    now = Load.now()
    assert now.at > 0
    assert now.average is None or now.average >= 0
    assert now.clock is None or 0 < now.clock < 10


def test_a_hang_is_reported_once_with_its_place_and_recorded(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows: Rows, notes: Notes
) -> None:
    update, hung = Learner.update, []

    def hanging(self: Learner, first: int, after: Any) -> Any:
        if first == 8 and not hung:
            hung.append(first)
            wait_for(lambda: any("warning" in line and "has ended" in line for line in notes.lines))
            time.sleep(0.4)  # time for another report
        return update(self, first, after)

    monkeypatch.setattr(Learner, "update", hanging)
    train(small_recipe(watchdog={"hang_minutes": 0.3 / 60}, evaluation={"every_micro_steps": 100}), OUT, notes)
    found = [row for row in rows(OUT) if row["type"] == "hang" and row["updates"] == 4]
    assert len(found) == 1 and found[0]["seconds"] >= 0.3
    assert any("it is in" in line and "line" in line for line in notes.lines)
    assert [row["updates"] for row in rows(OUT) if row["type"] == "train"] == [1, 2, 3, 4, 5, 6]


HANGING = """
import time
from slm.train.learner import Learner
update = Learner.update
def hanging(self, first, after):
    while first == 4:
        time.sleep(0.01)
    return update(self, first, after)
Learner.update = hanging
main(sys.argv[1:])
"""


@pytest.mark.parametrize("abort", [True, False])
def test_a_process_that_hangs_ends_with_its_stacks_on_request(
    small_recipe: MakeRecipe, trainers: Forks, abort: bool
) -> None:
    recipe = small_recipe(
        watchdog={"hang_minutes": 1.0 / 60, "abort": abort}, checkpoints={"every_updates": 1}, evaluation={"windows": 1}
    )
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    started = trainers.start(HANGING, "train", "--recipe", "recipe.yaml", "--out", "run")
    wait_for(lambda: "has ended for" in started.err)
    if abort:
        ended = started.wait(60)
        assert ended.returncode == HUNG
        assert "watchdog.abort: the stacks of this process, which ends now:" in ended.stderr
        assert "in hanging" in ended.stderr and "most recent call first" in ended.stderr
    else:
        time.sleep(0.5)
        assert started.running
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        assert "most recent call first" not in started.err
    saved = json.loads(Path("run/trainer/state.json").read_text(encoding="utf-8"))
    assert saved["micro_steps"] == 4


def test_a_process_that_was_stopped_as_a_whole_does_not_hang(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-Z, or with the machine's suspension: its thread was stopped too."""
    reports: list[Any] = []
    watchdog = Watchdog(WatchdogRecipe(hang_minutes=1.0), lambda *report: reports.append(report))
    jumps = iter([2.0, 400.0, 3.0, 3.0])

    def wait(_: float) -> bool:
        jump = next(jumps, None)
        clock[0] += jump or 0.0
        return jump is None

    monkeypatch.setattr(watchdog._ended, "wait", wait)
    watchdog.beat()
    watchdog._watch()
    assert reports == []
    jumps = iter([6.0] * 12)  # the control
    watchdog._watch()
    assert len(reports) == 1


def test_abort_needs_a_limit() -> None:
    with pytest.raises(ValueError, match=r"watchdog.abort needs watchdog.hang_minutes"):
        WatchdogRecipe(abort=True, hang_minutes=None)
