"""`slm train`: exit code, message, and nothing half made."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slm.core.tokenizer import END_OF_TEXT

SMALL = """
name: small
model: {preset: tiny, vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}
batch: {batch_size: 4, context: 24}
schedule: {micro_steps: 6, warmup_micro_steps: 2, learning_rate: 0.003, final_learning_rate: 0.0003}
evaluation: {every_micro_steps: 3, windows: 8}
machine: {device: cpu, precision: float32}
"""


@pytest.fixture(autouse=True)
def files(stories: list[str]) -> None:
    """A recipe and text in the test's directory."""
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    for name, part in (("train.txt", stories[:40]), ("valid.txt", stories[40:50])):
        Path(name).write_text("".join(f"{story.strip()}\n{END_OF_TEXT}\n" for story in part), encoding="utf-8")


TRAIN = ("train", "--recipe", "small.yaml", "--data", "train.txt", "--val", "valid.txt")


def config(run: str = "runs/small") -> dict[str, Any]:
    return yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))


def test_a_run(slm: Callable) -> None:
    result = slm(*TRAIN)
    assert result.code == 0, result.err
    assert "runs/small/checkpoint/best" in result.out
    assert "parameters" in result.err
    assert Path("runs/small/checkpoint/best/model.safetensors").is_file()
    assert config()["data"]["train"] == [str(Path("train.txt").resolve())]
    assert config()["data"]["validation"] == str(Path("valid.txt").resolve())


def test_json(slm: Callable) -> None:
    result = slm(*TRAIN, "--json", "--out", "here")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["checkpoint"] == "here/checkpoint/best"
    assert report["loss"] < report["loss_before"]
    assert report["tokens"] == 6 * 4 * 24
    assert report.keys() >= {"perplexity", "bits_per_byte", "tokens_s", "elapsed_s", "peak_rss_mib", "parameters"}


def test_options_reach_the_recipe(slm: Callable) -> None:
    slm(*TRAIN, "--out", "first")
    result = slm(
        *TRAIN, "--data", "valid.txt", "--tokenizer", "first/checkpoint/best/tokenizer.json", "--seed", 7,
        "--set", "batch.batch_size=2", "--set", "schedule.micro_steps=3",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert config()["data"]["train"] == [str(Path(name).resolve()) for name in ("train.txt", "valid.txt")]
    assert config()["data"]["tokenizer"] == str(Path("first/checkpoint/best/tokenizer.json").resolve())
    assert (config()["seed"], config()["batch"]["batch_size"]) == (7, 2)
    tokenizers = [Path(run, "data/tokenizer.json").read_bytes() for run in ("first", "runs/small")]
    assert tokenizers[0] == tokenizers[1]


def test_a_saved_config_is_a_recipe(slm: Callable) -> None:
    slm(*TRAIN)
    result = slm("train", "--recipe", "runs/small/config.yaml")
    assert result.code == 0, result.err
    weights = [Path("runs", run, "checkpoint/last/model.safetensors").read_bytes() for run in ("small", "small-2")]
    assert weights[0] == weights[1]


def test_jsonl_and_directories(slm: Callable) -> None:
    Path("rows").mkdir()
    for number, story in enumerate(Path("train.txt").read_text(encoding="utf-8").split(END_OF_TEXT)):
        with Path(f"rows/{number % 3}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": story}) + "\n")
    result = slm("train", "--recipe", "small.yaml", "--data", "rows")
    assert result.code == 0, result.err
    assert "the last 5 documents of it" in result.err


def test_no_data_takes_the_recipes_and_says_so(slm: Callable) -> None:
    result = slm("train", "--recipe", "small.yaml")
    assert result.code == 0, result.err
    assert "Using the data sample (of the recipe small; --data names other text)." in result.err


