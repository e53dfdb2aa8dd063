"""Whole runs: what they leave, and that one cut in two is the one in one piece, bit for bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.core.progress import Silent
from slm.train import run as module
from slm.train.data.tokens import open_tokens
from slm.train.evaluate import Evaluation, evaluate
from slm.train.recipe import Recipe
from slm.train.run import resume, train

MakeRecipe = Callable[..., Recipe]
OUT = Path("runs/small")
TIMES = ("elapsed_s", "tokens_s")


class Stopper(Silent):
    """Sends this process a signal after so many micro-steps."""

    def __init__(self, micro_steps: int, signum: int = signal.SIGINT) -> None:
        self.left, self.signum = micro_steps, signum

    def advance(self, amount: int = 1, **fields: str) -> None:
        if amount == 1 and not fields:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything a run leaves but times: bytes of both checkpoints and of the optimizer, rows of the metrics."""
    files = [
        *run.glob("checkpoint/*/*"),
        *run.glob("data/*"),
        run / "trainer/optimizer.safetensors",
        run / "config.yaml",
    ]
    hashes: dict[str, Any] = {
        str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)
    }
    return hashes | {"rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]


def test_what_a_run_leaves(small_recipe: MakeRecipe) -> None:
    notes = Notes()
    result = train(small_recipe(), OUT, notes)
    assert sorted(path.name for path in OUT.iterdir()) == [
        "checkpoint", "config.yaml", "data", "loss.png", "metrics.jsonl", "trainer"
    ]  # fmt: skip
    assert result.checkpoint == OUT / "checkpoint/best"
    assert result.loss < result.loss_before
    assert (result.micro_steps, result.updates, result.tokens) == (12, 6, 12 * 4 * 24)
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 4, 8, 12]
    for row in rows(OUT):
        expected = {"train": {"learning_rate", "grad_norm", "tokens_s"}, "eval": {"perplexity", "bits_per_byte"}}
        assert row.keys() == {"type", "micro_steps", "updates", "tokens", "elapsed_s", "loss"} | expected[row["type"]]
    said = "\n".join(notes.lines)
    assert f"{result.parameters:,} parameters" in said
    assert "MiB" in said
    assert "device: CPU" in said


