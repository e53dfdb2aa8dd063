"""Preparation that is interrupted, killed or fails: it continues with the same bytes, or starts over if its input changed."""

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

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.train.data import preparation, shards, workers
from tests.progress import Notes
from tests.train.preparing import END, all_ended, contents, make
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("stories_txt")


def work_of(out: str) -> Path:
    return Path(f".{out}.unfinished")


class Stop(Silent):
    """Raises an error when more than a number of documents of the training text are done."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def start(self, name: str, total: int | None, unit: str) -> None:
        self.counts = "train" in name

    def advance(self, amount: int = 1, **fields: str) -> None:
        self.left -= amount if self.counts else 0
        if self.left < 0:
            raise self.error


def test_an_interrupted_preparation_continues(small_batches: None, pools: list[workers._Pool]) -> None:
    make("whole", "stories.txt", deduplicate=True)
    for after, count in ((0, 2), (60, 1), (60, 2), (150, 1)):
        out = f"cut-{after}-{count}"
        with pytest.raises(KeyboardInterrupt):
            make(out, "stories.txt", deduplicate=True, workers=count, progress=Stop(after, KeyboardInterrupt))
        assert not Path(out).exists()
        assert all_ended(pools)
        done = sorted(path.name for path in work_of(out).glob("*.bin"))
        assert "validation-00000.bin" in done
        kept = {name: (work_of(out) / name).stat().st_mtime_ns for name in done}
        notes = Notes()
        make(out, "stories.txt", deduplicate=True, workers=3 - count, progress=notes)
        assert contents(out) == contents("whole"), out
        assert not work_of(out).exists()
        assert f"going on after {len(done)} finished shards" in "\n".join(notes.lines)
        assert {name: Path(out, name).stat().st_mtime_ns for name in done} == kept  # they were not made again


COMMAND = ("data", "prepare", "--vocab-size", "300", "--shard-tokens", "10000", "--dedup", "--workers", "2")


def test_a_killed_command_continues(stories: list[str], slm: Callable) -> None:
    lines = "".join(f"{number} {story.strip()}{END}" for number in range(60) for story in stories[:60])
    Path("long.txt").write_text(lines, encoding="utf-8")
    assert slm(*COMMAND, "--data", "long.txt", "--out", "whole").code == 0
    for signum, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        out = f"cut-{code}"
        process = subprocess.Popen(
            [sys.executable, "-m", "slm", *COMMAND, "--data", "long.txt", "--out", out],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for((work_of(out) / "train-00002.bin").exists, every=0.002)
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in err
        assert not Path(out).exists()
        result = slm(*COMMAND, "--data", "long.txt", "--out", out)
        assert result.code == 0, result.err
        assert "going on after" in result.err
        assert contents(out) == contents("whole")
    assert not list(Path().glob(".*unfinished*"))


def interrupted(out: str, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(out, "stories.txt", progress=Stop(60, KeyboardInterrupt), **options)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_worker_outlives_a_killed_command(tokenizer: Tokenizer) -> None:
    tokenizer.save(Path())
    code = """
import sys
from itertools import count
from pathlib import Path
from slm.core.tokenizer import Tokenizer
from slm.train.data import workers

workers._WORTH_WORKERS, workers._BATCH_CHARACTERS = 1, 1000
start = workers._Pool.__init__
def noted(self, *arguments):
    start(self, *arguments)
    print(*(process.pid for process in self._processes), flush=True)
workers._Pool.__init__ = noted
for batch in workers.encoded((f"story {n}" for n in count()), Tokenizer.load(Path()), Path("tokenizer.json"), 2):
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(1)  # they work
    process.kill()
    assert process.communicate(timeout=30)[1] == ""  # which also waits for the workers, which hold standard error
    wait_for(lambda: not any(map(alive, pids)), seconds=10)


def test_another_text_starts_over(small_batches: None, stories: list[str]) -> None:
    interrupted("cut")
    with Path("stories.txt").open("a", encoding="utf-8") as file:
        file.write(f"One more story.{END}")
    notes = Notes()
    make("cut", "stories.txt", progress=notes)
    make("whole", "stories.txt")
    assert any(line.startswith("starting over") for line in notes.lines)
    assert not any(line.startswith("going on") for line in notes.lines)
    assert contents("cut") == contents("whole")


