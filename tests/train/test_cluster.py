"""Preparation on a cluster, without Ray: the bytes with and without losses, what starts over, and full disks."""

import errno
import io
import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.text.documents import Beginning
from slm.train.data.cluster import layout, ray_cluster, tasks
from slm.train.data.cluster.jobs import LostError
from slm.train.data.cluster.preparation import prepare_on_cluster, scanning
from slm.train.data.cluster.store import Store
from slm.train.data.cluster.tasks import result_of, run_task
from slm.train.data.corpus import Reading, open_corpus
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.sources import source_of
from tests.progress import Notes
from tests.train.preparing import contents

END = "\n<|endoftext|>\n"


class Machines:
    """A cluster in this process, which runs tasks in a changing order, and loses some of them after they ran."""

    def __init__(self, slots: int = 3, losing: Any = None, stops_after: int | None = None) -> None:
        self._slots, self._losing, self.left = slots, losing, stops_after
        self.tasks: list[tuple[str, dict[str, Any]]] = []
        self._handles = itertools.count()
        self.running: dict[int, tuple[str, dict[str, Any]]] = {}
        self.most = 0

    def slots(self) -> int:
        return self._slots

    def submit(self, task: str, spec: dict[str, Any]) -> int:
        handle = next(self._handles)
        self.running[handle] = (task, json.loads(json.dumps(spec)))
        self.most = max(self.most, len(self.running))
        return handle

    def wait(self, handles: list[int]) -> int | None:
        return handles[-1] if len(self.tasks) % 2 else handles[0]

    def result(self, handle: int) -> bytes:
        task, spec = self.running.pop(handle)
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        result = run_task(task, json.dumps(spec))
        self.tasks.append((task, spec))
        if self._losing is not None and self._losing(task, spec, sum(one == (task, spec) for one in self.tasks)):
            raise LostError("its machine is gone")
        return result_of(result)

    def cancel(self, handles: list[int]) -> None:
        for handle in handles:
            self.running.pop(handle, None)

    @property
    def counts(self) -> Counter[str]:
        return Counter(task for task, _ in self.tasks)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, stories: list[str], tmp_path: Path) -> None:
    """Texts in files of several kinds and sizes, divided into small parts."""
    for variable in (*tasks._ONE_THREAD, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layout, "PART_BYTES", 4000)
    monkeypatch.setattr(layout, "MOST_PER_FILE", 5)
    texts = Path("texts")
    texts.mkdir()
    (texts / "a.txt").write_text(END.join(stories[:40]), encoding="utf-8")
    for number in range(6):
        rows = "\n".join(json.dumps({"text": story}) for story in stories[40 + 3 * number : 43 + 3 * number])
        (texts / f"b{number}.jsonl").write_text(rows, encoding="utf-8")


def on_cluster(
    out: str, machines: Machines, progress: Silent | None = None, val: str | None = None, **options: Any
) -> None:
    progress = progress or Silent()
    corpus = open_corpus(["texts"], val, Reading(), scanning(machines, progress))
    overwrite = options.pop("overwrite", False)
    settings = DatasetSettings(**({"vocab_size": 300, "shard_tokens": 2000} | options))
    prepare_on_cluster(corpus, Path(out), settings, machines, progress, overwrite=overwrite)


def without_cluster(out: str, val: str | None = None, **options: Any) -> None:
    settings = DatasetSettings(**({"vocab_size": 300, "shard_tokens": 2000} | options))
    prepare_dataset(open_corpus(["texts"], val, Reading()), Path(out), settings, Silent())


EVERYTHING: dict[str, Any] = {"deduplicate": True, "quality": True}


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"val": "texts/b0.jsonl"}, {"shard_tokens": 10**6}])
def test_a_cluster_makes_the_same_bytes(options: dict[str, Any]) -> None:
    without_cluster("without", **options)
    machines = Machines()
    on_cluster("with", machines, **options)
    assert contents("with") == contents("without")
    assert machines.counts["encode"] > 6 and machines.counts["scan"] >= 7
    assert machines.counts["examine"] == (machines.counts["encode"] if options == EVERYTHING else 0)
    assert not list(Path().glob(".*unfinished"))