def test_the_recipe_that_fits_the_machine_is_taken_and_named(slm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("slm.train.estimate._timed_seconds", lambda *_: pytest.fail("it was measured"))
    result = slm("train", "--data", "train.txt", "--set", "data.tokenizer=nothing.json")
    assert result.code == 1 and "Using the recipe tiny (this machine has no GPU)." in result.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (
        "Using the recipe documented (this machine has a GPU)."
        in slm("train", "--set", "data.tokenizer=nothing.json").err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "missing.txt"], 1, "error: data not found: missing.txt"),
        (["--val", "missing.txt"], 1, "error: data not found: missing.txt"),
        (["--data", "book.pdf"], 1, "error: unknown kind of file: book.pdf"),
        (["--data", "empty.txt"], 1, "error: no text in empty.txt"),
        (["--data", "binary.txt"], 1, "error: binary.txt: is not UTF-8 text"),
        (["--data", "rows.jsonl"], 1, 'error: rows.jsonl, line 1: is not a row with a "text"'),
        (["--data", "nothing"], 1, "error: no .txt, .jsonl or .parquet file in nothing"),
        (["--val", "short.txt"], 1, "error: the validation text is too short"),
        (["--data", "sample"], 1, "error: --data sample cannot be combined with other data"),
        (["--tokenizer", "missing.json"], 1, "error: tokenizer not found: missing.json"),
        (["--recipe", "huge"], 1, "error: recipe not found: huge"),
        (["--set", "batch.size=3"], 1, "error: --set batch.size=3: the recipe has no value 'batch.size'"),
        (["--set", "batch.context=many"], 1, "error: small.yaml: batch.context: must be a whole number\n"),
        (["--set", "optimizer.betas=3"], 1, "error: small.yaml: optimizer.betas: must be a list, as in [a, b]\n"),
        (["--set", "machine.compile=perhaps"], 1, "error: small.yaml: machine.compile: must be true or false\n"),
        (
            ["--set", "schedule.epochs=2", "--set", "schedule.micro_steps=3"],
            1,
            "error: small.yaml: schedule: the length is",
        ),
        (["--set", "machine.attention=flex"], 1, "error: machine.attention=flex needs CUDA"),
        (["--set", "optimizer.betas=[0.9, 1.5]"], 1, "error: small.yaml: optimizer.betas"),
        (["--seed", "-1"], 2, "error: Invalid value for '--seed': -1 is not in the range"),
        (["--out", "taken"], 1, "error: the run directory is not empty: taken"),
        (["--out", "train.txt"], 1, "error: not a directory: train.txt"),
        (["--seed", "x"], 2, "error: Invalid value for '--seed'"),
        (["--epochs", "3"], 2, "error: No such option"),
        (["--resume"], 2, "error: --resume uses the run's own settings: leave out --recipe, --data, --val"),
    ],
)
def test_mistakes(slm: Callable, arguments: list[str], code: int, message: str) -> None:
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("short.txt").write_text("Short.", encoding="utf-8")
    Path("book.pdf").write_text("%PDF", encoding="utf-8")
    Path("binary.txt").write_bytes(b"\x80\x81\x82")
    Path("rows.jsonl").write_text('{"story": "x"}\n', encoding="utf-8")
    Path("nothing").mkdir()
    Path("taken").mkdir()
    Path("taken/mine").touch()
    before = sorted(Path().rglob("*"))
    result = slm(*TRAIN, *arguments)
    assert result.code == code
    assert message in result.err
    assert result.err.count("error:") == 1
    assert "Traceback" not in result.err
    assert result.out == ""
    assert sorted(Path().rglob("*")) == before


def test_resume_takes_the_newest_run(slm: Callable) -> None:
    slm(*TRAIN)
    slm(*TRAIN)
    result = slm("train", "--resume")
    assert result.code == 0, result.err
    assert "Resuming runs/small-2." in result.err
    assert "Resuming runs/small.\n" in slm("train", "--resume", "--out", "runs/small").err
    assert "Resuming runs/small.\n" in slm("train", "--resume", "--out", "small").err  # a run's name


def test_resume_without_a_run(slm: Callable) -> None:
    result = slm("train", "--resume")
    assert result.code == 1
    assert "error: there is no run under ./runs" in result.err
    assert "hint: start one with slm train" in result.err


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_is_one_line_and_what_to_lower(
    slm: Callable, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise failure

    monkeypatch.setattr("slm.train.learner.linear_cross_entropy", fail)
    result = slm(*TRAIN)
    assert result.code == 1
    assert result.err.count("error:") == 1
    assert "error: out of memory at micro-step 1\n" in result.err
    assert "--set batch.batch_size=2 --set batch.accumulation=2 saves about" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_loss_that_is_not_finite_is_one_line_and_what_to_try(slm: Callable) -> None:
    result = slm(*TRAIN, "--set", "schedule.learning_rate=1e30", "--set", "checkpoints.every_updates=1")
    assert result.code == 1
    assert result.err.count("error:") == 1
    assert "error: update 2, micro-step 2: the" in result.err
    assert "the last checkpoint is runs/small/checkpoint/last; try a lower schedule.learning_rate" in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_a_process_saves_when_asked_and_when_interrupted_and_can_be_gone_on_with(slm: Callable) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "slm", *TRAIN, "--set", "schedule.micro_steps=100000"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, state = Path("runs/small/metrics.jsonl"), Path("runs/small/trainer/state.json")

    def wait(rows: int, saved: bool) -> None:
        deadline = time.monotonic() + 60
        while (
            state.is_file() is not saved
            or len(metrics.read_text("utf-8").splitlines() if metrics.is_file() else ()) < rows
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)

    wait(5, saved=False)
    process.send_signal(signal.SIGUSR1)
    wait(5, saved=True)
    saved = json.loads(state.read_text(encoding="utf-8"))["micro_steps"]
    assert Path("runs/small/checkpoint/last/model.safetensors").is_file()
    wait(len(metrics.read_text(encoding="utf-8").splitlines()) + 5, saved=True)  # it goes on
    process.send_signal(signal.SIGINT)  # tests/train/test_interrupt.py has SIGTERM
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saving the run" in err and "Traceback" not in err
    assert [path for path in Path("runs").rglob("*") if ".partial-" in path.name] == []
    assert f"checkpoint after {saved:,} updates, as asked" in err
    done = json.loads(state.read_text(encoding="utf-8"))["micro_steps"]
    assert done > saved
    config = Path("runs/small/config.yaml")
    config.write_text(config.read_text(encoding="utf-8").replace("100000", str(done + 2)), encoding="utf-8")
    result = slm("train", "--resume")
    assert result.code == 0, result.err
    assert f"going on after {done:,} micro-steps" in result.err


def test_help_teaches(slm: Callable) -> None:
    result = slm("train", "--help")
    assert result.code == 0
    for expected in ("slm train --resume", "--set schedule.learning_rate=1e-3", END_OF_TEXT, '{"text"'):
        assert expected in result.out