@pytest.mark.parametrize(
    "changed", [{"shard_tokens": 1500}, {"vocab_size": 310}, {"deduplicate": True}, {"licence": "x"}]
)
def test_other_settings_start_over(small_batches: None, changed: dict[str, object]) -> None:
    interrupted("cut")
    notes = Notes()
    make("cut", "stories.txt", progress=notes, **changed)
    make("whole", "stories.txt", **changed)
    assert any(line.startswith("starting over") for line in notes.lines)
    assert contents("cut") == contents("whole")


@pytest.mark.parametrize("change", ["column", "split"])
def test_the_tokenizer_of_another_text_is_not_kept(
    small_batches: None, stories: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A killed command leaves the tokenizer before the first shard."""
    for name, texts in (("a", stories[:40]), ("b", stories[40:80]), ("c", stories[80:85])):
        rows = ({"text": text, "other": text.upper()} for text in texts)
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("more").mkdir()
    for name in ("b", "c"):
        Path(f"more/{name}.jsonl").hardlink_to(f"{name}.jsonl")
    arguments: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "before": (("a.jsonl", "more/b.jsonl"), {"val": "more/c.jsonl"}),
        "column": (("a.jsonl", "more/b.jsonl"), {"val": "more/c.jsonl", "reading": {"column": "other"}}),
        "split": (("a.jsonl",), {"val": "more"}),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation.renames, "remove_leftovers", lambda path: None)
        make("cut", *arguments["before"][0], **arguments["before"][1], progress=Stop(0, KeyboardInterrupt))
    assert (work_of("cut") / "tokenizer.json").is_file()
    data, options = arguments[change]
    make("cut", *data, **options)
    make("whole", *data, **options)
    assert contents("cut") == contents("whole")


def test_a_change_that_keeps_size_and_time_is_found(small_batches: None) -> None:
    """Finished text with the same size and time, and one other letter, has another hash."""
    interrupted("cut")
    file = Path("stories.txt")
    before = file.stat()
    file.write_text("Q" + file.read_text(encoding="utf-8")[1:], encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SlmError, match=r"train-00000.bin was made from another text"):
        make("cut", "stories.txt")
    notes = Notes()
    make("cut", "stories.txt", progress=notes)
    assert any(line.startswith("starting over") for line in notes.lines)


def test_a_killed_worker_is_one_clear_error(
    small_batches: None, pools: list[workers._Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killer(Stop):
        def advance(self, amount: int = 1, **fields: str) -> None:
            if self.counts and not all_ended(pools):
                pools[-1]._processes[0].kill()

    started = time.monotonic()
    with pytest.raises(SlmError, match=r"a tokenizing worker \(process \d+\) was killed \(SIGKILL\)") as error:
        make("cut", "stories.txt", workers=2, progress=Killer(0, KeyboardInterrupt))
    assert "fewer --workers" in (error.value.hint or "")
    assert time.monotonic() - started < 30
    assert all_ended(pools)
    make("cut", "stories.txt")
    make("whole", "stories.txt")
    assert contents("cut") == contents("whole")


def test_a_full_disk_is_one_error_and_the_preparation_continues(
    small_batches: None, slm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = shards.TokenFileWriter.add, [150]

    def add(self: shards.TokenFileWriter, text: bytes, ids: bytes, documents: int) -> None:
        left[0] -= documents
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, text, ids, documents)

    arguments = ("data", "prepare", "--data", "stories.txt", "--shard-tokens", "2000", "--vocab-size", "300", "--out")
    with monkeypatch.context() as patch:
        patch.setattr(shards.TokenFileWriter, "add", add)
        result = slm(*arguments, "cut")
    assert result.code == 1
    assert "error: no space left on the disk" in result.err and "Traceback" not in result.err
    assert "going on after" in slm(*arguments, "cut").err
    assert slm(*arguments, "whole").code == 0
    assert contents("cut") == contents("whole")


def test_a_dataset_that_cannot_be_put_in_its_place_is_not_lost(
    small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(work: Path, out: Path) -> None:
        raise SlmError(f"cannot replace {out}: a program uses one of its files")

    with monkeypatch.context() as patch, pytest.raises(SlmError, match="a program uses one of its files"):
        patch.setattr(preparation, "replace_directory", used)
        make("cut", "stories.txt")
    notes = Notes()
    make("cut", "stories.txt", progress=notes)
    make("whole", "stories.txt")
    assert any(line.startswith("going on after ") for line in notes.lines)
    assert contents("cut") == contents("whole")


def test_the_state_file_is_small(small_batches: None) -> None:
    interrupted("cut")
    state = work_of("cut") / preparation._STATE_FILE
    assert state.stat().st_size < 200
    assert json.loads(state.read_text(encoding="utf-8")).keys() == {"settings_sha256"}
