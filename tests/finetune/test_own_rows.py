"""The rows that a model was fine-tuned on: recorded by path and hash, and read again for its quantization."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.checkpoint import INFO_FILE, read_info
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, amend
from slm.core.tokenizer import Tokenizer
from slm.core.tuned_rows import RECORD, recorded_rows, tuned_on, without_samples
from slm.export.bundle import export_bundle
from slm.finetune.examples import Renderer
from slm.finetune.merge import merged_checkpoint
from slm.finetune.own_rows import OwnRows, own_rows
from slm.finetune.preparation import RowFiles
from slm.finetune.provenance import provenance
from slm.finetune.rows import read_rows
from slm.finetune.run import finetune
from slm.finetune.settings import FinetuneSettings

WriteRows = Callable[..., Path]
Slm = Callable[..., Any]
LITTLE = ("--tokens", "64", "--calibration-tokens", "128", "--window", "32", "--no-smooth", "--kv-cache", "float32")
ROWS = [{"instruction": f"Say {n} times.", "output": f"Number {n} it is, and {n} again."} for n in range(12)]


@pytest.fixture
def tuned(shared_bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """Returns a copy of a bundle that records the rows of a fine-tuning run."""

    def make(data: Path, /, **fields: Any) -> Bundle:
        path = tmp_path / "tuned"
        shutil.copytree(shared_bundle.path, path, dirs_exist_ok=True)
        found = Bundle.open(path)
        record = tuned_on({"data": provenance(data)} | fields)
        kept = found.manifest.provenance | {INFO_FILE: {"made_by": "tests"} | record}
        amend(path, found.manifest.model_copy(update={"provenance": kept}))
        return Bundle.open(path)

    return make


def of(bundle: Bundle) -> OwnRows:
    found = own_rows(bundle)
    assert isinstance(found, OwnRows), found
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bundle_names_the_rows_and_has_none_of_their_text(
    shared_checkpoint: Path, write_rows: WriteRows, method: str
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"zebra {n}"} for n in range(10)]
    files = RowFiles(write_rows(rows), hold_out=0.2)
    settings = FinetuneSettings.checked(method=method, epochs=1, rank=2)
    result = finetune(shared_checkpoint, files, Path("out"), settings)
    assert any("zebra" in sample.wanted for sample in result.samples)
    checkpoint = result.made
    if method == "lora":
        assert "zebra" in Path("out", INFO_FILE).read_text(encoding="utf-8")  # an adapter keeps its samples
        checkpoint = Path("merged")
        merged_checkpoint(shared_checkpoint, Path("out"), checkpoint)
    bundle = export_bundle(checkpoint, Path("onnx"))
    record = recorded_rows(bundle.manifest.provenance[INFO_FILE])
    assert record is not None and record.data.model_dump() == provenance(files.train)
    assert len(record.held_out_rows) == 2 == len(of(bundle).held_out) and len(of(bundle).train) == 8
    assert "zebra" not in bundle.manifest.model_dump_json()


def test_the_last_tuning_is_recorded() -> None:
    first = {"data": {"path": "a", "sha256": "1"}}
    info: dict[str, Any] = {"made_by": "slm train"} | tuned_on(first)
    again = info | tuned_on({"data": {"path": "b", "sha256": "2"}, "held_out_rows": [3], "seed": 7})
    record = recorded_rows(again)
    assert record is not None and (record.data.path, record.held_out_rows) == ("b", (3,))
    assert recorded_rows(info | tuned_on({"r": 8})) is None  # an adapter of another program
    assert recorded_rows({}) is None and recorded_rows({RECORD: "x"}) is None and recorded_rows(None) is None


def test_samples_are_left_out_at_any_depth() -> None:
    run = {"samples": ["text"], "epochs": 2}
    info = {"samples": 3, "finetuned": run, "merged": {"finetune": run, "base": {}}}
    assert without_samples(info) == {
        "samples": 3,
        "finetuned": {"epochs": 2},
        "merged": {"finetune": {"epochs": 2}, "base": {}},
    }


def test_training_rows_are_rendered_as_in_training(tuned: Callable[..., Bundle], write_rows: WriteRows) -> None:
    data = write_rows(ROWS)
    bundle = tuned(data, held_out_rows=[2, 5])
    rows, renderer = of(bundle), Renderer(Tokenizer.load(bundle.path), bundle)
    prefix = len(renderer.tokenizer.prefix_ids)
    examples = [renderer.example(row).ids[prefix:] for row in read_rows(data)]
    held_out = rows.tokens(rows.held_out, bundle, 10_000)
    assert sorted(map(tuple, held_out)) == sorted([examples[1], examples[4]])
    train = rows.tokens(rows.train, bundle, 10_000)
    assert sorted(map(tuple, train)) == sorted(examples[:1] + examples[2:4] + examples[5:])
    assert train == rows.tokens(rows.train, bundle, 10_000)  # always in the same order
    assert [tuple(ids) for ids in train] != examples[:1] + examples[2:4] + examples[5:]
    few = rows.tokens(rows.train, bundle, 30)
    assert 30 <= sum(map(len, few)) < 30 + max(map(len, examples)) and few == train[: len(few)]
    # Rows of a task are left out.
    asked = {renderer.example(row).ids[: renderer.example(row).start] for row in read_rows(data)[5:]}
    left = rows.tokens(rows.train, bundle, 10_000, asked)
    assert sorted(map(tuple, left)) == sorted(examples[:1] + examples[2:4])


def test_rows_that_cannot_be_used_are_explained(tuned: Callable[..., Bundle], write_rows: WriteRows) -> None:
    data = write_rows(ROWS)
    bundle = tuned(data)
    data.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    assert own_rows(bundle) == f"{data} has changed since the model was fine-tuned on it"
    data.unlink()
    assert own_rows(bundle) == f"{data} does not exist"


def test_paths_that_a_bundle_from_elsewhere_names(
    tuned: Callable[..., Bundle], write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    many = tmp_path / "many"
    many.mkdir()
    for number in range(4):
        shutil.copy(write_rows(ROWS), many / f"{number}.jsonl")
    known = provenance(many)["sha256"]
    monkeypatch.setattr("slm.finetune.own_rows._MOST_ENTRIES", 3)
    for path, reason in (
        (tmp_path / "pipe.jsonl", "not a regular file: "),
        ("/dev/zero", "unknown kind of file: /dev/zero"),
        (many, f"{many} has more than 3 files"),
        ("rows\x1b[2J.jsonl", r"rows\x1b[2J.jsonl does not exist"),
        ("rows\0.jsonl", "rows\\x00.jsonl"),
        ("x" * 5000, "x" * 100),
    ):
        found = own_rows(tuned(write_rows(ROWS), data={"path": str(path), "sha256": known}))
        assert isinstance(found, str) and found.startswith(reason) and found.isprintable(), found
    monkeypatch.setattr("slm.finetune.own_rows._MOST_ENTRIES", 4)  # negative control
    assert len(of(tuned(write_rows(ROWS), data={"path": str(many), "sha256": known})).train) == 48


def test_of_rows_that_a_teacher_answered_the_prompts_are_read(
    tuned: Callable[..., Bundle], write_rows: WriteRows
) -> None:
    bundle = tuned(write_rows([{"prompt": "Say one"}, {"prompt": "Say", "completion": " two"}]), teacher={"path": "t"})
    tokenizer = Tokenizer.load(bundle.path)
    rows = of(bundle)
    texts = sorted(tokenizer.decode(ids) for ids in rows.tokens(rows.train, bundle, 1000))
    assert texts == ["Say one", "Say two"]


def quantized(slm: Slm, bundle: Bundle, *options: object) -> Any:
    result = slm("quantize", "--int8", bundle.path, "--max-kl", "1", *LITTLE, *options, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out), result.err


def test_quantization_calibrates_on_training_rows_and_measures_on_held_out_rows(
    slm: Slm, tuned: Callable[..., Bundle], write_rows: WriteRows
) -> None:
    data, held_out = write_rows(ROWS), write_rows(ROWS[::-1], "held-out.jsonl")
    bundle = tuned(data, validation=provenance(held_out))
    report, said = quantized(slm, bundle)
    assert report["calibration"] == f"the model's training rows, {data}"
    assert report["text"] == f"the model's held-out rows, {held_out}"
    assert f"Calibrating on {report['calibration']}; measuring on {report['text']}." in said
    text = Path("held-out.txt")
    text.write_text("Once there was a cat and a dog. " * 9, encoding="utf-8")
    given, _ = quantized(slm, bundle, "--data", text)
    assert given["text"] == str(text) and given["calibration"] == report["calibration"]
    # Fewer tokens than are calibrated with are filled up; few held-out rows are not measured on.
    few = tuned(write_rows(ROWS[:3], "few.jsonl"), held_out_rows=[1])
    report, said = quantized(slm, few)
    assert report["calibration"].endswith("few.jsonl and, to fill up, the training stories that ship with slm")
    assert report["text"] == "the stories that ship with slm"
    data.write_text("", encoding="utf-8")
    report, said = quantized(slm, tuned(held_out, data={"path": str(data), "sha256": "0"}))
    assert report["calibration"] == "the training stories that ship with slm"
    assert "The rows that the model was fine-tuned on are not used: " in said


def test_the_rows_of_a_task_are_never_calibrated_on(
    slm: Slm, tuned: Callable[..., Bundle], write_rows: WriteRows
) -> None:
    data = write_rows(ROWS)
    task = ("--task", data, "--metric", "exact", "--max-drop", "100%")
    report, said = quantized(slm, tuned(data), *task)
    assert report["calibration"] == "the training stories that ship with slm"
    assert "is left for calibration" in said
    part = write_rows(ROWS[:2], "part.jsonl")
    report, _ = quantized(slm, tuned(data), "--task", part, "--metric", "exact", "--max-drop", "100%")
    assert report["calibration"] == f"the model's training rows, {data}"
    copied = write_rows(ROWS, "copied.jsonl")
    for same in (data, copied):
        result = slm("quantize", "--int8", tuned(data).path, *task, "--calibration", same)
        assert result.code == 1 and "--calibration and --task are the same rows" in result.err


def test_a_bundle_that_was_not_tuned_uses_the_stories(slm: Slm, shared_bundle: Bundle, tmp_path: Path) -> None:
    report, said = quantized(slm, shared_bundle, "--out", tmp_path / "made")
    assert report["calibration"] == "the training stories that ship with slm"
    assert "fine-tuned" not in said


def test_a_directory_of_rows_is_read_too(tuned: Callable[..., Bundle], write_rows: WriteRows, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.move(write_rows(ROWS), folder / "a.jsonl")
    rows = of(tuned(folder))
    assert len(rows.train) == 12
    with pytest.raises(SlmError):
        read_rows(folder / "missing.jsonl")


def test_the_record_is_in_the_checkpoint(shared_checkpoint: Path, write_rows: WriteRows) -> None:
    settings = FinetuneSettings.checked(method="full", epochs=1)
    data, valid = write_rows(ROWS), write_rows(ROWS[:2], "valid.jsonl")
    made = finetune(shared_checkpoint, RowFiles(data, valid, skip_bad=True), Path("out"), settings, samples=0).made
    assert read_info(made)[RECORD] == {
        "data": provenance(data),
        "validation": provenance(valid),
        "skip_bad": True,
        "held_out_rows": [],
        "teacher": None,
    }