def test_long_documents_in_parts_and_other_line_ends_on_a_cluster(stories: list[str]) -> None:
    """A document longer than the limit comes in parts; the divisions of a file are between documents."""
    long = [" ".join(stories[3 * number : 3 * number + 3]) for number in range(12)]
    Path("texts/a.txt").write_text(END.join(long).replace("\n", "\r\n"), encoding="utf-8", newline="")
    reading, machines = Reading(limit=1200), Machines()
    settings = DatasetSettings(vocab_size=300, shard_tokens=2000)
    corpus = open_corpus(["texts/a.txt"], None, reading, scanning(machines, Silent()))
    prepare_on_cluster(corpus, Path("with"), settings, machines, Silent())
    corpus = open_corpus(["texts/a.txt"], None, reading)
    assert sum(isinstance(part, Beginning) for part in corpus.train()) > 6
    prepare_dataset(corpus, Path("without"), settings, Silent())
    assert contents("with") == contents("without") and machines.counts["encode"] >= 4


def test_near_duplicates_and_languages_on_a_cluster() -> None:
    pytest.importorskip("rensa", reason="the extra data is not installed")
    pytest.importorskip("py3langid", reason="the extra data is not installed")
    options: dict[str, Any] = {"near_duplicates": 0.5, "languages": ("en",)}
    without_cluster("without", **options)
    on_cluster("with", Machines(), **options)
    assert contents("with") == contents("without")


@pytest.mark.parametrize("slots", [1, 7])
def test_lost_work_is_done_again_and_the_bytes_are_the_same(slots: int) -> None:
    without_cluster("without", **EVERYTHING)
    notes = Notes()
    machines = Machines(slots, lambda task, spec, times: times == 1 and spec.get("part", "") != "train-00003")
    on_cluster("with", machines, notes, **EVERYTHING)
    assert contents("with") == contents("without")
    parts = {spec["part"] for task, spec in machines.tasks if task == "encode"}
    assert machines.counts["encode"] == 2 * len(parts) - 1  # all but one were lost once
    assert "encode train-00001 was lost (its machine is gone): it is done again" in notes.lines


def test_work_that_is_always_lost_ends_the_command() -> None:
    machines = Machines(losing=lambda task, spec, times: spec.get("part") == "train-00002")
    with pytest.raises(SlmError, match=r"encode train-00002 was lost 4 times \(its machine is gone\)") as caught:
        on_cluster("with", machines)
    assert "out of memory" in (caught.value.hint or "")
    assert not machines.running and not Path("with").exists()
    on_cluster("with", Machines())
    without_cluster("without")
    assert contents("with") == contents("without")


def test_an_interrupted_preparation_continues() -> None:
    without_cluster("without", **EVERYTHING)
    whole = Machines()
    on_cluster("whole", whole, **EVERYTHING)
    done: Counter[str] = Counter()
    for _ in range(5):
        machines = Machines(stops_after=10)  # every attempt reads the seven files again
        with pytest.raises(KeyboardInterrupt):
            on_cluster("with", machines, **EVERYTHING)
        assert not machines.running
        done.update(machines.counts)
    notes, machines = Notes(), Machines()
    on_cluster("with", machines, notes, **EVERYTHING)
    assert contents("with") == contents("without") == contents("whole")
    done.update(machines.counts)
    for task in ("examine", "encode", "shard", "hash"):
        assert done[task] == whole.counts[task]  # nothing was done twice
    assert any(note.startswith("examining text: ") for note in notes.lines)


