"""Runs that are killed, or find the disk full, at any moment: what was saved loads, and they end as if nothing had been.

`test_run_resumed.py` cuts runs where they agree to it, with Ctrl-C; here nobody is asked.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
import torch
import yaml
from torch import Tensor

from slm.core.nn import load_checkpoint
from slm.core.progress import Silent
from slm.train import run as module
from slm.train.evaluate import Evaluation
from slm.train.parallel import Alone
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from slm.train.state import Counters, load_state
from tests.forks import Forks
from tests.progress import Notes
from tests.waiting import wait_for

MakeRecipe = Callable[..., Recipe]
TIMES = ("elapsed_s", "tokens_s")
STOPPED_AT = 6
SECONDS = 100
# How a save in a fork ended.
WHOLE, CUT_SHORT, FAILED = range(3)
# Kills of the run that is killed again and again, and the seed of their moments.
KILLS, SEED = 6, 1

EVERY_UPDATE = {"checkpoints": {"every_updates": 1, "keep": 2}}
WEIGHTS = "model.safetensors"


def left_by(run: Path) -> dict[str, Any]:
    """Returns everything that a run leaves but times."""
    tensors = {
        f"{file.relative_to(run)}/{name}": tensor
        for file in sorted(run.glob("**/*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return tensors | {"rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether two runs left the same, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def check_what_is_there(run: Path) -> int:
    """Makes sure that what exists is whole; returns at which micro-step the run would go on."""
    for name in ("best", "last"):
        if (run / "checkpoint" / name).exists():
            load_checkpoint(run / "checkpoint" / name)
    saved = load_state(run)
    return saved.counters.micro_steps if saved else 0


class Injected(Exception):
    """Asked for by a test."""


# Everything that writing, linking and renaming go through.
POINTS = (
    (safetensors.numpy, "save_file"),
    (safetensors.torch, "save_file"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "write_text"),
    (Path, "chmod"),
    (Path, "hardlink_to"),
    (os, "link"),
    (os, "fsync"),
    (shutil, "rmtree"),
)


@contextmanager
def something_at(number: int, happen: Callable[[str], None]) -> Iterator[list[str]]:
    """Makes something happen in place of the numbered one of the operations in the block; lists those that came so far.

    A file that was to be written then is half there.
    """
    seen: list[str] = []
    patch = pytest.MonkeyPatch()

    def wrap(home: Any, name: str) -> None:
        original = getattr(home, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == number:
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half a file")
                happen(name)
            return original(*args, **kwargs)

        patch.setattr(home, name, counted)

    try:
        for home, name in POINTS:
            wrap(home, name)
        yield seen
    finally:
        patch.undo()


def disk_full(name: str) -> None:
    if name == "save_file":  # safetensors only quotes what the system said
        raise safetensors.SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
    if name == "hardlink_to" or name == "link":
        raise OSError(errno.EPERM, "no links here")  # which is no reason to fail
    if name == "rmtree":
        return  # removing is not what fails on a full disk
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def an_update_later(path: Path) -> tuple[Any, Counters]:
    """Opens a stopped run and makes one update."""
    opened = module._Run(path, Alone(), Silent())
    first = opened.counters.micro_steps
    opened.learner.update(first, lambda: None)
    opened.updated()
    return opened, opened.counters.model_copy(update={"micro_steps": first + opened.learner.accumulation})


def save(opened: Any, counters: Counters) -> None:
    """Saves as the loop does."""
    opened.save(counters, counters.micro_steps // opened.learner.accumulation)


@pytest.fixture(params=[(0.0, 7), pytest.param((0.9, 1), marks=pytest.mark.slow)], ids=["plain", "averaged"])
def how(request: pytest.FixtureRequest) -> tuple[float, int]:
    """Decay of a moving average, and after how many operations of a save the next one is tried.

    A save with an average has every operation of a plain save, and those of one more file.
    """
    found: tuple[float, int] = request.param
    return found


@pytest.fixture
def stopped(how: tuple[float, int], small_recipe: MakeRecipe, stopper: Any) -> Path:
    """A run that was stopped half way; the run in one piece lies beside it."""
    recipe = small_recipe(optimizer={"ema": how[0]}, **EVERY_UPDATE)
    train(recipe, Path("uncut"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Path("stopped"), stopper(STOPPED_AT))
    assert check_what_is_there(Path("stopped")) == STOPPED_AT - 2  # the update that was under way is not in it
    return Path("stopped")


def in_a_fork(work: Callable[[], int]) -> int:
    """Does work in a forked process and returns its exit code; what the work changes in memory is gone after it."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trials(stopped: Path, step: int, trial: Callable[[Any, Counters, int], int]) -> int:
    """Tries at operations of a save until there is none left; returns how many there were.

    The update before the save is made once. Each trial saves it in a fork, in a fresh copy of the stopped run.
    """
    number, work = 0, Path("work")
    shutil.copytree(stopped, work)
    opened, counters = an_update_later(work)
    while True:
        shutil.rmtree(work)
        shutil.copytree(stopped, work)
        code = in_a_fork(lambda number=number: trial(opened, counters, number))
        assert code in (WHOLE, CUT_SHORT), number
        then = check_what_is_there(work)
        assert then in (STOPPED_AT - 2, STOPPED_AT), number
        assert code == CUT_SHORT or then == STOPPED_AT
        # All of them load. To see that they also end alike takes longer.
        if number % 16 == 0 or code == WHOLE or list(work.rglob(".*.replaced-*")):
            resume(work)
            ends = [left_by(work), left_by(Path("uncut"))]
            for end in ends:
                end.pop("rows")  # the update was made without the loop, which writes them
            assert same(*ends), number
        if code == WHOLE:
            return number
        number += step


