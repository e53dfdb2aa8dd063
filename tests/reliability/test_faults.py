"""Processes that are killed or meet each other, and clocks that jump."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import slm
from slm.core.locks import sole
from slm.core.manifest import Bundle
from slm.core.progress import Silent
from slm.train.recipe import Recipe
from slm.train.run import train
from tests.forks import forks
from tests.waiting import wait_for

SECONDS = 100
# What a wall clock may be asked for: dates, in an answer's "created", in a report, in a template that asks for today.
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "today")}
DATES = {
    "cli/commands/bench.py",
    "core/checkpoint.py",
    "core/template_worker.py",
    "serve/completions.py",
    "serve/log.py",
    "serve/service.py",
    "train/data/remote/datasets.py",  # of another process's check, which a clock that was set repeats
    "train/logs/mlflow_runs.py",
    "web/turns.py",
}


@pytest.fixture
def text(tmp_path: Path, stories: list[str]) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(stories[:40]), encoding="utf-8")
    return file


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob(".*"))


def quantizing(bundle: Bundle, text: Path) -> list[str]:
    measured = ("--data", str(text), "--tokens", "256", "--calibration", str(text), "--calibration-tokens", "256")
    loose = ("--max-kl", "9", "--max-ppl-increase", "9")
    return ["quantize", "--int8", str(bundle.path), "--out", "made/int8", *measured, *loose]


# Where it is: nothing is written yet, a choice is measured, the weights are written. The number is that of the process.
EMPTY, TRIAL, DATA = ".int8.partial-{}*", ".trial.scratch-*", ".int8.partial-{}*/onnx/*_data"


@pytest.mark.slow
def test_a_command_that_is_stopped_while_it_writes(
    slm: Callable[..., Any], shared_bundle: Bundle, text: Path, tmp_path: Path
) -> None:
    """An interrupted process leaves nothing; what a killed one leaves, the next one removes."""
    arguments, made = quantizing(shared_bundle, text), tmp_path / "made"
    with forks("import numpy, onnx, rich.progress, tokenizers, slm.cli.commands.quantize", tmp_path) as start:

        def stopped(signum: signal.Signals, moment: str) -> None:
            process = start.start("from slm.cli.main import main; main()", *arguments)
            moment = moment.format(process.pid)
            wait_for(lambda: any(made.glob(moment)) or not process.running, every=0.001)
            assert process.running, f"it ended before there was a {moment}"
            os.kill(process.pid, signum)
            ended = process.wait(SECONDS)
            assert ended.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[signum]
            assert "Traceback" not in ended.stderr and not (made / "int8").exists()

        for signum, moment in ((signal.SIGINT, TRIAL), (signal.SIGTERM, DATA)):
            stopped(signum, moment)
            assert hidden(tmp_path) == []
        for moment in (EMPTY, TRIAL, DATA):
            stopped(signal.SIGKILL, moment)
            assert hidden(tmp_path)
    done = slm(*arguments)
    assert done.code == 0, done.err
    assert Bundle.open(made / "int8") and hidden(tmp_path) == []


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Has another process be at work on an artifact; returns its number."""
    started = []

    def hold(target: Path) -> int:
        program = (
            "import sys, time; from pathlib import Path; from slm.core.locks import sole\n"
            "with sole(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(100)"
        )
        process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process.pid

    yield hold
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("command", ["export", "quantize", "finetune", "import", "merge"])
def test_the_second_of_two_is_refused(
    slm: Callable[..., Any], held: Callable[[Path], int], shared_checkpoint: Path, shared_bundle: Bundle, text: Path,
    tmp_path: Path, command: str,
) -> None:  # fmt: skip
    (tmp_path / "rows.jsonl").write_text('{"prompt": "One day", "completion": " a fox"}\n' * 20)
    made = tmp_path / "made"
    arguments: dict[str, tuple[object, ...]] = {
        "export": ("export", "--onnx", shared_checkpoint),
        "quantize": ("quantize", "--int8", shared_bundle.path, "--data", text, "--tokens", 256),
        "finetune": ("finetune", "--lora", "rows.jsonl", "--base", shared_checkpoint, "--epochs", 1),
        "import": ("import", shared_checkpoint),
        "merge": ("merge", shared_checkpoint, shared_checkpoint),
    }
    pid = held(made)
    result = slm(*arguments[command], "--out", made)
    assert result.code == 1, result.err
    assert f"error: another process ({pid}) is writing {made}\n" in result.err
    assert not made.exists()


def test_what_is_held_is_let_go_of(tmp_path: Path) -> None:
    with sole(tmp_path / "deep" / "made"):
        assert (tmp_path / "deep" / ".made.lock").exists()
    assert not (tmp_path / "deep").exists()


def test_a_clock_that_jumps(
    text: Path, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, small_recipe: Callable[..., Recipe]
) -> None:
    """The wall clock goes back an hour whenever it is asked, and what is written is dated in the past."""
    now = time.time()
    asked = []

    def back() -> float:
        asked.append(1)
        return now - 3600 * len(asked)

    monkeypatch.setattr(time, "time", back)
    started = time.perf_counter()
    recipe = small_recipe(text, {"schedule": {"micro_steps": 6}, "checkpoints": {"every_updates": 1, "keep": 2}})
    result = train(recipe, Path("run"), Silent())
    assert 0 < result.elapsed_s <= time.perf_counter() - started and result.tokens_s > 0
    kept = sorted(path.name for path in Path("run/checkpoint").glob("update-*"))
    assert kept == ["update-0000005", "update-0000006"]
    model = slm.load(shared_bundle.path)
    result = model.complete("One day", max_new_tokens=4, temperature=0)
    assert result.ttft_ms > 0 and result.decode_s > 0


def test_only_dates_come_from_the_wall_clock() -> None:
    """Durations and deadlines are taken from clocks that cannot be set."""
    root = Path(__file__).parents[2]
    found = set()
    for package in (home.parent for home in root.glob("*/__init__.py")):
        for file in package.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                name = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
                if name and (name, getattr(node, "attr", "")) in WALL_CLOCKS:
                    found.add(file.relative_to(root).as_posix())
    assert found == DATES
