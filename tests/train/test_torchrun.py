"""`slm train` under torchrun: one process speaks, all stop together, and what goes wrong is said once."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.train.parallel import Alone, check_even, joined, share_of
from slm.train.recipe import Recipe
from slm.train.run import train
from tests.forks import Forks, Started
from tests.progress import Stopper
from tests.waiting import wait_for

SECONDS = 250


@pytest.fixture
def recipe_file(small_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    recipe = small_recipe(evaluation={"prompts": ["Once upon"], "sample_tokens": 5})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Ended:
    """How torchrun ended, without what it reports itself."""

    code: int
    out: str
    err: list[str]


def ended_of(done: subprocess.CompletedProcess[str]) -> Ended:
    """Returns how torchrun ended; makes sure that it shows no traceback of ours."""
    own = re.split(r"^Traceback", done.stderr, maxsplit=1, flags=re.MULTILINE)
    assert "slm/" not in "".join(own[1:]), done.stderr  # the traceback is torchrun's
    return Ended(
        done.returncode, done.stdout, [line for line in own[0].splitlines() if not re.match(r"[WEI]\d{4} ", line)]
    )


def test_one_of_two_speaks_and_both_take_the_same_directory(recipe_file: Path) -> None:
    Path("runs/small").mkdir(parents=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "slm", "train", "--recipe", recipe_file, "--json"]
    ended = ended_of(subprocess.run(command, capture_output=True, text=True, timeout=SECONDS))
    assert ended.code == 0, ended.err
    (line,) = ended.out.splitlines()
    assert json.loads(line)["run"] == "runs/small-2"
    assert json.loads(line)["processes"] == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small", "small-2"]
    told = [line for line in ended.err if not line.startswith("sample: ")]  # which may well be the same again
    assert len(told) == len(set(told)), told
    ours = (
        "warning: the warm-up of 2 micro-steps is no longer than one update",
        "warning: the run reads",
    )  # of the recipe
    assert not any("warn" in line.lower() and not line.startswith(ours) for line in ended.err), ended.err


def test_one_process_under_torchrun_is_one_process(
    recipe_file: Path, slm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    ended = slm("train", "--recipe", recipe_file, "--set", "machine.parallel=fsdp", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["processes"] == 1


MISTAKES = (
    (["--set", "batch.batch_size=3"], "2 processes cannot share batches of 3 windows evenly"),
    (["--set", "machine.parallel=fsdp", "--set", "optimizer.name=muon"], "Muon needs whole matrices"),
    (["--set", "batch.size=3"], "the recipe has no value 'batch.size'"),
)
# Runs each of some commands in two processes, with the variables that torchrun sets, and prints their exit codes.
IN_TWO = """
import socket, torch
{}
for number, arguments in enumerate(json.loads(sys.argv[1])):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in "01":
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(f"said-{number}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
            torch.set_num_threads(1)  # as torchrun does
            sys.exit(main(arguments))
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""
InTwo = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def in_two(trainers: Forks) -> InTwo:
    """Runs commands in two processes, changed by a program; returns the exit codes and what both said of each command."""

    def run(commands: list[list[str]], patch: str = "") -> list[tuple[str, str]]:
        ended = trainers.start(IN_TWO.replace("{}", patch), json.dumps(commands)).wait(SECONDS)
        said = [
            "".join(Path(f"said-{number}-{rank}").read_text(encoding="utf-8") for rank in "01")
            for number in range(len(commands))
        ]
        return list(zip(ended.stdout.splitlines(), said, strict=True))

    return run


def test_a_mistake_is_said_once(recipe_file: Path, in_two: InTwo) -> None:
    ended = in_two([["train", "--recipe", str(recipe_file), *arguments] for arguments, _ in MISTAKES])
    for (codes, said), (_, message) in zip(ended, MISTAKES, strict=True):
        assert codes == "[1, 1]", message
        (error,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert message in error and "Traceback" not in said
    assert not Path("runs").exists()


def test_what_fails_in_one_process_alone_is_said_by_that_one(recipe_file: Path, in_two: InTwo) -> None:
    patch = """
from slm.train.learner import Learner
update = Learner.update
def failing(self, first, after):
    if first == 4 and os.environ["RANK"] == "1":
        raise MemoryError
    return update(self, first, after)
Learner.update = failing
"""
    ((codes, said),) = in_two([["train", "--recipe", str(recipe_file)]], patch)
    assert codes == "[1, 1]" and "Traceback" not in said
    assert [line for line in said.splitlines() if "error" in line] == ["error: out of memory at micro-step 5"]


def test_a_peer_that_never_comes_is_not_waited_for_for_ever(
    recipe_file: Path, trainers: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
from datetime import timedelta
from slm.train import parallel
parallel._TOGETHER = timedelta(seconds=2)
main(sys.argv[1:])
"""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    ended = trainers.start(script, "train", "--recipe", str(recipe_file)).wait(SECONDS)
    assert ended.returncode == 1
    assert "error: not all of the 2 processes came together within 0:00:02" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_variables_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SlmError, match=r"cannot join the other processes: .*RANK"), joined():
        pass


# `torchrun -m slm train`, whose processes are forks and not new interpreters. Each leaves its number in a file.
TORCHRUN = """
import signal
from pathlib import Path
from torch.distributed import run

def train(*arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not torchrun's own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = os.environ["RANK"]
    Path(f"pid-{rank}.new").write_text(str(os.getpid()))
    Path(f"pid-{rank}.new").rename(f"pid-{rank}")
    main(["train", *arguments])

configure = run.config_from_args
run.config_from_args = lambda args: (configure(args)[0], train, args.training_script_args)
options, arguments = sys.argv[1].split(), sys.argv[2:]
run.main(["--standalone", "--nproc-per-node", "2", *options, "--start-method", "fork", "-m", "slm", *arguments])
"""


class Endless:
    """A run in two processes that goes on until it is stopped.

    Attributes:
        ranks: The numbers of its processes.
    """

    def __init__(self, torchrun: Started) -> None:
        self.torchrun = torchrun
        metrics = Path("run/metrics.jsonl")
        wait_for(lambda: metrics.exists() and metrics.read_text(encoding="utf-8").count('"train"') > 2)
        self.ranks = [int(Path(f"pid-{rank}").read_text()) for rank in "01"]

    def end(self) -> Ended:
        """Waits until torchrun has ended."""
        return ended_of(self.torchrun.wait(SECONDS))


@pytest.fixture
def endless(recipe_file: Path, trainers: Forks) -> Iterator[Endless]:
    """A run that goes on until it is stopped, past its first updates."""
    lengths = ("--set", "schedule.micro_steps=100000", "--set", "evaluation.every_micro_steps=100000")
    started = trainers.start(TORCHRUN, "", "--recipe", str(recipe_file), "--out", "run", *lengths)
    run = Endless(started)
    yield run
    if not started.ended:
        for pid in (*run.ranks, started.pid):  # torchrun alone would leave them behind
            os.kill(pid, signal.SIGKILL)
        started.wait()


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_run_that_torchrun_is_told_to_stop_is_saved(
    endless: Endless, signum: int, said: str, slm: Callable[..., Any]
) -> None:
    os.kill(endless.ranks[0], signal.SIGUSR1)
    wait_for(lambda: Path("run/trainer/state.json").exists())
    asked_for = json.loads(Path("run/trainer/state.json").read_text(encoding="utf-8"))["micro_steps"]
    os.kill(endless.torchrun.pid, signum)
    ended = endless.end()
    assert ended.code != 0
    assert [line for line in ended.err if line.startswith("error")] == [f"error: {said}"]
    saved = json.loads(Path("run/trainer/state.json").read_text(encoding="utf-8"))["micro_steps"]
    assert saved >= asked_for > 0
    config = Path("run/config.yaml")
    config.write_text(
        config.read_text(encoding="utf-8").replace("micro_steps: 100000", f"micro_steps: {saved + 4}"), encoding="utf-8"
    )
    resumed = slm("train", "--resume", "--out", "run", "--json")  # test_parallel.py resumes with two processes
    assert json.loads(resumed.out)["micro_steps"] == saved + 4


def test_a_process_that_is_killed_takes_the_others_with_it(endless: Endless) -> None:
    os.kill(endless.ranks[1], signal.SIGKILL)
    ended = endless.end()
    assert ended.code != 0
    assert [line for line in ended.err if line.startswith("error")] == ["error: another of the processes is gone"]


def left_by(run: Path) -> dict[str, Any]:
    """Returns what a run leaves but times, and what depends on how often it was started."""
    weights = {str(file): file.read_bytes() for file in sorted(run.glob("**/*.safetensors"))}
    times = ("elapsed_s", "tokens_s")
    return {name.removeprefix(str(run)): content for name, content in weights.items()} | {
        "rows": [{key: value for key, value in row.items() if key not in times} for row in rows_of(run)]
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Returns the metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("out", [["--out", "runs/named"], []], ids=["named", "chosen"])
def test_torchrun_restarts_from_the_last_save_what_a_killed_process_ended(
    recipe_file: Path, trainers: Forks, in_two: InTwo, out: list[str]
) -> None:
    """And the run ends as one that nobody killed."""
    changes = (
        "schedule.micro_steps=24",
        "checkpoints.every_updates=2",
        "checkpoints.asynchronous=true",
        "optimizer.ema=0.9",
    )
    command = ["--recipe", str(recipe_file), *(f"--set={change}" for change in changes)]
    Path("runs/small").mkdir(parents=True)  # the restart must not choose another name once more
    run = Path(out[1] if out else "runs/small-2")
    started = trainers.start(SLOWLY + TORCHRUN, "--max-restarts 1", *command, *out)
    wait_for(lambda: any(run.glob("checkpoint/update-*")))
    first = int(Path("pid-1").read_text())
    os.kill(first, signal.SIGKILL)
    ended = started.wait(SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert int(Path("pid-1").read_text()) != first
    assert f"Resuming {run}, which this call of torchrun began." in ended.stderr
    going_on = re.search(r"going on after (\d+) micro-steps", ended.stderr)
    assert going_on is not None and 4 <= int(going_on[1]) < 24
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted({"small", run.name})
    ((codes, said),) = in_two([["train", *command, "--out", "uncut"]])
    assert codes == "[0, 0]", said
    assert left_by(run) == left_by(Path("uncut"))


# Leaves time to kill a process.
SLOWLY = """
import time
from slm.train.learner import Learner
update = Learner.update
Learner.update = lambda *arguments: (time.sleep(0.1), update(*arguments))[1]
"""


# Sums in another order; see test_parallel.py.
LOSS_TOLERANCE = 1e-5


@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_another_number_of_processes_continues_with_as_many_tokens(
    small_recipe: Callable[..., Recipe], whole_run: Path, trainers: Forks, count: int
) -> None:
    """As torchrun does where --nnodes is a range. Three processes share four windows as 2, 1 and 1; five take eight windows."""
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), Path("run"), Stopper(6))
    script = IN_TWO.replace("{}", "").replace('"WORLD_SIZE": "2"', f'"WORLD_SIZE": "{count}"')
    script = script.replace('in "01"', f"in {''.join(map(str, range(count)))!r}")
    ended = trainers.start(script, json.dumps([["train", "--resume", "--out", "run"]])).wait(SECONDS)
    said = Path("said-0-0").read_text(encoding="utf-8")
    assert ended.stdout.splitlines() == [str([0] * count)], said
    assert "unevenly" in said
    found, alone = (
        {row["updates"]: row for row in rows_of(run) if row["type"] == "train"} for run in (Path("run"), whole_run)
    )
    assert [(update, row["tokens"]) for update, row in found.items()] == [(n, n * 2 * 4 * 24) for n in range(1, 7)]
    for update, row in alone.items() if count == 3 else ():  # the same windows
        for figure in ("loss", "grad_norm"):
            assert found[update][figure] == pytest.approx(row[figure], rel=LOSS_TOLERANCE)


def test_a_new_run_must_share_its_windows_evenly() -> None:
    """The control: only a run that is there has no choice."""

    class Three(Alone):
        rank, size = 0, 3

    with pytest.raises(SlmError, match="3 processes cannot share batches of 4 windows evenly"):
        check_even(4, Three())
    assert [share_of(4, _Ranked(rank, 3)) for rank in range(3)] == [slice(0, 2), slice(2, 3), slice(3, 4)]


class _Ranked(Alone):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


# Both processes see damaged targets in the 17th update.
DAMAGE = """
from slm.train import build
batch = build._batch
def damaged(recipe, tokens, mine, rank, device, micro_step, length):
    inputs, targets = batch(recipe, tokens, mine, rank, device, micro_step, length)
    return (inputs, targets * 0 + 5) if micro_step in (32, 33) else (inputs, targets)
build._batch = damaged
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_rewind_together(recipe_file: Path, in_two: InTwo, parallel: str) -> None:
    changes = (
        "schedule.micro_steps=40",
        "schedule.learning_rate=0.01",
        "evaluation.every_micro_steps=20",
        "spikes.action=rewind",
        "spikes.window=8",
        "spikes.every_updates=5",
        "optimizer.ema=0.9",
        f"machine.parallel={parallel}",
    )
    command = ["train", "--recipe", str(recipe_file), *(f"--set={change}" for change in changes), "--out", "run"]
    ((codes, said),) = in_two([command], DAMAGE)
    assert codes == "[0, 0]", said
    assert said.count("went back to update 15") == 1
    rows = rows_of(Path("run"))
    assert [row["at_update"] for row in rows if row["type"] == "spike"] == [17]
    assert [row["updates"] for row in rows if row["type"] == "train"] == [*range(1, 21)]
