"""`slm data`: exit code, message, what is printed, and training on what it made."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from slm.core.tokenizer import END_OF_TEXT

SMALL = """
name: small
model: {preset: tiny, vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}
batch: {batch_size: 4, context: 24}
schedule: {micro_steps: 6, warmup_micro_steps: 2, learning_rate: 0.003, final_learning_rate: 0.0003}
evaluation: {every_micro_steps: 3, windows: 8}
machine: {device: cpu, precision: float32}
"""
PREPARE = ("data", "prepare", "--data", "train.txt", "--vocab-size", "320", "--shard-tokens", "3000", "--workers", "1")


@pytest.fixture(autouse=True)
def files(stories: list[str]) -> None:
    """A recipe and text in the test's directory."""
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    for name, part in (("train.txt", stories[:60]), ("valid.txt", stories[60:80])):
        Path(name).write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in part), encoding="utf-8")


def test_prepare_then_info(slm: Callable) -> None:
    result = slm(*PREPARE, "--val", "valid.txt", "--licence", "CC0-1.0")
    assert result.code == 0, result.err
    assert "next: slm train --data datasets/train" in result.err
    assert "60 documents" in result.out and "CC0-1.0" in result.out
    assert result.out == slm("data", "info", "datasets/train").out
    report = json.loads(slm("data", "info", "datasets/train", "--json").out)
    manifest = json.loads(Path("datasets/train/dataset.json").read_text(encoding="utf-8"))
    assert report == {"dataset": "datasets/train"} | manifest
    assert report["train"]["documents"] == 60 and report["validation"]["documents"] == 20
    assert [source["name"] for source in report["sources"]] == ["train.txt", "valid.txt"]


def test_info_checks_every_byte(slm: Callable) -> None:
    slm(*PREPARE, "--out", "out")
    result = slm("data", "info", "out", "--check")
    assert "every token file matches the manifest" in result.out
    assert "as it was made" not in slm("data", "info", "out").out
    assert json.loads(slm("data", "info", "out", "--check", "--json").out)["checked"] is True
    file = Path("out/train-00001.bin")
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    assert slm("data", "info", "out").code == 0
    result = slm("data", "info", "out", "--check")
    assert result.code == 1 and "error: out: train-00001.bin was altered" in result.err


def test_json(slm: Callable) -> None:
    result = slm(*PREPARE, "--out", "out", "--json", "--dedup")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["dataset"] == "out" and report["deduplicated"]
    assert report["train"]["duplicates_removed"] == 0


def test_options_change_what_is_made(slm: Callable) -> None:
    made = {}
    for name, options in (
        ("plain", ()),
        ("vocabulary", ("--vocab-size", 300)),
        ("shards", ("--shard-tokens", 2000)),
        ("file", ("--tokenizer", "plain/tokenizer.json")),
        ("two", ("--data", "valid.txt")),
    ):
        arguments = [a for a in PREPARE if name != "file" or a not in ("--vocab-size", "320")]
        result = slm(*arguments, *options, "--out", name)
        assert result.code == 0, result.err
        made[name] = json.loads(slm("data", "info", name, "--json").out)
    assert [made[name]["vocab_size"] for name in ("plain", "vocabulary", "file")] == [320, 300, 320]
    assert len(made["shards"]["train"]["shards"]) > len(made["plain"]["train"]["shards"])
    assert made["file"]["train"] == made["plain"]["train"]
    assert made["two"]["train"]["documents"] > made["plain"]["train"]["documents"]


def test_what_is_next_goes_with_the_recipe(slm: Callable) -> None:
    """The default vocabulary is larger than that of the recipe for a CPU, if the text has so many words."""
    words = " ".join(f"word{number} " * 3 for number in range(2000))
    Path("words.txt").write_text(f"{words}\n{END_OF_TEXT}\n{words}\n{END_OF_TEXT}\nThe end.", encoding="utf-8")
    result = slm("data", "prepare", "--data", "words.txt", "--val", "valid.txt", "--workers", "1")
    tokens = json.loads(slm("data", "info", "datasets/words", "--json").out)["vocab_size"]
    assert tokens > 1024
    (command,) = (line.removeprefix("next: slm ") for line in result.err.splitlines() if line.startswith("next: "))
    assert command.startswith("train --data datasets/words --set model.vocab_size=")
    foreseen = slm(*command.split(), "--recipe", "tiny", "--dry-run", "--on", "t4")
    assert foreseen.code == 0, foreseen.err
    without = slm("train", "--data", "datasets/words", "--recipe", "tiny", "--dry-run", "--on", "t4")
    assert without.code == 1 and f"hint: {command.removeprefix('train --data datasets/words ')}\n" in without.err


def test_the_place_is_looked_at_before_the_text_is_read(slm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slm(*PREPARE, "--out", "out").code == 0
    monkeypatch.setattr("slm.train.data.sources.read_parts", lambda *_: pytest.fail("it was read"))
    assert "there is a prepared dataset already" in slm(*PREPARE, "--out", "out").err


def test_a_column(slm: Callable) -> None:
    Path("rows.jsonl").write_text('{"content": "A fox."}\n{"content": "A moon."}\n', encoding="utf-8")
    arguments = ("data", "prepare", "--data", "rows.jsonl", "--vocab-size", "300")
    for result in (slm(*arguments), slm("train", "--recipe", "small.yaml", "--data", "rows.jsonl")):
        assert 'is not a row with a "text"' in result.err
        assert "--column NAME reads another column" in result.err
    assert slm(*arguments, "--column", "content").code == 0


def test_long_rows_are_refused_unless_told(slm: Callable) -> None:
    Path("rows.jsonl").write_text('{"text": "A fox ran."}\n{"text": "A moon rose."}\n', encoding="utf-8")
    arguments = ("data", "prepare", "--data", "rows.jsonl", "--vocab-size", "300", "--max-document-bytes")
    refused = slm(*arguments, "22")
    assert refused.code == 1 and "rows.jsonl, line 2: is longer than 22 bytes" in refused.err
    assert "hint: --max-document-bytes raises the limit" in refused.err
    training = slm("train", "--recipe", "small.yaml", "--data", "rows.jsonl", "--max-document-bytes", "22")
    assert "rows.jsonl, line 2: is longer than 22 bytes" in training.err
    assert slm(*arguments, "1KiB").code == 0
    for wrong in ("0", "many", "nan", "1e99"):
        assert slm(*arguments, wrong).code == 2


def test_training_on_a_dataset_is_training_on_its_text(slm: Callable) -> None:
    slm(*PREPARE, "--out", "dataset")
    arguments = ("train", "--recipe", "small.yaml", "--json")
    of_text = slm(*arguments, "--data", "train.txt", "--out", "of-text")
    of_dataset = slm(*arguments, "--data", "dataset", "--out", "of-dataset")
    assert of_dataset.code == 0, of_dataset.err
    assert json.loads(of_text.out)["loss"] == json.loads(of_dataset.out)["loss"]
    assert not list(Path("of-dataset/data").glob("*.bin"))
    weights = [Path(run, "checkpoint/last/model.safetensors").read_bytes() for run in ("of-text", "of-dataset")]
    assert weights[0] == weights[1]
    Path("dataset/train-00001.bin").unlink()
    result = slm("train", "--resume", "--out", "of-dataset")
    assert result.code == 1 and "train-00001.bin" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "missing.txt"], 1, "error: data not found: missing.txt"),
        (["--data", "sample"], 1, "error: --data sample cannot be combined with other data"),
        (["--data", "done"], 1, "error: a prepared dataset holds tokens, not text: done"),
        (["--val", "missing.txt"], 1, "error: data not found: missing.txt"),
        (["--tokenizer", "missing.json"], 2, "error: --vocab-size requires --tokenizer bpe"),
        (["--split", "train"], 2, "error: --split requires a Hugging Face dataset"),
        (["--streaming"], 2, "error: --streaming requires a Hugging Face dataset"),
        (["--workers", "0"], 2, "error: Invalid value for '--workers'"),
        (["--out", "train.txt"], 1, "train.txt exists and is not a directory"),
        (["--out", "train.txt/below"], 1, "error: cannot write train.txt/below: "),
        (["--out", "done"], 1, "error: there is a prepared dataset already"),
        (["--out", "taken"], 1, "taken exists and contains other files: mine"),
    ],
)
def test_mistakes(slm: Callable, arguments: list[str], code: int, message: str) -> None:
    assert slm(*PREPARE, "--out", "done").code == 0
    Path("taken").mkdir()
    Path("taken/mine").touch()
    before = sorted(Path().rglob("*"))
    result = slm(*PREPARE, *arguments)
    assert result.code == code
    assert message in result.err
    assert result.err.count("error:") == 1
    assert "Traceback" not in result.err
    assert result.out == ""
    assert sorted(Path().rglob("*")) == before


def test_no_network_is_one_line(slm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **arguments: object) -> object:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = slm("data", "prepare", "--data", "hf:nobody/nothing")
    assert result.code == 1
    assert "error: nobody/nothing could not be downloaded" in result.err
    assert len(result.err.strip().split("\n")) == 2


def test_a_directory_that_may_not_be_written(slm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        result = slm(*PREPARE, "--out", "out")
    assert result.code == 1
    assert "error: Permission denied: " in result.err and "Traceback" not in result.err


def test_info_of_something_else(slm: Callable) -> None:
    result = slm("data", "info", ".")
    assert result.code == 1
    assert "error: not a prepared dataset: . has no dataset.json" in result.err


def test_help_teaches(slm: Callable) -> None:
    assert "slm data prepare" in slm("data", "--help").out
    for expected in ("--dedup", "hf:OWNER/NAME", "the same command resumes", "--streaming"):
        assert expected in slm("data", "prepare", "--help").out


def test_the_workers_import_no_torch(slm: Callable) -> None:
    """A worker for each core must start in a moment."""
    code = "import sys, slm.train.data.workers; print(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
