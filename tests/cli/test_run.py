"""`slm run`, `slm list` and `slm rm`: one command from a model to a conversation, and what is stored afterwards."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle
from slm.core.runs import cached_bundles

Slm = Callable[..., Any]
QUICK = ("--greedy", "--max-new-tokens", 3)


@pytest.fixture
def run(shared_checkpoint: Path, shared_bundle: Bundle) -> Path:
    """A run with a checkpoint and a bundle."""
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    shutil.copytree(shared_bundle.path, "runs/tiny/onnx")
    return Path("runs/tiny")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, slm: Slm) -> Slm:
    """Runs `slm run` with a line on standard input."""

    def run(*arguments: object) -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"One day\n")))
        return slm("run", *arguments, *QUICK)

    return run


def test_a_checkpoint_becomes_a_bundle_once(said: Slm, shared_checkpoint: Path) -> None:
    first = said(shared_checkpoint, "--float32")
    assert first.code == 0, first.err
    (made,) = cached_bundles().iterdir()
    assert made.name.startswith("random-float32-") and "parameters in float32" in first.err
    second = said(shared_checkpoint, "--float32")
    assert (second.code, second.out) == (0, first.out) and "parameters in float32" not in second.err
    named = said(made.name)
    assert named.code == 0 and named.out == first.out
    assert list(cached_bundles().iterdir()) == [made]


def test_the_default_is_int8(said: Slm, shared_checkpoint: Path) -> None:
    result = said(shared_checkpoint)
    assert result.code == 0, result.err
    (made,) = cached_bundles().iterdir()
    manifest = Bundle.open(made).manifest
    assert manifest.precision == "int8" and manifest.quality is not None
    assert manifest.provenance["checkpoint"] == str(shared_checkpoint)


def test_a_changed_checkpoint_is_converted_again(said: Slm, shared_checkpoint: Path) -> None:
    shutil.copytree(shared_checkpoint, "mine")
    assert said("mine", "--float32").code == 0
    Path("mine/config.json").touch()
    assert said("mine", "--float32").code == 0
    assert len(list(cached_bundles().iterdir())) == 2


def test_a_run_with_a_bundle_uses_it(said: Slm, run: Path) -> None:
    result = said("tiny")
    assert result.code == 0, result.err
    assert "Using runs/tiny/onnx" in result.err and not cached_bundles().exists()
    refused = said("tiny", "--int4")
    assert refused.code == 1 and "runs/tiny/onnx is a bundle already" in refused.err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "or a model on the hub"),
        ("missing.gguf", "or a model on the hub"),
        ("text.gguf", "is not a GGUF file"),
        ("", "is empty"),
    ],
)
def test_a_source_that_is_none_is_one_line(said: Slm, source: str, message: str) -> None:
    Path("text.gguf").write_text("no model")
    result = said(source)
    assert result.code in (1, 2) and message in result.err and "Traceback" not in result.err
    assert not list(Path().rglob(".preparing*"))


def test_a_failed_conversion_leaves_nothing(said: Slm, shared_checkpoint: Path) -> None:
    shutil.copytree(shared_checkpoint, "mine")
    data = Path("mine/model.safetensors")
    data.write_bytes(data.read_bytes()[:-100])
    assert said("mine").code == 1
    assert [each for each in cached_bundles().rglob("*") if not each.name.endswith(".lock")] == []


def test_the_list_has_every_artifact(slm: Slm, said: Slm, run: Path, shared_checkpoint: Path) -> None:
    said(shared_checkpoint, "--float32")
    report = json.loads(slm("list", "--json").out)
    found = {each["name"]: each for each in report["artifacts"]}
    (cached,) = (name for name in found if name.startswith("random-float32-"))
    assert found.keys() == {"tiny/best", "tiny/onnx", cached}
    assert found[cached]["cached"] and not found["tiny/onnx"]["cached"]
    files = [file for file in (run / "onnx").rglob("*") if file.is_file()]
    assert found["tiny/onnx"]["bytes"] == sum(file.stat().st_size for file in files)
    assert report["bytes"] == sum(each["bytes"] for each in report["artifacts"])
    shown = slm("list")
    assert "tiny/onnx" in shown.out and "in total" in shown.err


def test_nothing_is_a_list_too(slm: Slm) -> None:
    assert "nothing under ./runs" in slm("list").err
    assert json.loads(slm("list", "--json").out) == {"artifacts": [], "bytes": 0}


def test_artifacts_and_runs_are_removed(slm: Slm, said: Slm, run: Path, shared_checkpoint: Path) -> None:
    said(shared_checkpoint, "--float32")
    (made,) = cached_bundles().iterdir()
    result = slm("rm", "tiny/onnx", made.name, "--yes", "--json")
    assert result.code == 0 and json.loads(result.out)["removed"] == ["runs/tiny/onnx", str(made)]
    assert not made.exists() and not (run / "onnx").exists() and (run / "checkpoint" / "best").is_dir()
    assert slm("rm", "tiny", "-y").code == 0 and list(Path("runs").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["..", "../other", "/etc", "runs", "notes", "tiny/checkpoint", "tiny/../tiny", "linked"]
)
def test_nothing_else_is_removed(slm: Slm, run: Path, name: str) -> None:
    for other in ("notes", "runs/notes"):
        Path(other).mkdir()
        Path(other, "mine.txt").write_text("mine")
    Path("runs/linked").symlink_to(Path("notes").resolve(), target_is_directory=True)
    before = sorted(Path().rglob("*"))
    result = slm("rm", name, "--yes")
    assert result.code == 1 and "Traceback" not in result.err
    assert sorted(Path().rglob("*")) == before


def test_a_run_that_is_being_written_stays(slm: Slm, run: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom slm.core.locks import held\nfrom pathlib import Path\n"
         "with held(Path('runs/tiny')):\n    print('held', flush=True)\n    sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        assert writer.stdout is not None and writer.stdout.readline() == "held\n"
        result = slm("rm", "tiny", "--yes")
        assert result.code == 1 and "is at work in runs/tiny" in result.err and (run / "onnx").is_dir()
        writer.communicate("")
    assert slm("rm", "tiny", "--yes").code == 0 and not list(Path("runs").iterdir())


def test_a_name_of_two_artifacts_is_ambiguous(slm: Slm, run: Path) -> None:
    shutil.copytree(run / "checkpoint" / "best", run / "adapters" / "best")
    result = slm("rm", "tiny/best", "--yes")
    assert result.code == 1 and "runs/tiny/checkpoint/best, runs/tiny/adapters/best" in result.err


def test_without_an_answer_nothing_is_removed(slm: Slm, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    result = slm("rm", "tiny/onnx")
    assert result.code != 0 and (run / "onnx").is_dir() and "MB" in result.err