def test_a_full_disk_costs_nothing_that_was_saved(stopped: Path, how: tuple[float, int]) -> None:
    failures = Path("failures")

    def trial(opened: Any, counters: Counters, number: int) -> int:
        with something_at(number, disk_full) as seen:
            try:
                save(opened, counters)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        work = opened.path
        assert (work / "checkpoint/last").is_dir()
        assert not list(work.rglob(".*.partial-*"))
        if len(seen) <= number:
            return WHOLE
        with failures.open("a") as file:
            print(seen[number], file=file)
        # What was replaced stays until it is known that the new one is on the disk.
        assert not list(work.rglob(".*.replaced-*")) or seen[number] == "fsync"
        return CUT_SHORT

    assert trials(stopped, how[1], trial) > 20
    if how[1] == 1:
        assert {"save_file", "replace", "write_text", "mkdir", "fsync"} <= set(failures.read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("how", [(0.9, 1)], indirect=True)
def test_a_kill_costs_nothing_that_was_saved(stopped: Path, how: tuple[float, int]) -> None:
    def trial(opened: Any, counters: Counters, number: int) -> int:
        with something_at(number, lambda name: os._exit(CUT_SHORT)):
            save(opened, counters)
        return WHOLE

    assert trials(stopped, how[1], trial) > 20


@pytest.mark.parametrize("how", [(0.0, 7)], indirect=True)
def test_a_run_that_goes_on_from_an_altered_state_ends_otherwise(stopped: Path) -> None:
    file = stopped / "trainer/optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("/exp_avg"))
    tensors[name][0] += 1e-3
    safetensors.torch.save_file(tensors, file)
    resume(stopped)
    assert not same(left_by(stopped), left_by(Path("uncut")))


def test_a_run_that_is_stopped_while_its_average_is_measured(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(optimizer={"ema": 0.9})
    train(recipe, Path("uncut"))
    evaluate = module.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if Path("run/metrics.jsonl").read_text(encoding="utf-8").count('"train"') == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "evaluate", interrupted)
        train(recipe, Path("run"))
    assert check_what_is_there(Path("run")) == 4
    resume(Path("run"))
    assert same(left_by(Path("run")), left_by(Path("uncut")))


def edit(run: Path, **changes: Any) -> None:
    """Sets values of a run's `config.yaml`, their sections' names before them: `batch__context=3`."""
    fields = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        fields[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


@pytest.mark.parametrize("replacing", [False, True])
def test_a_best_checkpoint_newer_than_the_state_stays_until_there_is_a_better(
    small_recipe: MakeRecipe, stopper: Any, replacing: bool
) -> None:
    """As after a kill between an evaluation and a save, or within the evaluation's; the run then takes another way."""
    better = train(small_recipe(), Path("uncut"))
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), Path("run"), stopper(STOPPED_AT))
    best = Path("run/checkpoint/best")
    shutil.rmtree(best)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    at = best.with_name(f".best.replaced-{gone.stdout.strip()}") if replacing else best
    shutil.copytree(better.checkpoint, at)
    edit(Path("run"), schedule__learning_rate=1e-9, schedule__final_learning_rate=1e-9)
    result = resume(Path("run"))
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert min(row["loss"] for row in rows if row["type"] == "eval") > better.loss
    assert result.loss == better.loss
    assert (best / WEIGHTS).read_bytes() == (better.checkpoint / WEIGHTS).read_bytes()


