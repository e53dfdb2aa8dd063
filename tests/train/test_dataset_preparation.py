"""Preparation at scale: the same bytes for any number of workers and after any interruption, and little memory."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.train.data import preparation, shards, workers
from slm.train.data.corpus import Reading, open_corpus
from slm.train.data.dataset import DatasetManifest, open_dataset
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.shards import ShardWriter
from tests.progress import Notes
from tests.waiting import wait_for

END = "\n<|endoftext|>\n"


def make(
    out: str,
    *data: str,
    val: str | None = None,
    progress: Silent | None = None,
    reading: dict[str, Any] | None = None,
    workers: int = 1,
    overwrite: bool = False,
    **options: Any,
) -> DatasetManifest:
    """Prepares a dataset; the default sizes are small."""
    corpus = open_corpus(data, val, Reading(**reading or {}))
    settings = DatasetSettings(**{"vocab_size": 300, "shard_tokens": 2000} | options)
    return prepare_dataset(corpus, Path(out), settings, progress or Silent(), workers=workers, overwrite=overwrite)


def contents(directory: str) -> dict[str, str]:
    """The hash of every file in a dataset."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).iterdir())}


def work_of(out: str) -> Path:
    return Path(f".{out}.unfinished")


@pytest.fixture(autouse=True)
def text(stories: list[str]) -> None:
    """Stories in the test's directory."""
    Path("stories.txt").write_text("".join(f"{story.strip()}{END}" for story in stories), encoding="utf-8")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that workers get many of them."""
    monkeypatch.setattr(workers, "_BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(workers, "_WORTH_WORKERS", 2)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[workers._Pool]:
    """The pools of workers that are made."""
    made: list[workers._Pool] = []
    start = workers._Pool.__init__

    def noted(self: workers._Pool, file: Path, count: int) -> None:
        made.append(self)
        start(self, file, count)

    monkeypatch.setattr(workers._Pool, "__init__", noted)
    return made


def all_ended(pools: list[workers._Pool]) -> bool:
    return all(process.poll() is not None for pool in pools for process in pool._processes)


def test_any_number_of_workers_makes_the_same_bytes(small_batches: None, pools: list[workers._Pool]) -> None:
    for count in (1, 2, 3):
        make(f"with-{count}", "stories.txt", workers=count)
    assert contents("with-1") == contents("with-2") == contents("with-3")
    assert {len(pool._processes) for pool in pools} == {2, 3}  # they did work
    assert all_ended(pools)
    assert len(open_dataset(Path("with-1")).manifest.train.shards) > 5
    make("longer", "stories.txt", shard_tokens=2500)
    assert contents("longer") != contents("with-1")


def test_long_documents_and_any_tokenizer_with_workers(
    small_batches: None,
    pools: list[workers._Pool],
    stories: list[str],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slm.core.text.cuts._PIECE_CHARACTERS", 101)
    documents = ["\n\n".join(stories[:30]), "short", "x" * 5000]
    for cuts in (True, False):
        monkeypatch.setattr(workers, "cuts_at_spaces", lambda tokenizer, cuts=cuts: cuts)
        for count in (1, 2):
            Path(f"{cuts}-{count}").mkdir()
            tokenizer.save(Path(f"{cuts}-{count}"))
            ShardWriter(Path(f"{cuts}-{count}"), tokenizer, Silent(), workers=count).write("train", iter(documents))
    assert contents("True-1") == contents("True-2") == contents("False-1") == contents("False-2")
    assert pools


def test_batches_in_flight_are_bounded(small_batches: None, tokenizer: Tokenizer) -> None:
    """However long the text is, at most two batches a worker are read ahead of what was written."""
    read = written = most = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for number in range(2000):
            read += 1
            yield f"story {number} " * 20

    tokenizer.save(Path())
    ahead = 3 * 2 + 3  # two batches a worker and a few documents to fill the one that is read
    a_batch = 3000 // 180 + 2
    for batch in workers.encoded(documents(), tokenizer, Path("tokenizer.json"), 3):
        most = max(most, read - written)
        written += len(batch)
    assert written == 2000
    assert a_batch < most <= ahead * a_batch


def test_memory_stays_flat(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BATCH_CHARACTERS", 64 << 10)

    def documents(number: int) -> Iterator[str]:
        return (f"story {i % 500} of a fox and the moon " * 30 for i in range(number))

    tokenizer.save(Path())
    peaks = []
    for number in (200, 1_200):
        tracemalloc.start()
        ShardWriter(Path(), tokenizer, Silent(), shard_tokens=10_000).write(f"of-{number}", documents(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + (256 << 10)


class Stop(Silent):
    """Interrupts once so many documents of the training text are done."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def start(self, name: str, total: int | None, unit: str) -> None:
        self.counts = "train" in name

    def advance(self, amount: int = 1, **fields: str) -> None:
        self.left -= amount if self.counts else 0
        if self.left < 0:
            raise self.error