def test_other_settings_or_another_text_start_over() -> None:
    for change in ("settings", "text"):
        with pytest.raises(KeyboardInterrupt):
            on_cluster(change, Machines(stops_after=15))
        if change == "text":
            Path("texts/b1.jsonl").write_text('{"text": "Something else was here."}\n', encoding="utf-8")
        options: dict[str, Any] = {"vocab_size": 310} if change == "settings" else {}
        on_cluster(change, Machines(), **options)
        without_cluster(f"{change}-without", **options)
        assert contents(change) == contents(f"{change}-without")


def test_another_column_starts_over(stories: list[str]) -> None:
    for file in Path("texts").iterdir():
        file.unlink()
    for number in range(6):
        rows = [{"text": story, "other": f"Other. {story}"} for story in stories[3 * number : 3 * number + 3]]
        Path(f"texts/{number}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = DatasetSettings(vocab_size=300, shard_tokens=2000)

    def prepare(out: str, machines: Machines, reading: Reading) -> Notes:
        notes = Notes()
        corpus = open_corpus(["texts"], None, reading, scanning(machines, notes))
        prepare_on_cluster(corpus, Path(out), settings, machines, notes)
        return notes

    with pytest.raises(KeyboardInterrupt):
        prepare("with", Machines(stops_after=9), Reading())
    notes = prepare("with", Machines(), Reading(column="other"))
    prepare_dataset(open_corpus(["texts"], None, Reading(column="other")), Path("without"), settings, Silent())
    assert contents("with") == contents("without")
    assert any(note.startswith("starting over") for note in notes.lines)


def test_a_preparation_that_a_cluster_began_can_end_without_one() -> None:
    whole = Machines()
    on_cluster("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        on_cluster("with", Machines(stops_after=len(whole.tasks) - 2))
    assert list(Path(".with.unfinished").glob("*.bin"))
    without_cluster("with")
    without_cluster("without")
    assert contents("with") == contents("without")


def test_an_object_store_in_and_out() -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put("texts", "/texts", recursive=True)
    machines = Machines(stops_after=25)

    def prepare(machines: Machines, **options: Any) -> None:
        corpus = open_corpus(["memory://texts"], None, Reading(), scanning(machines, Silent()))
        settings = DatasetSettings(vocab_size=300, shard_tokens=2000, **EVERYTHING)
        prepare_on_cluster(corpus, "memory://bucket/made", settings, machines, Silent(), **options)

    with pytest.raises(KeyboardInterrupt):
        prepare(machines)
    assert not store.isfile("/bucket/made/dataset.json")
    again = Machines()
    prepare(again)
    assert again.counts["examine"] == 0  # all were done before
    settings = DatasetSettings(vocab_size=300, shard_tokens=2000, **EVERYTHING)
    prepare_dataset(open_corpus(["memory://texts"], None), Path("without"), settings, Silent())
    made = {Path(name).name: store.cat_file(name) for name in store.ls("/bucket/made", detail=False)}
    assert made == {file.name: file.read_bytes() for file in Path("without").iterdir()}
    assert not store.exists("/bucket/.made.unfinished")
    with pytest.raises(SlmError, match="there is a prepared dataset already"):
        prepare(Machines())
    prepare(Machines(), overwrite=True)
    with pytest.raises(SlmError, match="is a whole bucket"):
        prepare_on_cluster(open_corpus(["texts"], None), "memory://bucket2", settings, Machines(), Silent())


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An object store with the texts."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    store.put("texts", "/texts", recursive=True)
    yield store
    store.store.clear()


def to_bucket(machines: Machines, progress: Silent | None = None, **options: Any) -> None:
    progress = progress or Silent()
    corpus = open_corpus(["memory://texts"], None, Reading(), scanning(machines, progress))
    settings = DatasetSettings(**{"vocab_size": 300, "shard_tokens": 2000} | options)
    prepare_on_cluster(corpus, "memory://bucket/made", settings, machines, progress)


def in_bucket(store: Any, **options: Any) -> bool:
    """Whether the dataset in the store is the one that is prepared without a cluster."""
    settings = DatasetSettings(**{"vocab_size": 300, "shard_tokens": 2000} | options)
    prepare_dataset(open_corpus(["memory://texts"], None), Path("without"), settings, Silent(), overwrite=True)
    made = {Path(name).name: store.cat_file(name) for name in store.ls("/bucket/made", detail=False)}
    return made == {file.name: file.read_bytes() for file in Path("without").iterdir()}


def test_other_settings_start_over_in_an_object_store(bucket: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_bucket(Machines(stops_after=15))
    notes, machines = Notes(), Machines()
    to_bucket(machines, notes, vocab_size=310)
    assert [note for note in notes.lines if note.startswith("starting over: the unfinished dataset there has other")]
    assert machines.counts["encode"] > 6 and in_bucket(bucket, vocab_size=310)


def test_jobs_that_were_not_done_cost_no_request_each(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    done = Store.done
    monkeypatch.setattr(Store, "done", lambda self, name, key: asked.append(name) or done(self, name, key))
    to_bucket(Machines())
    assert asked == ["state.json"]


def test_a_removal_that_was_interrupted_leaves_nothing_that_is_used(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_bucket(Machines(stops_after=20))

    def half(self: Any, path: str, recursive: bool = False) -> None:
        for name in sorted(self.find(path), reverse=True)[1::2]:
            self.rm_file(name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(bucket), "rm", half)
        to_bucket(Machines(), vocab_size=310)
    notes = Notes()
    to_bucket(Machines(), notes)
    assert in_bucket(bucket) and not any(note.startswith("going on") for note in notes.lines)


def test_a_machine_that_sees_another_file_is_named() -> None:
    corpus = open_corpus(["texts"], None, Reading())
    Path("texts/b2.jsonl").write_text('{"text": "changed"}\n', encoding="utf-8")
    with pytest.raises(SlmError, match=r"b2.jsonl is another file on a machine of the cluster \(on ") as caught:
        prepare_on_cluster(corpus, Path("out"), DatasetSettings(vocab_size=300), Machines(), Silent())
    assert "storage that all machines mount" in (caught.value.hint or "")
    Path("texts/b2.jsonl").unlink()
    with pytest.raises(SlmError, match=r"b2\.jsonl is not there"):
        source_of({"path": "texts/b2.jsonl", "fingerprint": ["texts/b2.jsonl", 1, 1]}).check()


def test_a_machine_with_another_version_is_named() -> None:
    spec = {"selection": {"quality": True}, "versions": {"slm": "0.0.1", "quality": "1"}}
    with pytest.raises(SlmError, match=r"a machine of the cluster has slm .*, and the one that prepares has 0\.0\.1"):
        result_of(run_task("hash", json.dumps(spec)))


def test_bad_text_ends_the_command_with_its_place() -> None:
    Path("texts/b3.jsonl").write_text('{"text": "one"}\n{"other": 1}\n', encoding="utf-8")
    with pytest.raises(SlmError, match=r'b3.jsonl, line 2: is not a row with a "text" \(on '):
        on_cluster("out", Machines())


def test_text_that_cannot_be_divided_is_rejected() -> None:
    Path("one.txt").write_text("one two three " * 1000, encoding="utf-8")
    corpus = open_corpus(["one.txt"], None)
    with pytest.raises(SlmError, match="a cluster divides the text by files and documents"):
        prepare_on_cluster(corpus, Path("out"), DatasetSettings(vocab_size=300), Machines(), Silent())


def test_all_text_removed_is_an_error() -> None:
    with pytest.raises(SlmError, match="there is no train text"):
        on_cluster("out", Machines(), val="texts", deduplicate=True)


def test_a_job_is_done_only_with_its_key() -> None:
    store = Store(str(Path("store").resolve()))
    assert store.done("x.done", "key") is None
    store.note("x.done", "key", {"documents": 3})
    assert store.done("x.done", "key") == {"documents": 3} and store.done("x.done", "other") is None
    Path("store/x.done").write_text("{")
    assert store.done("x.done", "key") is None


def test_a_write_that_fails_leaves_nothing() -> None:
    store = Store(str(Path("store").resolve()))
    with pytest.raises(ZeroDivisionError), store.writing("parts/x") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert not list(Path("store/parts").iterdir())


def test_without_ray_its_installation_is_named(monkeypatch: pytest.MonkeyPatch, slm: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with (
        pytest.raises(SlmError, match="--ray needs the package ray, which is not installed") as caught,
        ray_cluster.ray_cluster("auto"),
    ):
        pass
    assert caught.value.hint == "pip install 'slm-edge[ray]' on every machine"
    result = slm("data", "prepare", "--data", "texts", "--ray", "auto", "--out", "out")
    assert result.code == 1 and "--ray needs the package ray" in result.err and not Path("out").exists()
    result = slm("data", "prepare", "--data", "texts", "--ray", "auto", "--out", "memory://bucket2/")
    assert result.code == 1 and "memory://bucket2 is a whole bucket" in result.err  # before the text is read
    result = slm("data", "prepare", "--data", "hf:OWNER/NAME", "--ray", "auto", "--out", "out")
    assert result.code == 2 and "--ray requires files or addresses" in result.err


def full(*names: str) -> Any:
    """A replacement of `Path.open` for a disk that is full where a name has one of the parts."""
    real = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" in mode and any(name in str(self) for name in names):
            real(self, mode, *rest, **more).close()
            return Full()
        return real(self, mode, *rest, **more)

    return opened


def test_a_full_disk_is_one_error_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Machines()
    on_cluster("without", whole, **EVERYTHING)
    done: Counter[str] = Counter()
    for name, said in (
        ("/.train-00002.findings.", "/parts/train-00002.findings (on "),
        ("/.train-00002.kept.", "/parts/train-00002.kept (hint: "),
        ("/slm-", "temporary files (on "),
        ("/.train-00001.text.", "/parts/train-00001.text (on "),
        ("/.encode-train-00003.done.", "/parts/encode-train-00003.done (on "),
        ("/.train-00001.bin.", "/.with.unfinished/train-00001.bin (on "),
    ):
        machines = Machines()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full(name))
            with pytest.raises(SlmError) as caught:
                on_cluster("with", machines, **EVERYTHING)
        assert str(caught.value).startswith("no space left on the disk for ") and said in str(caught.value)
        assert (caught.value.hint or "").endswith("what is finished is kept, and the same command continues")
        assert not list(Path(".with.unfinished").rglob("*.partial"))
        done.update(machines.counts)
    machines = Machines()
    on_cluster("with", machines, **EVERYTHING)
    assert contents("with") == contents("without")
    done.update(machines.counts)
    # Only the tasks that failed were run twice.
    assert done["examine"] + done["encode"] == whole.counts["examine"] + whole.counts["encode"] + 4


@pytest.mark.parametrize("name", ["/slm-", "seen.sqlite3"])
def test_a_full_disk_of_temporary_files_is_one_error(
    bucket: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if name == "seen.sqlite3":
            connect = sqlite3.connect
            patch.setattr(sqlite3, "connect", lambda file, **options: limited(connect(file, **options)))
        else:
            patch.setattr(Path, "open", full(name))
        with pytest.raises(
            SlmError, match=r"^no space left on the disk for temporary files|^cannot keep track of"
        ) as caught:
            to_bucket(Machines(), **EVERYTHING)
    assert "TMPDIR=DIR" in (caught.value.hint or "")
    to_bucket(Machines(), **EVERYTHING)
    assert in_bucket(bucket, **EVERYTHING)


def limited(connection: sqlite3.Connection) -> sqlite3.Connection:
    """A database that cannot grow."""
    connection.execute("PRAGMA max_page_count=1")
    return connection