def test_the_checkpoint_is_what_was_measured(small_recipe: MakeRecipe) -> None:
    result = train(small_recipe(), OUT)
    model = load_checkpoint(result.checkpoint)
    tokenizer = module.Tokenizer.load(result.checkpoint)
    tokens = open_tokens(OUT / "data/validation.bin", tokenizer)
    measured = evaluate(model, tokens, windows=8, context=24, batch_size=4, check=lambda: None)
    assert measured.loss == result.loss
    assert measured.bits_per_byte == result.bits_per_byte
    header = tokens.header
    nats = measured.loss * header.tokens
    assert measured.bits_per_byte == pytest.approx(nats / header.text_bytes / 0.6931471805599453)
    assert model.config.bos_token_id == tokenizer.token_id("<|endoftext|>")
    assert model.config.stop_token_ids == (tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<end_of_turn>"))
    assert model.config.pad_token_id == tokenizer.token_id("<pad>")


def test_how_it_was_made_is_written_down(small_recipe: MakeRecipe) -> None:
    recipe = small_recipe()
    result = train(recipe, OUT)
    info = json.loads((result.checkpoint / "slm.json").read_text(encoding="utf-8"))
    assert info["metrics"]["loss"] == result.loss
    assert info["recipe"]["batch"] == recipe.model_dump(mode="json")["batch"]
    assert (
        info["parameters"]
        == result.parameters
        == sum(p.numel() for p in load_checkpoint(result.checkpoint).parameters())
    )
    assert info["torch_version"] == torch.__version__
    assert info["data"]["train"]["text_sha256"] != info["data"]["validation"]["text_sha256"]
    assert info["data"]["train"]["tokenizer_sha256"] == info["tokenizer_sha256"]


def test_the_seed_decides(small_recipe: MakeRecipe) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_recipe().model_copy(update={"seed": seed}), Path(name))
    weights = [(Path(name) / "checkpoint/last/model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.fixture
def uncut(small_recipe: MakeRecipe) -> dict[str, Any]:
    """What the run in one piece leaves."""
    train(small_recipe(), Path("uncut"))
    return fingerprint(Path("uncut"))


# Micro-step 5 is the first of an update, 8 the last before an evaluation, 1 before anything was saved.
@pytest.mark.parametrize("micro_steps", [1, 5, 8])
def test_a_run_cut_in_two_is_the_run_in_one_piece(
    small_recipe: MakeRecipe, uncut: dict[str, Any], micro_steps: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(micro_steps))
    assert leftovers(Path()) == []
    assert load_checkpoint(OUT / "checkpoint/last")
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_cut_twice_and_terminated(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(SystemExit) as done:
        train(small_recipe(), OUT, Stopper(3, signal.SIGTERM))
    assert done.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        resume(OUT, Stopper(4))
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_killed_between_two_files(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    # What `kill -9` can leave: a newer last checkpoint and newer metrics than trainer/, and half a line.
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(5))
    shutil.rmtree(OUT / "checkpoint/last")
    shutil.copytree("uncut/checkpoint/last", OUT / "checkpoint/last")
    metrics = OUT / "metrics.jsonl"
    newer = (Path("uncut") / "metrics.jsonl").read_text(encoding="utf-8")
    metrics.write_text(newer + '{"type": "tra', encoding="utf-8")
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_killed_while_its_state_was_replaced(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(5))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (OUT / "trainer").rename(OUT / f".trainer.replaced-{gone.stdout.strip()}")
    notes = Notes()
    resume(OUT, notes)
    assert any("going on after" in line for line in notes.lines)  # starting over would end the same, only later
    assert fingerprint(OUT) == uncut


def test_a_run_killed_before_it_saved_anything(small_recipe: MakeRecipe, uncut: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, Stopper(1))
    for name in ("trainer", "checkpoint"):
        shutil.rmtree(OUT / name)
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_resuming_a_finished_run_changes_nothing(uncut: dict[str, Any]) -> None:
    resume(Path("uncut"))
    assert fingerprint(Path("uncut")) == uncut


def test_the_saved_weights_outlive_the_checkpoint_they_were_linked_to(small_recipe: MakeRecipe) -> None:
    train(small_recipe(), OUT)
    trainer, last = (OUT / part / "model.safetensors" for part in ("trainer", "checkpoint/last"))
    assert trainer.samefile(last)
    tensors = safetensors.torch.load_file(trainer)
    shutil.rmtree(OUT / "checkpoint")
    assert safetensors.torch.load_file(trainer).keys() == tensors.keys()


def test_the_state_is_saved_while_it_runs(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save_state = module.save_state
    monkeypatch.setattr("slm.train.loop._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "save_state", lambda run, counters, *rest: (
        saved.append(counters.micro_steps), save_state(run, counters, *rest)
    ))  # fmt: skip
    train(small_recipe(), OUT)
    assert saved == [2, 4, 6, 8, 10, 12, 12]


def test_an_interval_that_no_update_meets_exactly(small_recipe: MakeRecipe) -> None:
    train(
        small_recipe(batch={"accumulation": 4}, evaluation={"every_micro_steps": 5}, schedule={"micro_steps": 15}), OUT
    )
    # Measured after the update that reaches 5 and 10, and at the end; 3 micro-steps are left over and fill no update.
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0, 8, 12]
    assert rows(OUT)[-1]["updates"] == 3


def test_a_loss_that_is_not_finite_stops_the_run(small_recipe: MakeRecipe) -> None:
    recipe = small_recipe(schedule={"learning_rate": 1e30}, optimizer={"weight_decay": 0.0})
    with pytest.raises(SlmError, match=r"update [23]: the (loss|gradient's norm) is (nan|inf)") as error:
        train(recipe, OUT)
    assert "checkpoint" in (error.value.hint or "")
    assert leftovers(OUT) == []


def test_the_best_is_kept_when_the_loss_rises_again(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 4.0, 3.0, 5.0])  # the one before the first update is no candidate
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: Evaluation(next(losses), bits_per_byte=1.0, tokens=1))
    result = train(small_recipe(), OUT)
    assert (result.loss_before, result.loss) == (1.0, 3.0)
    made = {name: json.loads((OUT / f"checkpoint/{name}/slm.json").read_text("utf-8")) for name in ("best", "last")}
    assert made["best"]["micro_steps"] == 8
    assert made["best"]["metrics"]["loss"] == 3.0
    assert made["last"]["micro_steps"] == 12
    assert made["last"]["metrics"]["loss"] == 5.0


@pytest.mark.parametrize(
    ("data", "batch", "message"),
    [
        ({"train": ["missing.txt"]}, {}, "data not found: missing.txt"),
        ({"tokenizer": "missing.json"}, {}, "tokenizer not found"),
        ({"validation": "short.txt"}, {}, "the validation text is too short"),
        ({"train": ["short.txt"], "validation": "stories.txt"}, {}, "the training text is too short"),
    ],
)
def test_a_failed_preparation_leaves_nothing(
    small_recipe: MakeRecipe, data: dict[str, Any], batch: dict[str, Any], message: str
) -> None:
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(SlmError, match=message):
        train(small_recipe(data=data, batch=batch), OUT)
    assert not OUT.parent.exists()


def test_an_interrupted_preparation_leaves_nothing(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slm.train.prepare._check_length", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT)
    assert not OUT.parent.exists()


def test_a_directory_that_is_taken_is_left_alone(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    (OUT / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SlmError, match="not empty") as error:
        train(small_recipe(), OUT)
    assert "--resume" in (error.value.hint or "")
    assert [path.name for path in OUT.iterdir()] == ["mine.txt"]


def test_an_empty_directory_will_do(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    assert train(small_recipe(), OUT).checkpoint.is_dir()


def test_resuming_what_is_no_run_or_damaged(small_recipe: MakeRecipe) -> None:
    with pytest.raises(SlmError, match="no run to go on with"):
        resume(OUT)
    train(small_recipe(), OUT)
    (OUT / "trainer/optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(SlmError, match="damaged"):
        resume(OUT)
    tokens = OUT / "data/train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(SlmError, match=r"train.bin"):
        resume(OUT)


def test_cuda_that_is_not_there(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SlmError, match="no CUDA device"):
        train(small_recipe(machine={"device": "cuda"}), OUT)
    assert not OUT.parent.exists()
