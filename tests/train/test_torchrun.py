"""`slm train` under torchrun: one process speaks, all stop together, and what goes wrong is said once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.train.parallel import joined
from slm.train.recipe import Recipe

Start = Callable[..., subprocess.Popen[str]]
EndOf = Callable[[subprocess.Popen[str]], Any]

SECONDS = 100


@pytest.fixture
def recipe_file(small_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    recipe = small_recipe(evaluation={"prompts": ["Once upon"], "sample_tokens": 5})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    return file


@pytest.fixture
def slm_train(torchrun: Start) -> Start:
    """Starts `slm train` in so many processes."""
    return lambda processes, *arguments: torchrun(processes, "-m", "slm", "train", *arguments)


def test_one_of_two_speaks_and_both_take_the_same_directory(recipe_file: Path, slm_train: Start, end_of: EndOf) -> None:
    Path("runs/small").mkdir(parents=True)
    ended = end_of(slm_train(2, "--recipe", recipe_file, "--json"))
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
# Runs each of some commands in two processes, with the variables that torchrun sets, and prints their exit codes. It imports
# PyTorch once, which torchrun would do three times for each command.
IN_TWO = """
import json, os, socket, sys
import slm.train.run
from slm.cli.main import main
{}
for number, arguments in enumerate(json.loads(sys.argv[1])):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in "01":
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            os.dup2(os.open(f"said-{number}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
            main(arguments)
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


def in_two(commands: list[list[str]], patch: str = "") -> list[tuple[str, str]]:
    """Runs commands in two processes, changed by a program; returns the exit codes and what both said of each command."""
    program = [sys.executable, "-c", IN_TWO.replace("{}", patch), json.dumps(commands)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, check=True)
    said = [
        "".join(Path(f"said-{number}-{rank}").read_text(encoding="utf-8") for rank in "01")
        for number in range(len(commands))
    ]
    return list(zip(ended.stdout.splitlines(), said, strict=True))


def test_a_mistake_is_said_once(recipe_file: Path) -> None:
    ended = in_two([["train", "--recipe", str(recipe_file), *arguments] for arguments, _ in MISTAKES])
    for (codes, said), (_, message) in zip(ended, MISTAKES, strict=True):
        assert codes == "[1, 1]", message
        (error,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert message in error and "Traceback" not in said
    assert not Path("runs").exists()


@pytest.mark.slow
def test_what_fails_in_one_process_alone_is_said_by_that_one(recipe_file: Path) -> None:
    patch = """
import torch._dynamo, torch.nn.parallel  # which both would import
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


@pytest.mark.slow
def test_a_peer_that_never_comes_is_not_waited_for_for_ever(recipe_file: Path) -> None:
    script = """
import sys
from datetime import timedelta
from slm.cli.main import main
from slm.train import parallel
parallel._TOGETHER = timedelta(seconds=2)
main(sys.argv[1:])
"""
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", script, "train", "--recipe", recipe_file],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 1
    assert "error: not all of the 2 processes came together within 0:00:02" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_variables_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SlmError, match=r"cannot join the other processes: .*RANK"), joined():
        pass


def processes_of(started: subprocess.Popen[str]) -> list[int]:
    """Returns the processes that torchrun started, in order of their rank."""
    pids = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text(encoding="utf-8").split()
    ranks = {}
    for pid in pids:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks |= {int(value.removeprefix("RANK=")): int(pid) for value in variables if value.startswith("RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture
def endless(recipe_file: Path, slm_train: Start) -> Iterator[subprocess.Popen[str]]:
    """A run that goes on until it is stopped, past its first updates."""
    lengths = ("schedule.micro_steps=100000", "evaluation.every_micro_steps=100000")
    started = slm_train(2, "--recipe", recipe_file, "--out", "run", "--set", lengths[0], "--set", lengths[1])
    metrics = Path("run/metrics.jsonl")
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text(encoding="utf-8").count('"train"') > 2)
        yield started
    finally:
        if started.poll() is None:
            for pid in (*processes_of(started), started.pid):  # torchrun alone would leave them behind
                os.kill(pid, signal.SIGKILL)
            started.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize(("signum", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_run_that_torchrun_is_told_to_stop_is_saved(
    endless: subprocess.Popen[str], signum: int, said: str, slm: Callable[..., Any], end_of: EndOf
) -> None:
    os.kill(processes_of(endless)[0], signal.SIGUSR1)
    wait_for(lambda: Path("run/trainer/state.json").exists())
    assert endless.poll() is None
    asked_for = json.loads(Path("run/trainer/state.json").read_text(encoding="utf-8"))["micro_steps"]
    endless.send_signal(signum)
    ended = end_of(endless)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_process_that_is_killed_takes_the_others_with_it(endless: subprocess.Popen[str], end_of: EndOf) -> None:
    os.kill(processes_of(endless)[1], signal.SIGKILL)
    ended = end_of(endless)
    assert ended.code != 0
    assert [line for line in ended.err if line.startswith("error")] == ["error: another of the processes is gone"]
