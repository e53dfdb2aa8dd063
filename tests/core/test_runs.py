"""Where artifacts lie when no place is named."""

import os
from pathlib import Path

import pytest

from slm.core import runs
from slm.core.errors import SlmError


def log(path: str, age: int) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1_000_000 - age, 1_000_000 - age))


def test_no_run() -> None:
    with pytest.raises(SlmError, match=r"there is no run under \./runs") as caught:
        runs.newest_run()
    assert caught.value.hint == "start one with slm train"


def test_free_names_and_homes(tmp_path: Path) -> None:
    assert runs.free_run("tiny") == Path("runs/tiny")
    log("runs/tiny/metrics.jsonl", 1)
    log("runs/tiny-2/metrics.jsonl", 2)
    assert runs.free_run("tiny") == Path("runs/tiny-3")
    assert runs.newest_run() == Path("runs/tiny")
    assert runs.run_of(Path("runs/tiny/checkpoint/best")) == Path("runs/tiny")
    assert runs.run_of(Path.cwd() / "runs/tiny/onnx") == Path("runs/tiny")
    assert runs.run_of(tmp_path / "elsewhere" / "checkpoint") == tmp_path / "elsewhere"
