"""The watchdog: a run that becomes slow, one that hangs, likely causes, and the end of a process that hangs."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slm.core.load import Load, causes
from slm.train import watchdog as module
from slm.train.learner import Learner
from slm.train.recipe import Recipe
from slm.train.run import _Run, train
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


def watch(
    clock: list[float],
    speeds: list[float],
    data_share: float = 0.01,
    seconds: float = 1.0,
    phase: Callable[[int], object] = lambda _: None,
    **settings: Any,
) -> list[tuple[Any, ...]]:
    """Returns what is reported of updates of so many seconds each."""
    reports: list[tuple[Any, ...]] = []
    watchdog = Watchdog(
        WatchdogRecipe(slow_minutes=1.0, **settings), lambda *report: reports.append((*report, clock[0]))
    )
    for number, speed in enumerate(speeds):
        clock[0] += seconds
        wait_s = (data_share if speed < 100 else 0.01) * seconds
        watchdog.updated(speed * seconds, seconds, wait_s, phase(number))
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


def test_short_updates_are_compared_with_those_before_the_slow_time(clock: list[float]) -> None:
    """Not with the last thousand updates, which are all slow when the time is over."""
    ((_, _, numbers, at),) = watch(clock, [100.0] * 10_000 + [30.0] * 15_000, seconds=0.02)
    assert 200 + 30 < at < 200 + 75
    assert numbers["usual_tokens_s"] == pytest.approx(100.0)


def test_one_long_update_does_not_make_a_run_slow(clock: list[float]) -> None:
    """As one in which the process was stopped, or after an evaluation that took longer than the time that counts."""
    reports: list[Any] = []
    watchdog = Watchdog(WatchdogRecipe(slow_minutes=1.0), lambda *report: reports.append(report))
    for seconds in [1.0] * 200 + [3600.0] + [1.0] * 200:
        clock[0] += seconds
        watchdog.updated(100.0, seconds, 0.0)
    clock[0] += 600.0
    for seconds in [3.0] * 5 + [1.0] * 200:
        clock[0] += seconds
        watchdog.updated(100.0, seconds, 0.0)
    assert reports == []
    for _ in range(100):  # the control
        watchdog.updated(100.0, 3.0, 0.0)
    assert len(reports) == 1


def test_longer_rows_are_no_slow_run(clock: list[float]) -> None:
    speeds = [100.0] * 200 + [30.0] * 300
    assert watch(clock, speeds, phase=lambda number: number >= 200) == []
    assert len(watch(clock, speeds + [10.0] * 200, phase=lambda number: number >= 200)) == 1


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


def test_the_run_goes_on_after_each_part_of_an_evaluation_and_each_save(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **settings: Any) -> Any:
            result = method(*arguments, **settings)
            done.append(name)
            return result

        return noted

    for name in ("evaluate", "samples", "keep_best", "save"):
        monkeypatch.setattr(_Run, name, noting(name, getattr(_Run, name)))
    monkeypatch.setattr(Watchdog, "beat", noting("beat", Watchdog.beat))
    train(small_recipe(spikes={"action": "rewind", "every_updates": 3}), OUT)
    following = {(a, b) for a, b in pairwise(done) if a != "beat"}
    assert following == {(name, "beat") for name in ("evaluate", "samples", "keep_best", "save")}


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


Step = float | Callable[[], None]


def look(clock: list[float], watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    """Lets the thread look after each of the steps: seconds that pass, or a function."""
    left = iter(steps)

    def wait(_: float) -> bool:
        for step in left:
            if not callable(step):
                clock[0] += step
                return False
            step()
        return True

    monkeypatch.setattr(watchdog._ended, "wait", wait)
    watchdog._watch()


SAVING = """
from slm.train import keep
save_state = keep.save_state
def slow(run, counters, *rest):
    if counters.micro_steps == 4:
        time.sleep(1.5)  # until after the warning
    save_state(run, counters, *rest)
