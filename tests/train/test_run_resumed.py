"""Resumed runs: a run cut in two leaves what the run in one piece leaves, bit for bit."""

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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.train import run as module
from slm.train.evaluate import Evaluation, evaluate
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from tests.precision import pretend_speedup
from tests.progress import Notes

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
Rows = Callable[[Path], list[dict[str, Any]]]
OUT = Path("runs/small")


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]


# Micro-step 5 is the first of an update, 8 the last before an evaluation, 1 before anything was saved.
@pytest.mark.parametrize("variant", ["plain", "everything", "sparing", "float16", "rounded"])
def test_a_run_cut_in_two_is_the_run_in_one_piece(
    small_recipe: MakeRecipe, variant: str, stopper: Any, fingerprint: Fingerprint
) -> None:
    recipe = small_recipe(variant)
    train(recipe, Path("uncut"))
    for micro_steps in (1, 5, 8):
        cut = Path(f"cut-{micro_steps}")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, cut, stopper(micro_steps))
        assert leftovers(Path()) == []
        assert load_checkpoint(cut / "checkpoint/last")
        resume(cut)
        assert fingerprint(cut) == fingerprint(Path("uncut")), micro_steps


def test_a_resumed_run_keeps_its_precision_when_the_measurement_changes(
    small_recipe: MakeRecipe, stopper: Any, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("plain", machine={"precision": "auto"})
    pretend_speedup(monkeypatch, 2.0)
    train(recipe, Path("uncut"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, Path("cut"), stopper(5))
    pretend_speedup(monkeypatch, 0.5)
    heard = Notes()
    resume(Path("cut"), heard)
    assert fingerprint(Path("cut")) == fingerprint(Path("uncut"))
    assert any("bfloat16 autocast" in line for line in heard.lines)
    train(recipe, Path("float32"))
    assert fingerprint(Path("float32")) != fingerprint(Path("uncut"))


def nudge(file: Path, tensor: str) -> None:
    """Makes one value of a saved tensor a hundredth larger."""
    tensors = safetensors.torch.load_file(file)
    (name,) = (name for name in tensors if name.endswith(tensor))
    values = tensors[name].flatten()
    values[values.abs().argmax()] *= 1.01
    safetensors.torch.save_file(tensors, file)


def miscount(file: Path, micro_steps: str) -> None:
    state = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(state | {"micro_steps": int(micro_steps)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("variant", "alter", "file", "what"),
    [
        ("plain", nudge, "optimizer.safetensors", "layers.1.mlp.up_proj.weight/exp_avg"),
        ("plain", nudge, "optimizer.safetensors", "layers.0.mlp.up_proj.weight/exp_avg_sq"),
        ("plain", miscount, "state.json", "4"),
        ("everything", nudge, "optimizer.safetensors", "layers.1.mlp.up_proj.weight/momentum_buffer"),
        ("everything", nudge, "optimizer.safetensors", "embed_tokens.weight/exp_avg"),
        ("everything", nudge, "average.safetensors", "layers.1.mlp.up_proj.weight"),
        ("everything", nudge, "model.safetensors", "layers.1.mlp.up_proj.weight"),
        ("everything", miscount, "state.json", "4"),
        ("sparing", nudge, "optimizer.safetensors", "layers.1.mlp.up_proj.weight/row_moment"),
        ("sparing", nudge, "average.safetensors", "layers.1.mlp.up_proj.weight"),
        ("sparing", miscount, "state.json", "4"),
    ],
    ids=[
        *("first-moment", "second-moment", "counter", "momentum", "embedding", "average", "weights", "counter-of-all"),
        *("row-moment", "tail", "counter-of-the-sparing"),
    ],
)
def test_what_is_saved_is_what_the_run_goes_on_from(
    small_recipe: MakeRecipe, variant: str, alter: Callable[[Path, str], None], file: str, what: str, stopper: Any
) -> None:
    """The control of the test above: with any of it altered the end is another."""
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(variant), OUT, stopper(7))  # after three updates
    shutil.copytree(OUT, "altered")
    # in the copy alone: files of a run may be links to each other
    altered = Path("altered/trainer", file)
    alter(altered, what)
    for run in (OUT, Path("altered")):
        resume(run)
    ends = [(run / "checkpoint/last/model.safetensors").read_bytes() for run in (OUT, Path("altered"))]
    assert ends[0] != ends[1]


def test_a_run_with_an_average_stopped_while_it_is_measured(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, fingerprint: Fingerprint, rows: Rows
) -> None:
    """Then the average is in the place of the weights: it must not be saved as them."""
    recipe = small_recipe("everything")
    train(recipe, Path("uncut"))
    calls = iter(range(100))

    def stopped(*arguments: Any, **settings: Any) -> Evaluation:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(module, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, OUT)
    assert [row["micro_steps"] for row in rows(OUT) if row["type"] == "eval"] == [0]
    resume(OUT)
    assert fingerprint(OUT) == fingerprint(Path("uncut"))


def test_a_run_cut_twice_and_terminated(
    small_recipe: MakeRecipe, uncut: dict[str, Any], stopper: Any, fingerprint: Fingerprint
) -> None:
    with pytest.raises(SystemExit) as done:
        train(small_recipe(), OUT, stopper(3, signal.SIGTERM))
    assert done.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        resume(OUT, stopper(4))
    resume(OUT)
    assert fingerprint(OUT) == uncut


@pytest.fixture
def cut(small_recipe: MakeRecipe, stopper: Any) -> None:
    """A run in `OUT` that was stopped in its third update."""
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, stopper(5))


def test_a_run_killed_between_two_files(
    cut: None, uncut: dict[str, Any], whole_run: Path, fingerprint: Fingerprint
) -> None:
    # What `kill -9` can leave: a newer last checkpoint and newer metrics than trainer/, and half a line.
    shutil.rmtree(OUT / "checkpoint/last")
    shutil.copytree(whole_run / "checkpoint/last", OUT / "checkpoint/last")
    metrics = OUT / "metrics.jsonl"
    newer = (whole_run / "metrics.jsonl").read_text(encoding="utf-8")
    metrics.write_text(newer + '{"type": "tra', encoding="utf-8")
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_a_run_killed_while_its_state_was_replaced(
    cut: None, uncut: dict[str, Any], notes: Any, fingerprint: Fingerprint
) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (OUT / "trainer").rename(OUT / f".trainer.replaced-{gone.stdout.strip()}")
    resume(OUT, notes)
    assert any("going on after" in line for line in notes.lines)  # starting over would end the same, only later
    assert fingerprint(OUT) == uncut


def test_a_run_killed_before_it_saved_anything(
    small_recipe: MakeRecipe, uncut: dict[str, Any], stopper: Any, fingerprint: Fingerprint
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, stopper(1))
    for name in ("trainer", "checkpoint"):
        shutil.rmtree(OUT / name)
    resume(OUT)
    assert fingerprint(OUT) == uncut


def test_resuming_a_finished_run_changes_nothing(
    finished: Path, uncut: dict[str, Any], fingerprint: Fingerprint
) -> None:
    resume(finished)
    assert fingerprint(finished) == uncut


@pytest.mark.draws
def test_tensorboard_shows_a_resumed_run_as_its_rows_do(small_recipe: MakeRecipe, stopper: Any, rows: Rows) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT, stopper(7))
    resume(OUT)
    events = EventAccumulator(str(OUT / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for kind, heading in (("train", "train"), ("eval", "validation")):
        shown = [event.value for event in events.Scalars(f"{heading}/loss")]
        losses = [row["loss"] for row in rows(OUT) if row["type"] == kind]
        assert shown == pytest.approx(losses, rel=1e-6)  # float32
        assert len(shown) == {"train": 6, "eval": 4}[kind]
    assert (OUT / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_on_demand_and_the_run_goes_on(
    small_recipe: MakeRecipe, uncut: dict[str, Any], stopper: Any, fingerprint: Fingerprint
) -> None:
    class Asker(stopper):
        def __init__(self) -> None:
            super().__init__(5, signal.SIGUSR1)
            self.lines: list[str] = []
            self.saved: list[int] = []

        def note(self, text: str) -> None:
            self.lines.append(text)
            if "as asked" in text:
                state = json.loads((OUT / "trainer/state.json").read_text(encoding="utf-8"))
                assert load_checkpoint(OUT / "checkpoint/last")
                self.saved.append(state["micro_steps"])

    asker = Asker()
    train(small_recipe(), OUT, asker)
    assert asker.saved == [6]  # the end of the update in which it was asked for, once
    assert any("checkpoint after 3 updates, as asked" in line for line in asker.lines)
    assert fingerprint(OUT) == uncut


def test_resuming_what_is_no_run_or_damaged(small_recipe: MakeRecipe, finished: Path) -> None:
    with pytest.raises(SlmError, match="no run to go on with"):
        resume(Path("nothing"))
    (OUT / "trainer/optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(SlmError, match="damaged"):
        resume(OUT)
    train(small_recipe(optimizer={"ema": 0.9}), Path("averaged"))
    Path("averaged/trainer/average.safetensors").unlink()
    with pytest.raises(SlmError, match="the saved average of the weights lacks"):
        resume(Path("averaged"))
    tokens = OUT / "data/train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(SlmError, match=r"train.bin"):
        resume(OUT)


def test_a_run_whose_state_is_gone_does_not_start_over(finished: Path) -> None:
    shutil.rmtree(finished / "trainer")
    with pytest.raises(SlmError, match="the state to go on from is gone"):
        resume(finished)