def test_patience_counts_evaluations_though_micro_steps_have_another_size(
    small_recipe: MakeRecipe, stopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((5.0, 3.0, 4.0, 4.0, 4.0, 4.0))
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(evaluation={"patience": 1}), Path("run"), stopper(STOPPED_AT))
    edit(Path("run"), batch__batch_size=8, batch__accumulation=1, evaluation__every_micro_steps=1)
    assert resume(Path("run")).updates == 3  # the best was at 2, which were 4 micro-steps then


TRAINER = """
from pathlib import Path
from slm.train.recipe import load_recipe
from slm.train.run import resume, train
run = Path("run")
resume(run) if (run / "config.yaml").exists() else train(load_recipe(Path("recipe.yaml")), run)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(small_recipe: MakeRecipe, trainers: Forks, notes: Notes) -> None:
    length = {"schedule": {"micro_steps": 96}, "evaluation": {"every_micro_steps": 12}}
    recipe = small_recipe(**length, **EVERY_UPDATE)
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    train(recipe, Path("uncut"))
    dice, killed_writing, reached = random.Random(SEED), 0, 0
    run = Path("run")
    for kill in range(KILLS):
        started = trainers.start(TRAINER)
        rows = run / "metrics.jsonl"
        before = rows.stat().st_mtime_ns if rows.exists() else 0
        wait_for(
            lambda rows=rows, before=before: rows.exists() and rows.stat().st_mtime_ns > before, every=0.002
        )  # it trains
        for _ in range(dice.randrange(4)):
            last = saved_at(run)
            wait_for(lambda last=last: saved_at(run) not in (0, last), every=0.002)
        time.sleep(dice.uniform(0, 0.05))
        if kill % 2:
            wait_for(lambda: any(run.glob("**/.*.partial-*")), every=0.002)  # it writes
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait().returncode == -signal.SIGKILL, kill  # rather than at its end before it was killed
        killed_writing += any(run.glob("**/.*.partial-*"))
        copy = Path(f"copy-{kill}")
        shutil.copytree(run, copy)
        then = check_what_is_there(copy)
        assert then >= reached
        reached = then
    assert killed_writing >= KILLS // 4
    assert reached > 0
    resume(run, notes)
    assert any(line.startswith(f"going on after {reached:,} micro-steps") for line in notes.lines)
    assert same(left_by(run), left_by(Path("uncut")))


def saved_at(run: Path) -> int:
    """Returns when the state of a run was saved last, in nanoseconds; 0 before, and while it is replaced."""
    try:
        return (run / "trainer/state.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def unshare() -> list[str] | None:
    """Returns the command that gives a process mounts of its own, where that is allowed."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, timeout=SECONDS)
    except OSError:
        return None
    return command if probe.returncode == 0 else None


@pytest.mark.slow
def test_a_disk_that_is_full(small_recipe: MakeRecipe, stopper: Any) -> None:
    if (apart := unshare()) is None:
        pytest.skip("a small disk takes user namespaces, which this machine does not allow")
    recipe = small_recipe(**EVERY_UPDATE)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Path("stopped"), stopper(STOPPED_AT))
    size = sum(-(-file.stat().st_size // 4096) * 4 for file in Path("stopped").rglob("*") if file.is_file())
    Path("small").mkdir()
    # Room for the weights, but not for the optimizer's moments, which are twice as large.
    script = f"mount -t tmpfs -o size={size + 40 + weights_kib('stopped')}k none small && cp -a stopped small/run && "
    script += f"{sys.executable} -m slm train --resume --out small/run; code=$?; cp -a small/run after; exit $code"
    command = [*apart, "sh", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 1, ended.stderr
    *_, error, hint = ended.stderr.splitlines()
    assert error.startswith("error: no space left on the disk for ") and "small/run/" in error
    assert hint.startswith("hint: free disk space")
    assert "Traceback" not in ended.stderr
    assert check_what_is_there(Path("after")) >= STOPPED_AT - 2
    resume(Path("after"))
    train(recipe, Path("uncut"))
    assert same(left_by(Path("after")), left_by(Path("uncut")))


def weights_kib(run: str) -> int:
    return (Path(run) / "trainer" / WEIGHTS).stat().st_size >> 10