keep.save_state = slow
"""


def test_a_save_in_the_background_is_completed_before_a_process_is_ended(
    small_recipe: MakeRecipe, trainers: Forks
) -> None:
    recipe = small_recipe(
        watchdog={"hang_minutes": 1.0 / 60, "abort": True},
        checkpoints={"every_updates": 1, "asynchronous": True},
        evaluation={"windows": 1},
    )
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    program = HANGING.replace("main(sys.argv[1:])", f"{SAVING}main(sys.argv[1:])")
    assert trainers(program, "train", "--recipe", "recipe.yaml", "--out", "run").returncode == HUNG
    saved = json.loads(Path("run/trainer/state.json").read_text(encoding="utf-8"))
    assert saved["micro_steps"] == 4


def test_a_process_that_was_stopped_as_a_whole_does_not_hang(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-Z, or with the machine's suspension: its thread was stopped too."""
    reports: list[Any] = []
    watchdog = Watchdog(WatchdogRecipe(hang_minutes=1.0), lambda *report: reports.append(report))
    watchdog.beat()
    look(clock, watchdog, monkeypatch, 2.0, 400.0, 3.0, 3.0)
    assert reports == []
    hang = [6.0] * 12
    watchdog.beat()
    look(clock, watchdog, monkeypatch, *hang)  # the control
    assert len(reports) == 1
    # A hang that was reported is not reported again after a stop, and one that begins after a stop is reported in time.
    watchdog.beat()
    look(clock, watchdog, monkeypatch, *hang, 4000.0, *hang)
    assert len(reports) == 2
    watchdog.beat()
    look(clock, watchdog, monkeypatch, 4000.0, watchdog.beat, *hang)
    assert len(reports) == 3 and 60 < reports[-1][2]["seconds"] < 70


def test_a_run_that_goes_on_before_the_warning_does_not_hang(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Any] = []
    ends: list[int] = []
    watchdog = Watchdog(WatchdogRecipe(hang_minutes=1.0, abort=True), lambda *report: reports.append(report))
    monkeypatch.setattr(module.os, "_exit", ends.append)
    monkeypatch.setattr(module.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)

    def goes_on(*_: object) -> list[str]:
        clock[0] += 0.1
        watchdog.beat()
        return []

    with monkeypatch.context() as patch:
        patch.setattr(module, "causes", goes_on)
        look(clock, watchdog, monkeypatch, *[6.0] * 12)
    assert (reports, ends) == ([], [])
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "_report", goes_on)  # while the warning is written
        look(clock, watchdog, monkeypatch, *[6.0] * 12)
    assert ends == []
    look(clock, watchdog, monkeypatch, *[6.0] * 12)  # the control
    assert (len(reports), ends) == (1, [HUNG])


def test_a_warning_that_cannot_be_written_does_not_end_the_watch(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise C would end the process, which `abort` arms and the thread puts off."""
    reports: list[Any] = []

    def full(*report: Any) -> None:
        reports.append(report)
        raise OSError("no space left on device")

    watchdog = Watchdog(WatchdogRecipe(hang_minutes=1.0), full)
    hang = [6.0] * 12
    look(clock, watchdog, monkeypatch, *hang, watchdog.beat, *hang)
    assert len(reports) == 2


def test_a_warning_that_hangs_does_not_keep_the_run_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()

    def hangs(*_: object) -> None:
        begun.set()
        release.wait(60)

    monkeypatch.setattr(module, "_JOIN_S", 0.05)
    watchdog = Watchdog(WatchdogRecipe(hang_minutes=0.05 / 60), hangs)
    with watchdog:
        assert begun.wait(60)
    assert not release.is_set()
    release.set()
    assert watchdog._thread is not None
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


def test_compilation_is_named(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = []
    watchdog = Watchdog(WatchdogRecipe(hang_minutes=1.0), lambda *report: reports.append(report))
    compiler = compile("run()", "torch/_dynamo/convert_frame.py", "exec")
    exec(compiler, {"run": lambda: look(clock, watchdog, monkeypatch, *[6.0] * 12)})
    watchdog.beat()
    look(clock, watchdog, monkeypatch, *[6.0] * 12)
    assert ["torch.compile" in told for _, told, _ in reports] == [True, False]


def test_abort_needs_a_limit() -> None:
    with pytest.raises(ValueError, match=r"watchdog.abort needs watchdog.hang_minutes"):
        WatchdogRecipe(abort=True, hang_minutes=None)
