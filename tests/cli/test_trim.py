"""`slm trim`: the command's report, defaults, refusals, and what other commands do with the result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from tests import quick

Slm = Callable[..., Any]


@pytest.fixture
def text(stories: list[str]) -> Path:
    Path("text.txt").write_text("\n<|endoftext|>\n".join(stories[:40]), encoding="utf-8")
    return Path("text.txt")


def test_the_report(slm: Slm, shared_checkpoint: Path, text: Path) -> None:
    shutil.copytree(shared_checkpoint, "runs/tiny/checkpoint/best")
    Path("runs/tiny/checkpoint/best/slm.json").write_text(json.dumps({"made_by": "slm train"}))
    result = slm("trim", "--data", text, "--coverage", "95%", "--json")
    assert result.code == 0, result.err
    assert "Using runs/tiny/checkpoint/best" in result.err
    report = json.loads(result.out)
    out = Path("runs/tiny-trimmed/checkpoint/trimmed")
    assert report["checkpoint"] == str(out) and report["next"] == f"slm export --onnx {out}"
    before, after = report["vocab_size"]
    assert before == 320 and after == read_config(out).vocab_size == Tokenizer.load(out).vocab_size < 320
    assert report["parameters"][0] - report["parameters"][1] == 64 * (before - after)
    assert report["bytes"][0] - report["bytes"][1] == 4 * 64 * (before - after)
    tokens = report["tokens"]
    assert after == tokens["required"] + tokens["used"] + tokens["parts"] + tokens["filled"]
    for name in ("data", "held_out"):
        counted = report[name]
        assert 0.9 < counted["covered"] <= 1 and counted["tokens"][0] <= counted["tokens"][1]
        assert counted["tokens_per_byte"][0] == counted["tokens"][0] / counted["bytes"]
    assert report["proof"]["limit_share"] <= 1 and all(report["proof"]["bits_per_byte"])
    # The same source goes to the same place, where no training is lost.
    again = slm("trim", "tiny", "--data", text, "--coverage", "90%", "--json")
    assert again.code == 0 and json.loads(again.out)["checkpoint"] == str(out), again.err


def test_words_for_people(slm: Slm, shared_checkpoint: Path, text: Path) -> None:
    result = slm("trim", shared_checkpoint, "--data", text, "--held-out", text, "--keep", "290", "--out", "t")
    assert result.code == 0, result.err
    for words in ("tokens in the vocabulary", "held-out bits per byte", "logits of kept tokens", "always stay"):
        assert words in result.out
    assert "is rounded up" not in result.err  # 320 would be all of them
    assert result.err.splitlines()[-1] == "next: slm export --onnx t"


@pytest.mark.parametrize(("coverage", "advised"), [("90%", True), ("100%", False)])
def test_advice_if_many_tokens_leave(
    slm: Slm, shared_checkpoint: Path, text: Path, coverage: str, advised: bool
) -> None:
    result = slm("trim", shared_checkpoint, "--data", text, "--coverage", coverage, "--out", "t")
    assert ("left the vocabulary; a larger --keep" in result.err) is advised and result.code == 0, result.err


def test_the_result_is_a_model_like_any_other(slm: Slm, shared_checkpoint: Path, text: Path) -> None:
    trim = ("trim", shared_checkpoint, "--data", text, "--coverage", "90%", "--out", "runs/t/checkpoint/trimmed")
    assert slm(*trim).code == 0
    rows = [{"prompt": "Once upon", "completion": " a time"}] * 6
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        ("finetune", "--lora", "rows.jsonl", *quick.FINETUNE),
        ("export", "--onnx", "--adapter", "rows"),
        ("export", "--onnx", "runs/t/checkpoint/trimmed"),
        ("quantize", "--int8", *quick.QUANTIZE),
        ("verify",),
        ("export", "--gguf", "runs/t/checkpoint/trimmed", "--gguf-type", "f32", "--out", "t.gguf"),
        ("info", "runs/t/onnx-int8"),
    ):
        result = slm(*command)
        assert result.code == 0, (command, result.err)
    assert "trimmed from 320 to" in result.out.replace("\n", " ")
    assert slm(*trim).code == 0  # an older result is replaced
    Path("runs/t/checkpoint/trimmed/mine.txt").touch()
    assert "contains other files" in slm(*trim).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "pass --keep N or --coverage PERCENT"),
        (("--keep", "300", "--coverage", "99%"), "pass --keep N or --coverage PERCENT"),
        (("--coverage", "0.99"), "is not a percentage such as 99.99%"),
        (("--coverage", "101%"), "is not a percentage"),
        (("--coverage", "nan%"), "is not a percentage"),
        (("--keep", "0"), "0 is not in the range"),
    ],
)
def test_wrong_usage(slm: Slm, shared_checkpoint: Path, text: Path, arguments: tuple[str, ...], words: str) -> None:
    result = slm("trim", shared_checkpoint, "--data", text, *arguments)
    assert result.code == 2 and words in result.err


def test_refusals_write_nothing(slm: Slm, shared_checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trim = ("trim", shared_checkpoint, "--coverage", "90%", "--out", "t")
    assert "data not found" in slm(*trim, "--data", "nowhere.txt").err
    Path("empty.txt").touch()
    assert "no text in empty.txt" in slm(*trim, "--data", "empty.txt").err
    shutil.copytree(shared_checkpoint, "c")
    assert "is the checkpoint itself" in slm(*trim[:1], "c", "--data", text, *trim[2:4], "--out", "c").err

    def fails(*_: object) -> None:
        raise SlmError("they differ")

    monkeypatch.setattr("slm.export.trimmed.compare_trimmed", fails)
    assert slm(*trim, "--data", text).err.splitlines()[-1] == "error: they differ"
    assert not Path("t").exists() and not list(Path().glob(".t*"))


def test_without_pytorch_tensors_and_pieces_are_compared(
    slm: Slm, shared_checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.cli.commands.trim.find_spec", lambda name: None)
    result = slm("trim", shared_checkpoint, "--data", text, "--coverage", "90%", "--out", "t", "--json")
    assert result.code == 0 and json.loads(result.out)["proof"] is None
    assert "PyTorch is not installed" in result.err
