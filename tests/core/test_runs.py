"""What is meant when nothing is named."""

import json
import os
from pathlib import Path

import pytest

from slm.core import runs
from slm.core.errors import SlmError


def make(path: str, age: int, content: object = None) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content or {}))
    os.utime(file, (1_000_000 - age, 1_000_000 - age))


def test_the_best_checkpoint_of_the_newest_run() -> None:
    make("runs/old/checkpoint/best/slm.json", 100)
    make("runs/new/checkpoint/best/slm.json", 50)
    make("runs/new/checkpoint/last/slm.json", 10)
    assert runs.newest_checkpoint() == Path("runs/new/checkpoint/best")
    make("runs/only-last/checkpoint/last/slm.json", 5)
    assert runs.newest_checkpoint() == Path("runs/only-last/checkpoint/last")


def test_bundles_by_precision() -> None:
    make("runs/a/onnx/manifest.json", 30, {"precision": "float32"})
    make("runs/a/onnx-int8/manifest.json", 10, {"precision": "int8"})
    make("runs/b/onnx-poet/manifest.json", 20, {"precision": "float32"})
    assert runs.newest_bundle() == Path("runs/a/onnx-int8")
    assert runs.newest_bundle(quantized=False) == Path("runs/b/onnx-poet")
    assert runs.newest_bundle(quantized=True) == Path("runs/a/onnx-int8")


@pytest.mark.parametrize("find", [runs.newest_checkpoint, runs.newest_bundle, runs.newest_run])
def test_nothing_there(find: object) -> None:
    with pytest.raises(SlmError, match=r"there is no .* under \./runs") as caught:
        find()  # type: ignore[operator]
    assert caught.value.hint is not None and "slm " in caught.value.hint


def test_free_names_and_homes(tmp_path: Path) -> None:
    assert runs.free_run("tiny") == Path("runs/tiny")
    make("runs/tiny/metrics.jsonl", 1)
    make("runs/tiny-2/metrics.jsonl", 2)
    assert runs.free_run("tiny") == Path("runs/tiny-3")
    assert runs.newest_run() == Path("runs/tiny")
    assert runs.run_of(Path("runs/tiny/checkpoint/best")) == Path("runs/tiny")
    assert runs.run_of(Path.cwd() / "runs/tiny/onnx") == Path("runs/tiny")
    assert runs.run_of(tmp_path / "elsewhere" / "checkpoint") == tmp_path / "elsewhere"
