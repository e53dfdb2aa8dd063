"""Checkpoints that are written in the background: the same files, at any moment a whole save, and errors that are reported."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.errors import SlmError
from slm.train import keep
from slm.train.learner import Learner
from slm.train.memory import training_bytes
from slm.train.precision import FLOAT32
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from slm.train.state import load_state
from slm.train.writer import AtOnce, Background
from tests.forks import Forks
from tests.progress import Notes, Stopper

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
OUT = Path("runs/small")
IN_BACKGROUND = {"every_updates": 1, "keep": 2, "asynchronous": True}


def without_recipe(found: dict[str, Any]) -> dict[str, Any]:
    """Drops the files that contain the recipe, which differs by the option."""
    return {name: value for name, value in found.items() if not name.endswith(("config.yaml", "slm.json"))}


@pytest.mark.parametrize("variant", ["everything", "rounded"])
def test_the_files_are_those_of_a_save_at_once(
    small_recipe: MakeRecipe, fingerprint: Fingerprint, variant: str
) -> None:
    train(small_recipe(variant, checkpoints={"every_updates": 1, "keep": 2}), Path("at-once"))
    recipe = small_recipe(variant, checkpoints=IN_BACKGROUND)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, OUT, Stopper(7))
    assert (OUT / "trainer").is_dir()
    resume(OUT)
    assert without_recipe(fingerprint(OUT)) == without_recipe(fingerprint(Path("at-once")))
    assert not any(thread.name == "checkpoint writer" for thread in threading.enumerate())


def test_training_goes_on_while_a_save_is_written(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is the state of the save, though the weights have changed meanwhile."""
    trained, saved_at = threading.Event(), []
    save_state = keep.save_state

    def slow(run: Path, counters: Any, optimizer: Any, *rest: Any) -> None:
        if not saved_at:
            assert trained.wait(60)  # of the next update
        saved_at.append(counters.micro_steps)
        before = {name: tensor.clone() for name, tensor in optimizer.items()}
        save_state(run, counters, optimizer, *rest)
        assert all(torch.equal(tensor, optimizer[name]) for name, tensor in before.items())

    class Trains(Notes):
        micro_steps = 0

        def advance(self, amount: int = 1, **fields: str) -> None:
            self.micro_steps += amount == 1
            if self.micro_steps == 4:  # the second update, after the save of the first
                trained.set()

    monkeypatch.setattr(keep, "save_state", slow)
    train(small_recipe(checkpoints=IN_BACKGROUND), OUT, Trains())
    assert saved_at == [2, 4, 6, 8, 10, 12, 12]


def test_tensors_that_training_changes_are_copied_and_the_copies_reused() -> None:
    shared, trained = Background(shared=True), {"a": torch.zeros(3)}
    copies = shared.kept("weights", trained)
    trained["a"] += 1
    assert copies["a"].tolist() == [0.0] * 3
    assert shared.kept("weights", trained)["a"] is copies["a"]
    assert copies["a"].tolist() == [1.0] * 3
    of_gpu = Background(shared=False)
    tensors = {"a": torch.zeros(3), "step": torch.tensor(1.0)}
    kept = of_gpu.kept("optimizer", tensors)
    assert kept["a"] is tensors["a"] and kept["step"] is not tensors["step"]
    assert AtOnce().kept("weights", trained)["a"] is trained["a"]


@pytest.mark.parametrize("at_end", [False, True])
def test_a_full_disk_is_reported_at_the_next_save_or_at_the_end(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, fingerprint: Fingerprint, at_end: bool
) -> None:
    recipe = small_recipe(checkpoints=IN_BACKGROUND)
    train(recipe, Path("uncut"))
    save_state = keep.save_state
    with monkeypatch.context() as patch:

        def full(run: Path, counters: Any, *rest: Any) -> None:
            if counters.micro_steps == (12 if at_end else 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "trainer"))
            save_state(run, counters, *rest)

        patch.setattr(keep, "save_state", full)
        number = 6 if at_end else 2
        with pytest.raises(SlmError) as error:
            train(recipe, OUT)
    assert error.value.message == (
        f"the save after update {number} failed in the background: no space left on the disk ({OUT / 'trainer'})"
    )
    assert error.value.hint == (
        f"free some space, then slm train --resume --out {OUT} continues from the save before it, which is complete"
    )
    state = load_state(OUT)
    assert state is not None and state.counters.micro_steps == (10 if at_end else 2)
    resume(OUT)
    assert fingerprint(OUT) == fingerprint(Path("uncut"))


def test_an_error_of_the_writer_does_not_replace_the_one_that_ends_the_run(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, notes: Notes
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the tensors cannot be written")

    def diverges(*_: object, **__: object) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(keep, "save_state", broken)
    update, numbers = Learner.update, iter(range(100))
    monkeypatch.setattr(Learner, "update", lambda *each: update(*each) if next(numbers) == 0 else diverges())
    with pytest.raises(SlmError, match=r"^update 2, micro-step 3: the loss is nan"):
        train(small_recipe(checkpoints=IN_BACKGROUND), OUT, notes)
    assert notes.lines[-1] == "warning: RuntimeError('the tensors cannot be written')"


KILLED = """
import os, signal
from slm.train import keep
save_state = keep.save_state
def killed(run, counters, *rest):
    if counters.micro_steps == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save_state(run, counters, *rest)
keep.save_state = killed
main(sys.argv[1:])
"""


def test_a_kill_while_a_save_is_written_leaves_the_one_before(
    small_recipe: MakeRecipe, trainers: Forks, fingerprint: Fingerprint
) -> None:
    recipe = small_recipe(checkpoints=IN_BACKGROUND)
    Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    ended = trainers(KILLED, "train", "--recipe", "recipe.yaml", "--out", "run")
    assert ended.returncode == -9
    state = load_state(Path("run"))
    assert state is not None and state.counters.micro_steps == 4
    resume(Path("run"))
    train(recipe, Path("uncut"))
    assert fingerprint(Path("run")) == fingerprint(Path("uncut"))


def test_the_copies_count_in_the_estimate(small_recipe: MakeRecipe) -> None:
    def snapshot(**sections: Any) -> tuple[int, int]:
        recipe = small_recipe(**sections)
        needed = training_bytes(recipe, recipe.model.config(), FLOAT32)
        return needed.snapshot, needed.weights

    assert snapshot()[0] == 0
    held, weights = snapshot(checkpoints={"asynchronous": True})
    assert held == 3 * weights  # AdamW's moments as well
    averaged, _ = snapshot(checkpoints={"asynchronous": True}, optimizer={"ema": 0.9})
    assert averaged == 5 * weights  # the average, and the weights of the checkpoint


def test_two_threads_may_read_the_umask(tmp_path: Path) -> None:
    """It is read by setting it; without a lock, two threads could leave it at 0."""
    from slm.core.files import atomic_directory

    umask = os.umask(0o027)
    try:

        def write(name: str) -> None:
            for _ in range(30):
                with atomic_directory(tmp_path / name, ("file",)) as directory:
                    (directory / "file").write_text("x")

        threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.umask(0o027) == 0o027
        assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)
