"""One rule for what is replaced: what slm can make again; trained weights and datasets on request; other files never."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.cli.options import REPLACING
from slm.core import sample
from slm.core.manifest import Bundle

Slm = Callable[..., Any]

SMALL = ("model.hidden_size=64", "model.intermediate_size=96", "model.vocab_size=320", "batch.context=24")
SHORT = (
    "schedule.micro_steps=2",
    "schedule.warmup_micro_steps=1",
    "evaluation.every_micro_steps=2",
    "evaluation.windows=2",
)
TRAIN = ("train", "--recipe", "tiny", *(part for value in (*SMALL, *SHORT) for part in ("--set", value)))


def contents(directory: str) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command", ["train", "finetune", "merge", "import", "export", "quantize", "data prepare", "web"]
)
def test_the_rule_stands_in_every_help(slm: Slm, command: str) -> None:
    words = " ".join(slm(*command.split(), "--help").out.split())
    assert REPLACING in words
    assert REPLACING in " ".join((Path(__file__).parents[2] / "docs/commands.md").read_text(encoding="utf-8").split())


def test_what_can_be_made_again_is_replaced(slm: Slm, shared_checkpoint: Path, shared_bundle: Bundle) -> None:
    shutil.copytree(shared_checkpoint, "runs/a/checkpoint/imported")
    for _ in range(2):
        assert slm("export", "--onnx").code == 0
        assert slm("export", "--gguf", "--out", "model.gguf").code == 0
        assert slm("merge", "a", "a/imported", "--out", "merged").code == 0


def test_a_run_is_replaced_only_on_request(slm: Slm) -> None:
    assert slm(*TRAIN, "--out", "runs/a").code == 0
    before = contents("runs/a")
    result = slm(*TRAIN, "--seed", "1", "--out", "runs/a")
    assert result.code == 1 and "--overwrite replaces it" in result.err and contents("runs/a") == before
    # A preparation that fails keeps the run.
    Path("short.txt").write_text("One day there was a fox.")
    failed = slm(*TRAIN, "--data", "short.txt", "--out", "runs/a", "--overwrite")
    assert failed.code == 1 and contents("runs/a") == before
    assert slm(*TRAIN, "--seed", "1", "--out", "runs/a", "--overwrite").code == 0
    after = contents("runs/a")
    name = "runs/a/checkpoint/best/model.safetensors"
    events = {each for each in (*before, *after) if "tfevents" in each}  # named after the time
    assert after.keys() - events == before.keys() - events and len(after) == len(before)
    assert after[name] != before[name] and [path.name for path in Path("runs").iterdir()] == ["a"]
    Path("runs/a/onnx").mkdir()
    Path("runs/a/onnx/notes.txt").touch()
    result = slm(*TRAIN, "--out", "runs/a", "--overwrite")
    assert result.code == 1 and "holds something that is not of its training" in result.err


@pytest.mark.parametrize("command", ["import", "merge"])
def test_trained_weights_are_replaced_only_on_request(slm: Slm, shared_checkpoint: Path, command: str) -> None:
    shutil.copytree(shared_checkpoint, "trained")
    Path("trained/slm.json").write_text(json.dumps({"made_by": "slm train"}))
    shutil.copytree(shared_checkpoint, "foreign")
    Path("foreign/slm.json").unlink()
    sources = [shared_checkpoint] if command == "import" else [shared_checkpoint, shared_checkpoint]
    result = slm(command, *sources, "--out", "trained")
    assert result.code == 1 and "trained holds trained weights" in result.err and "--overwrite" in result.err
    for options in ((), ("--overwrite",)):
        result = slm(command, *sources, "--out", "foreign", *options)
        assert result.code == 1 and "foreign holds a model that slm did not write" in result.err
    assert slm(command, *sources, "--out", "trained", "--overwrite").code == 0
    assert slm(command, *sources, "--out", "trained").code == 0  # which is not trained any more


def test_a_dataset_is_replaced_only_on_request(slm: Slm) -> None:
    Path("a.txt").write_text(sample.stories_path().read_text(encoding="utf-8")[:20_000])
    command = ("data", "prepare", "--data", "a.txt", "--vocab-size", "300", "--out", "set", "--workers", "1")
    assert slm(*command).code == 0
    result = slm(*command, "--shard-tokens", "500")
    assert result.code == 1 and "there is a prepared dataset already: set" in result.err
    assert slm(*command, "--shard-tokens", "500", "--overwrite").code == 0
    assert len(list(Path("set").glob("train-*.bin"))) > 1
    Path("set/notes.txt").touch()
    result = slm(*command, "--overwrite")
    assert result.code == 1 and "set exists and contains other files: notes.txt" in result.err


def test_files_that_slm_did_not_make_stay(slm: Slm, shared_checkpoint: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter("theirs.gguf", "llama")
    writer.add_name("theirs")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = Path("theirs.gguf").read_bytes()
    result = slm("export", "--gguf", shared_checkpoint, "--out", "theirs.gguf")
    assert result.code == 1 and "theirs.gguf exists and slm did not write it" in result.err
    assert Path("theirs.gguf").read_bytes() == before


def test_out_says_what_it_is(slm: Slm) -> None:
    said = {
        name: re.sub(r"\s+", " ", slm(*name.split(), "--help").out)
        for name in ("export", "quantize", "import", "finetune", "demo")
    }
    assert "Directory of the bundle, or the GGUF or adapter file." in said["export"]
    assert "Directory of the checkpoint. [default: runs/NAME/checkpoint/imported]" in said["import"]
    assert "Directory of the run. [default: a new runs/demo]" in said["demo"]
    assert "Directory of the adapter, or the run with --full." in said["finetune"]
