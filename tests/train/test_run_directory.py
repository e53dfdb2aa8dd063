"""The directory of a run: which directories a run may use, and what it leaves in them when it fails."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.train import run as module
from slm.train.evaluate import Evaluation, evaluate
from slm.train.recipe import Recipe
from slm.train.run import resume, train

MakeRecipe = Callable[..., Recipe]
Fingerprint = Callable[[Path], dict[str, Any]]
OUT = Path("runs/small")


@pytest.mark.parametrize(
    ("data", "batch", "message"),
    [
        ({"train": ["missing.txt"]}, {}, "data not found: missing.txt"),
        ({"tokenizer": "missing.json"}, {}, "tokenizer not found"),
        ({"validation": "short.txt"}, {}, "the validation text is too short"),
        ({"train": ["short.txt"], "validation": "enough.txt"}, {}, "the training text is too short"),
    ],
)
def test_a_failed_preparation_leaves_nothing(
    small_recipe: MakeRecipe, story_file: Path, data: dict[str, Any], batch: dict[str, Any], message: str
) -> None:
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    shutil.copy(story_file, "enough.txt")
    with pytest.raises(SlmError, match=message):
        train(small_recipe(data=data, batch=batch), OUT)
    assert not OUT.parent.exists()


def test_an_interrupted_preparation_leaves_nothing(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slm.train.prepare.check_lengths", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), OUT)
    assert not OUT.parent.exists()


def test_a_directory_that_is_taken_is_left_alone(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    (OUT / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SlmError, match="not empty") as error:
        train(small_recipe(), OUT)
    assert error.value.hint == "name another with --out"  # there is nothing to --resume
    assert [path.name for path in OUT.iterdir()] == ["mine.txt"]


def test_a_run_that_saved_something_is_left_alone(
    small_recipe: MakeRecipe, finished: Path, fingerprint: Fingerprint
) -> None:
    before = fingerprint(OUT)
    for gone in (
        (),
        ("trainer",),
        ("checkpoint/last", "checkpoint/best"),
    ):  # what there is of it may be all that is left
        for path in gone:
            shutil.move(OUT / path, Path(path.replace("/", "-")))
        with pytest.raises(SlmError, match="not empty") as error:
            train(small_recipe(), OUT)
        assert f"slm train --resume --out {OUT} goes on with the run" in (error.value.hint or "")
        for path in gone:
            shutil.move(Path(path.replace("/", "-")), OUT / path)
    assert fingerprint(OUT) == before


def test_an_empty_directory_will_do(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    assert train(small_recipe(), OUT).checkpoint.is_dir()


@pytest.fixture
def diverged(small_recipe: MakeRecipe) -> None:
    """A run that ended before it saved anything."""
    with pytest.raises(SlmError, match="update 2"):
        train(small_recipe(schedule={"learning_rate": 1e30}, optimizer={"weight_decay": 0.0}), OUT)
    assert (OUT / "metrics.jsonl").is_file() and not (OUT / "trainer").exists()


def test_a_run_that_saved_nothing_gives_way(
    small_recipe: MakeRecipe, uncut: dict[str, Any], diverged: None, notes: Any, fingerprint: Fingerprint
) -> None:
    for name in (
        ".data.partial-1/train.bin",
        "checkpoint/.best.partial-1/config.json",
        ".trainer.partial-1/state.json",
    ):
        (OUT / name).parent.mkdir(parents=True)  # as killed runs leave them
        (OUT / name).touch()
    train(small_recipe(), OUT, notes)
    assert fingerprint(OUT) == uncut
    assert any("saved nothing: starting anew there" in line for line in notes.lines)


def test_a_preparation_that_was_killed_gives_way(
    small_recipe: MakeRecipe, uncut: dict[str, Any], fingerprint: Fingerprint
) -> None:
    (OUT / ".data.partial-1").mkdir(parents=True)
    train(small_recipe(), OUT)
    assert fingerprint(OUT) == uncut


@pytest.mark.parametrize(
    "add",
    [
        lambda: (OUT / "notes.txt").touch(),
        lambda: (OUT / "data/notes.txt").touch(),
        lambda: (OUT / "mine").mkdir(),
        lambda: (OUT / "data/train-00000.bin").touch(),  # of slm data prepare, which may have taken hours
        lambda: (OUT / "loss.png").unlink() or (OUT / "loss.png").symlink_to("/dev/null"),
        lambda: (OUT / "config.yaml").unlink(),  # then it may be anybody's
    ],
    ids=["file", "file-in-data", "directory", "dataset", "link", "no-recipe"],
)
def test_what_a_run_did_not_make_does_not(small_recipe: MakeRecipe, diverged: None, add: Callable[[], object]) -> None:
    add()
    before = sorted(OUT.rglob("*"))
    with pytest.raises(SlmError, match="not empty"):
        train(small_recipe(), OUT)
    assert sorted(OUT.rglob("*")) == before


def test_nothing_gives_way_to_a_run_that_cannot_be_prepared(small_recipe: MakeRecipe, diverged: None) -> None:
    before = sorted(OUT.rglob("*"))
    with pytest.raises(SlmError, match="data not found"):
        train(small_recipe(data={"train": ["missing.txt"]}), OUT)
    assert sorted(OUT.rglob("*")) == before


def test_a_directory_that_another_process_works_in(small_recipe: MakeRecipe, diverged: None) -> None:
    before = sorted(OUT.rglob("*"))
    hold = "import sys, time; from pathlib import Path; from slm.core.locks import held\nwith held(Path(sys.argv[1])):"
    program = f"{hold}\n    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(OUT)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for work in (lambda: train(small_recipe(), OUT), lambda: resume(OUT)):
            with pytest.raises(SlmError, match=r"another process \(\d+\) is at work in"):
                work()
        assert sorted(OUT.rglob("*")) == before
    finally:
        process.kill()
        process.wait()
    assert train(small_recipe(), OUT).checkpoint.is_dir()  # the system let go of it


def test_a_run_is_held_while_it_trains(small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(*arguments: Any, **settings: Any) -> Evaluation:
        with pytest.raises(SlmError, match=r"another process \(\d+\) is at work in"):
            train(small_recipe(), OUT)
        seen.append(OUT)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(module, "evaluate", measured)
    assert train(small_recipe(), OUT).updates == 6
    assert len(seen) == 4


def test_without_locks_a_run_can_be_made_and_none_gives_way(
    small_recipe: MakeRecipe, diverged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(SlmError, match="not empty"):
        train(small_recipe(), OUT)
    assert train(small_recipe(), Path("another")).checkpoint.is_dir()


def test_what_a_failed_preparation_made_in_a_directory_is_removed(small_recipe: MakeRecipe) -> None:
    OUT.mkdir(parents=True)
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(SlmError, match="too short"):
        train(small_recipe(data={"validation": "short.txt"}), OUT)
    assert list(OUT.iterdir()) == []
