"""The files of `benchmarks/browser.py`: figures are those of the model that was named, and of no other."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

Prepare = Callable[..., Path]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prepare:
    """The function, in an empty directory; it makes no file of a model by itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    import browser_files  # type: ignore[import-not-found]
    import peer_files  # type: ignore[import-not-found]

    monkeypatch.setattr(browser_files, "_make", lambda path, command: path.mkdir())
    monkeypatch.setattr(peer_files, "_make_checkpoint", lambda path: path.mkdir())
    found: Prepare = browser_files.prepare
    return found


def test_a_checkpoint_that_is_not_there(prepare: Prepare, tmp_path: Path) -> None:
    """Random weights would take its place, under its name."""
    with pytest.raises(SystemExit, match="not found: "):
        prepare("mine", tmp_path / "absent", {}, {"onnx-int8"})
    assert list(tmp_path.iterdir()) == []


def test_another_checkpoint_under_the_same_name(prepare: Prepare, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    home = prepare("mine", tmp_path / "first", {}, {"onnx-int8"})
    assert (home / "checkpoint").resolve() == tmp_path / "first" and (home / "onnx-int8").is_dir()
    assert prepare("mine", tmp_path / "first", {}, {"onnx-int8"}) == home
    with pytest.raises(SystemExit, match="choose another --name"):
        prepare("mine", tmp_path / "second", {}, {"onnx-int8"})
    (tmp_path / "first").rmdir()
    with pytest.raises(SystemExit, match="is a link to a file that is gone"):
        prepare("mine", tmp_path / "second", {}, {"onnx-int8"})


def test_no_random_weights_beside_a_model(prepare: Prepare, tmp_path: Path) -> None:
    given = {"q4_k_m.gguf": tmp_path / "model.gguf"}
    given["q4_k_m.gguf"].write_bytes(b"GGUF")
    assert prepare("mine", None, given, {"q4_k_m.gguf"}).is_dir()
    with pytest.raises(SystemExit, match="a --checkpoint is needed to make onnx-int8"):
        prepare("mine", None, given, {"q4_k_m.gguf", "onnx-int8"})
    assert (prepare("random", None, {}, {"onnx-int8"}) / "checkpoint").is_dir()


@pytest.mark.parametrize(
    ("option", "value"), [("--only", "slm INT8,slm INT3"), ("--parts", "sped"), ("--file", "onnx-int3=/tmp")]
)
def test_unknown_names(option: str, value: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "browser.py"), option, value]
    env = {
        name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"
    }  # the script imports those beside it
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    wrong = value.split(",")[-1].split("=")[0]
    assert result.returncode == 2 and f"{option}: unknown: {wrong}. Known: " in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []
