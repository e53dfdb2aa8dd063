"""The frame around all commands: help, exit codes, one line for each failure."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.cli.main import COMMANDS
from slm.core.errors import SlmError

Slm = Callable[..., Any]


def test_help_lists_every_command(slm: Slm) -> None:
    result = slm("--help")
    assert result.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_teaches(slm: Slm, command: str) -> None:
    result = slm(command, "--help")
    assert result.code == 0
    assert f"slm {command}" in result.out
    assert ("--json" in result.out) == (command != "serve")  # which reports nothing at its end


def test_no_command_at_all_shows_the_help(slm: Slm) -> None:
    result = slm()
    assert result.code == 2 and "Commands:" in result.out + result.err


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("data", "prepear"), ("generate", "--top-p", "2"), ("export",), ("quantize",), ("--nonsense",)],
)
def test_wrong_usage_is_two_lines_and_exit_code_2(slm: Slm, arguments: tuple[str, ...]) -> None:
    result = slm(*arguments)
    assert result.code == 2 and result.out == ""
    error, hint = result.err.strip().split("\n")
    assert error.startswith("error: ") and hint.startswith("hint: see slm ")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SlmError("the fox is lost", "look under the oak"), "error: the fox is lost\nhint: look under the oak\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: no space left on the disk\n"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "error: Permission denied: runs/x\n"),
        (ModuleNotFoundError("no", name="onnxscript.nn"), "[convert]' (slm-edge[convert] from this clone)"),
        (ModuleNotFoundError("no", name="torch"), "[train]' (slm-edge[train] from this clone)"),
        (ZeroDivisionError("by\nzero"), "error: unexpected ZeroDivisionError: by zero\nhint: run slm --debug"),
    ],
)
def test_failures_are_said_without_a_traceback(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("slm.cli.commands.doctor._providers", fail)
    result = slm("doctor")
    assert result.code == 1
    assert said in result.err and "Traceback" not in result.err


def test_debug_shows_the_traceback(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.cli.commands.doctor._providers", lambda: 1 / 0)
    assert "Traceback" in slm("--debug", "doctor").err
    assert "Traceback" in slm("doctor", "--debug").err
    monkeypatch.setenv("SLM_DEBUG", "1")
    assert "Traceback" in slm("doctor").err


def test_an_interruption_is_said_and_exits_with_130(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slm.cli.commands.doctor._providers", interrupt)
    result = slm("doctor")
    assert result.code == 130 and result.err.strip() == "error: interrupted\nhint: no file is incomplete"


@pytest.mark.parametrize(
    ("arguments", "target", "said"),
    [
        (("train", "--recipe", "tiny"), "slm.train.run.train", "slm train --resume continues it"),
        (
            ("--debug", "data", "prepare", "--data", "x"),
            "slm.train.data.corpus.open_corpus",
            "the same slm data prepare command continues",
        ),
        (("demo",), "slm.train.run.train", "slm demo starts a new run"),
    ],
)
def test_what_an_interruption_leaves_is_said_of_the_command(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], target: str, said: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupt)
    result = slm(*arguments)
    assert result.code == 130 and said in result.err
    assert ("slm train" in result.err.partition("error:")[2]) is (arguments[0] == "train")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_and_its_half_written_files(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys, time; from pathlib import Path; import slm.cli.commands.doctor as d\n"
        "from slm.core.files import atomic_directory\n"
        "def slow():\n"
        "    with atomic_directory(Path('made'), ()):\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "d._providers = slow\n"
        "from slm.cli.main import main; main(['doctor'])\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number and said.startswith("error: terminated\nhint: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_python_exits_prints_nothing(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import atexit, time; from slm.cli.main import main\n"
        "atexit.register(lambda: (print('exiting', flush=True), time.sleep(60)))\n"
        "main(['--version'])\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline().startswith("slm, version")
    assert process.stdout.readline() == "exiting\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == -number and said == ""


def test_a_closed_pipe_is_no_failure_to_report(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "import time; time.sleep(0.1); from slm.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(writer)
    assert "Traceback" not in done.stderr and "error" not in done.stderr


def test_help_is_quick() -> None:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run([sys.executable, "-m", "slm", "--help"], check=True, capture_output=True)
    # Of processor time, which other work on the machine hardly changes. Measured 0.2 s; to import PyTorch takes more than 1 s.
    assert used() - before < 1


def test_threads_spin_only_briefly_unless_told_otherwise() -> None:
    def spins(program: str = "import slm.cli.main", **environment: str) -> str:
        program = f"import os\n{program}\nprint(os.environ.get('GOMP_SPINCOUNT'))"
        base = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        done = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=base | environment
        )
        return done.stdout.strip()

    assert spins() == "5000"
    assert spins(GOMP_SPINCOUNT="7") == "7"
    assert spins(OMP_WAIT_POLICY="ACTIVE") == "None"
    call = "import slm\ntry:\n    slm.finetune()\nexcept slm.SlmError:\n    pass"
    assert spins(call) == "5000"  # in Python too, before PyTorch is imported
    assert spins("import slm") == "None"