def test_an_interrupted_preparation_goes_on(small_batches: None, pools: list[workers._Pool]) -> None:
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


def test_a_killed_command_goes_on(stories: list[str], slm: Callable) -> None:
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
    assert process.communicate(timeout=30)[1] == ""  # which also waits until nobody holds standard error any more
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_text_starts_anew(small_batches: None, stories: list[str]) -> None:
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
def test_other_settings_start_anew(small_batches: None, changed: dict[str, object]) -> None:
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


def test_text_that_changed_in_secret_is_found(small_batches: None) -> None:
    """Same size, same time, another letter in what was finished: the hash of its text tells."""
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


def test_a_full_disk_is_one_error_and_can_be_gone_on_with(
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


def test_two_preparations_of_one_dataset(small_batches: None) -> None:
    class Second(Silent):
        def start(self, name: str, total: int | None, unit: str) -> None:
            make("out", "stories.txt")

    with pytest.raises(SlmError, match=r"another process \(\d+\) prepares"):
        make("out", "stories.txt", progress=Second())


def test_where_it_may_be_written() -> None:
    make("taken", "stories.txt")
    with pytest.raises(SlmError, match="prepared dataset already"):
        make("taken", "stories.txt")
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("x", encoding="utf-8")
    with pytest.raises(SlmError, match=r"contains other files: precious.txt"):
        make("mine", "stories.txt")
    Path("empty").mkdir()
    make("empty", "stories.txt")
    assert contents("empty") == contents("taken")


def test_duplicates(stories: list[str]) -> None:
    unique = [story.strip() for story in stories[:40]]
    train = [unique[0], *unique, f"  {unique[3]}\n\n", unique[5], unique[30] + "!"]
    Path("train.txt").write_text(END.join(train), encoding="utf-8")
    Path("val.txt").write_text(END.join([unique[7], "only here", unique[7]]), encoding="utf-8")
    with_all = make("all", "train.txt", val="val.txt")
    without = make("unique", "train.txt", val="val.txt", deduplicate=True)
    assert (with_all.train.documents, with_all.validation.documents) == (len(train), 3)  # the negative control
    assert (with_all.train.duplicates_removed, with_all.validation.duplicates_removed) == (0, 0)
    assert without.validation.documents == 2 and without.validation.duplicates_removed == 1
    assert without.train.duplicates_removed == 4  # two of unique[0] but one, two more, and the validation text
    assert without.train.documents == len(train) - 4
    expected = [unique[0], *unique[1:7], *unique[8:], unique[30] + "!"]
    text = hashlib.sha256(b"".join(document.encode() + b"\0" for document in expected)).hexdigest()
    assert without.train.text_sha256 == text
    assert without.deduplicated and not with_all.deduplicated
    assert not list(Path("unique").glob("seen*"))


def test_nothing_is_left_after_deduplication() -> None:
    with pytest.raises(SlmError, match="there is no train text"):
        make("out", "stories.txt", val="stories.txt", deduplicate=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `datasets` loads, and a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "hub"
    directory.mkdir()
    return directory


def parquet(file: Path, texts: list[str], column: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), file)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_directory(hub: Path, stories: list[str], streaming: bool) -> None:
    parquet(hub / "train-00000-of-00002.parquet", stories[:30])
    parquet(hub / "train-00001-of-00002.parquet", stories[30:60])
    parquet(hub / "validation-00000-of-00001.parquet", stories[60:70])
    manifest = make("out", "hf:hub", reading={"streaming": streaming})
    assert (manifest.train.documents, manifest.validation.documents) == (60, 10)
    assert manifest.held_out == "the dataset's own validation split"
    assert [source.kind for source in manifest.sources] == ["huggingface", "huggingface"]
    text = hashlib.sha256(b"".join(story.strip("\r\n").encode() + b"\0" for story in stories[:60])).hexdigest()
    assert manifest.train.text_sha256 == text


@pytest.mark.parametrize("streaming", [False, True])
def test_without_validation_split_a_hundredth_is_held_out_by_hash(
    hub: Path, stories: list[str], streaming: bool
) -> None:
    texts = [f"{number}. {story}" for number in range(10) for story in stories[:100]]
    parquet(hub / "train.parquet", texts, "content")
    manifest = make("out", "hf:hub", reading={"column": "content", "streaming": streaming})
    assert manifest.held_out == "one document in 100, by its hash"
    assert manifest.train.documents + manifest.validation.documents == 1000
    assert 2 <= manifest.validation.documents <= 22  # 10 expected, four standard deviations
    parquet(hub / "train.parquet", texts[::-1], "content")
    again = make("again", "hf:hub", reading={"column": "content", "streaming": streaming})
    assert again.validation.documents == manifest.validation.documents  # whatever the order is


def test_what_a_hugging_face_dataset_lacks(hub: Path, stories: list[str]) -> None:
    parquet(hub / "train.parquet", stories[:10])
    for reading, message in (
        ({"split": "test"}, "has no split 'test'"),
        ({"column": "content"}, "has no column 'content'"),
        ({"config": "nothing"}, "could not be loaded"),
    ):
        with pytest.raises(SlmError, match=message) as error:
            make("out", "hf:hub", reading=reading)
        assert "\n" not in error.value.message
    with pytest.raises(SlmError, match="there is no validation text") as error:
        make("out", "hf:hub")  # ten documents, none of them held out by its hash
    assert "--val" in (error.value.hint or "")
    with pytest.raises(SlmError, match=r"hf:hub cannot be combined with other data"):
        make("out", "hf:hub", "stories.txt")
    assert not list(Path().glob("*out*"))


def test_a_licence_is_the_one_given_or_stated(hub: Path, stories: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(hub / "train.parquet", stories[:50])
    parquet(hub / "validation.parquet", stories[50:60])
    load = datasets.load_dataset

    def stated(name: str, **arguments: object) -> object:
        splits = load("hub", **arguments)
        for rows in splits.values():
            rows.info.license = "odc-by"
        return splits

    assert make("silent", "hf:hub").licence is None
    monkeypatch.setattr(datasets, "load_dataset", stated)
    assert make("stated", "hf:hub").licence == "odc-by"
    assert make("given", "hf:hub", licence="CC0-1.0").licence == "CC0-1.0"
    assert make("stories", "tinystories").licence == "CDLA-Sharing-1.0"


def test_the_state_file_is_small(small_batches: None) -> None:
    interrupted("cut")
    state = work_of("cut") / preparation._STATE_FILE
    assert state.stat().st_size < 200
    assert json.loads(state.read_text(encoding="utf-8")).keys() == {"settings_sha256"}


def test_documents_in_parts_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, stories: list[str]) -> None:
    Path("validation.txt").write_text(stories[70])
    Path("long.txt").write_text(
        END.join([stories[0], "\n\n".join(stories[:30]), stories[1], "\n ".join(stories[30:60])])
    )
    whole = make("whole", "long.txt", val="validation.txt")
    parts = make("parts", "long.txt", val="validation.txt", reading={"limit": 1500})
    assert whole == parts
    assert contents("whole") == contents("parts")
    with pytest.raises(SlmError, match="--dedup compares whole documents, and one is longer"):
        make("dedup", "long.txt", val="validation.txt", reading={"limit": 1500}, deduplicate=True)
    monkeypatch.setattr(workers, "cuts_at_spaces", lambda tokenizer: False)
    with pytest.raises(SlmError, match="takes whole documents"):
        make("other", "long.txt", val="validation.txt", reading={"limit": 1500})
