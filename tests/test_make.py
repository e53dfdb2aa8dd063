"""`make install` and `make install-gpu`: what they ask pip for, in front of a Python that only writes down its arguments."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose python appends its arguments to ./log, a line each time."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\n')
    python.chmod(0o755)
    return tmp_path / "venv"


def made(target: str, venv: Path) -> list[str]:
    """Runs a target; returns what pip was asked for."""
    log = venv.parent / "log"
    log.unlink(missing_ok=True)
    subprocess.run(["make", "--no-print-directory", target, f"VENV={venv}"], cwd=ROOT, check=True, capture_output=True)
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line.startswith("-m pip")]


def test_an_environment_for_the_cpu(venv: Path) -> None:
    [installed, _] = made("install", venv)
    assert "'.[cpu,train,data,serve,tools]'".strip("'") in installed
    assert "--constraint constraints.txt" in installed and "constraints-cuda.txt" not in installed
    assert made("install", venv) == []  # once


def test_an_environment_for_a_gpu_has_one_onnxruntime_and_keeps_it(venv: Path) -> None:
    made("install", venv)  # which would have brought onnxruntime
    removed, installed, _ = made("install-gpu", venv)
    assert " uninstall " in removed and removed.endswith("onnxruntime onnxruntime-gpu")
    assert ".[cuda,train,data,serve,tools]" in installed
    assert "--constraint constraints.txt --constraint constraints-cuda.txt" in installed
    assert made("install-gpu", venv) == [] and made("install", venv) == []
    (venv / ".installed").unlink()  # as if something had changed
    assert [".[cuda," in line for line in made("install", venv)] == [True, False]


def test_the_tools_bring_no_onnxruntime() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("train", "data", "serve", "tools", "convert"):
        assert not any(re.match(r"onnxruntime|slm-edge\[.*(cpu|cuda|all)", each) for each in extras[name]), name
    assert set(extras["dev"]) == {"slm-edge[all,data,tools]"} and set(extras["all"]) == {"slm-edge[cpu,train,serve]"}


def test_both_sets_have_the_same_pytorch() -> None:
    """Another one would not fit to the libraries of CUDA that are pinned beside it."""
    pins = [
        re.findall(r"^torch==(\S+)$", (ROOT / name).read_text(), flags=re.MULTILINE)
        for name in ("constraints.txt", "constraints-cuda.txt")
    ]
    assert len(pins[0]) == 1 and pins[0] == pins[1]


@pytest.mark.parametrize(
    ("there", "broken", "code", "said"),
    [
        ("3.11 3.14", "", 0, "passed: 3.11 3.14; failed:; not available: 3.12"),
        ("3.11 3.14", "3.14", 2, "passed: 3.11; failed: 3.14; not available: 3.12"),
        ("", "", 2, "passed:; failed:; not available: 3.11 3.12 3.14"),
    ],
)
def test_each_python_that_can_be_had_is_tested(venv: Path, there: str, broken: str, code: int, said: str) -> None:
    """In front of a uv that has some Pythons, and a make that fails with some of them."""
    uv, make = venv.parent / "uv", venv.parent / "make"
    uv.write_text(
        '#!/bin/sh\nfor last; do :; done\nif test "$2" = find; then\n'
        f'case " {there} " in *" $last "*) echo /python$last;; *) exit 1;; esac\nelse exit 1; fi\n'
    )
    make.write_text(f'#!/bin/sh\necho "$*"\ncase "$*" in *python"{broken or "none"}"*) exit 1;; esac\n')
    for program in (uv, make):
        program.chmod(0o755)
    command = ["make", "--no-print-directory", "test-pythons", f"VENV={venv}", f"UV={uv}", f"MAKE={make}"]
    done = subprocess.run([*command, "PYTHONS=3.11 3.12 3.14"], cwd=ROOT, capture_output=True, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("--no-print", "passed"))]
    assert (done.returncode, lines[-1]) == (code, said)
    wanted = [
        f"--no-print-directory test-fast PYTHON=/python{name} VENV=build/pythons/{name}" for name in there.split()
    ]
    assert lines[:-1] == wanted
