"""Text and datasets behind addresses: what is read and written, and the cache."""

import errno
import gzip
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.runs import cached_data
from slm.train.data import dataset as datasets
from slm.train.data import workers
from slm.train.data.corpus import open_corpus
from slm.train.data.dataset import open_dataset, open_remote
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.remote import cache, text
from slm.train.data.remote.datasets import check_remote, publish, remote_manifest
from slm.train.data.remote.preparation import prepare_remote_dataset
from slm.train.data.remote.text import remote_files
from slm.train.data.tokens import TokenFileWriter
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from tests.progress import Notes, Stopper
from tests.train.preparing import contents

END = "\n<|endoftext|>\n"
SETTINGS = DatasetSettings(vocab_size=300, shard_tokens=2000)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty object store, and an empty cache."""
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def stored(store: Any, stories: list[str]) -> list[str]:
    """Stories below an address, in files of several kinds."""
    store.pipe("/texts/a.txt", END.join(stories[:20]).encode())
    store.pipe(
        "/texts/b.jsonl.gz", gzip.compress("\n".join(json.dumps({"text": s}) for s in stories[20:40]).encode(), mtime=0)
    )
    store.pipe("/texts/deep/c.jsonl", "\n".join(json.dumps({"text": s}) for s in stories[40:60]).encode())
    store.pipe("/texts/.hidden/d.txt", b"hidden")
    store.pipe("/texts/about.csv", b"a,b\n1,2\n")
    return stories[:60]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are fetched."""
    fetched: list[str] = []
    fetch = text.fetch

    def noted(address: str, local: Path) -> None:
        fetched.append(address.rpartition("/")[2])
        fetch(address, local)

    monkeypatch.setattr(text, "fetch", noted)
    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", noted)
    return fetched


@pytest.fixture
def dataset(stored: list[str]) -> str:
    """A prepared dataset behind an address."""
    prepare_remote_dataset(open_corpus(["memory://texts"], None), "memory://made/stories", SETTINGS, Silent())
    return "memory://made/stories"


def cached_shard() -> Path:
    return sorted(cached_data().glob("datasets/*/train-00001.bin"))[0]


def test_text_behind_an_address_is_what_it_is_in_files(stored: list[str], downloads: list[str]) -> None:
    corpus = open_corpus(["memory://texts"], None)
    assert [*corpus.train(), *corpus.validation()] == [story.strip("\n") for story in stored]
    assert [source.name.rpartition("/")[2] for source in corpus.sources] == ["a.txt", "b.jsonl.gz", "c.jsonl"]
    assert sorted(downloads) == ["a.txt", "b.jsonl.gz", "c.jsonl"]  # once each, although they were read three times
    held_out = open_corpus(["memory://texts/a.txt"], "memory://texts/deep/c.jsonl").validation()
    assert list(held_out) == [story.strip("\n") for story in stored[40:60]]
    assert len(downloads) == 3


def test_changed_text_is_fetched_and_starts_over(store: Any, stored: list[str]) -> None:
    before = open_corpus(["memory://texts/a.txt"], None)
    store.pipe("/texts/a.txt", END.join(stored[1:20] + stored[:1]).encode())
    after = open_corpus(["memory://texts/a.txt"], None)
    assert next(after.train()) == stored[1].strip("\n") and before.fingerprint != after.fingerprint


def test_text_that_is_replaced_while_it_is_read_is_noticed(store: Any, stored: list[str]) -> None:
    """Another machine, or a later stage, would read other documents of the same size under the old name."""
    (file,) = remote_files("memory://texts/a.txt")
    content = store.cat_file("/texts/a.txt")
    store.pipe("/texts/a.txt", content[::-1])
    with pytest.raises(SlmError, match=r"memory:///texts/a\.txt changed while it was read"):
        next(file.parts("text", 1 << 20))
    assert not list(cached_data().glob("files/*/text*"))
    (file,) = remote_files("memory://texts/a.txt")
    store.pipe("/texts/a.txt", content)
    with pytest.raises(SlmError, match="changed while it was read"):
        next(file.parts("text", 1 << 20))


def test_text_that_was_changed_in_the_cache_is_fetched_again(stored: list[str], downloads: list[str]) -> None:
    open_corpus(["memory://texts/a.txt"], None)
    (file,) = cached_data().glob("files/*/text.txt")
    file.write_bytes(b"Q" + file.read_bytes()[1:])
    os.utime(file, (1e9, 1e9))
    corpus = open_corpus(["memory://texts/a.txt"], None)
    assert next(corpus.train()) == stored[0].strip("\n") and downloads == ["a.txt", "a.txt"]


@pytest.mark.parametrize("name", ["x" * 300 + ".TXT", "x\\..\\..\\x.txt", "a:b?.v1.txt"])
def test_the_name_of_an_object_is_no_name_in_the_cache(store: Any, stories: list[str], name: str) -> None:
    store.pipe(f"/names/{name}", END.join(stories[:9]).encode())
    corpus = open_corpus(["memory://names"], None)
    assert next(corpus.train()) == stories[0].strip("\n") and corpus.sources[0].name == f"memory:///names/{name}"
    assert [file.name for file in cached_data().rglob("*.txt")] == ["text.txt"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://nowhere", "not found: memory://nowhere"),
        ("memory://texts/about.xyz", "not found"),
        ("memory://texts/deep/c.jsonl/", None),
        ("memory://broken", 'memory:///broken/x.jsonl, line 2: is not a row with a "text"'),
        ("memory://binary.exe", "unknown kind of file"),
        ("memory://empty", "no .txt, .jsonl or .parquet file in memory://empty"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_address(
    store: Any, stored: list[str], address: str, said: str | None
) -> None:
    store.pipe("/broken/x.jsonl", b'{"text": "one"}\n{"other": 1}\n')
    store.pipe("/binary.exe", b"\0")
    store.pipe("/empty/x.png", b"\0")
    if said is None:
        open_corpus([address], None)
        return
    with pytest.raises(SlmError) as caught:
        open_corpus([address], None)
    assert said in caught.value.message and str(cached_data()) not in caught.value.message


def test_a_dataset_behind_an_address_has_the_bytes_of_a_local_one(store: Any, dataset: str) -> None:
    prepare_dataset(open_corpus(["memory://texts"], None), Path("local"), SETTINGS, Silent())
    assert {name: store.cat_file(f"/made/stories/{name}") for name in contents("local")} == {
        file.name: file.read_bytes() for file in Path("local").iterdir()
    }
    assert len(store.ls("/made/stories")) == len(contents("local"))
    check_remote(dataset, remote_manifest(dataset)[0])
    opened, local = open_remote(dataset), open_dataset(Path("local"))
    assert (opened.train.ids[:] == local.train.ids[:]).all() and opened.manifest == local.manifest
    assert not cached_data().with_name("unfinished").exists()


def test_a_taken_address_is_not_overwritten(store: Any, stored: list[str], dataset: str) -> None:
    corpus = open_corpus(["memory://texts/a.txt"], None)
    with pytest.raises(SlmError, match="there is a prepared dataset already: memory://made/stories"):
        prepare_remote_dataset(corpus, dataset, SETTINGS, Silent())
    with pytest.raises(SlmError, match="memory://texts holds something that is not of a dataset"):
        prepare_remote_dataset(corpus, "memory://texts", SETTINGS, Silent(), overwrite=True)
    prepare_remote_dataset(corpus, dataset, SETTINGS, Silent(), overwrite=True)
    manifest, _ = remote_manifest(dataset)
    assert len(manifest.sources) == 1
    assert {name.rpartition("/")[2] for name in store.ls("/made/stories", detail=False)} == set(manifest.files)


def test_an_output_that_is_a_pattern_is_rejected(store: Any, stored: list[str]) -> None:
    """`rm` of fsspec would remove what matches."""
    corpus = open_corpus(["memory://texts/a.txt"], None)
    for address in ("memory://made/x*", "memory://a?/x", "memory://[a]/x"):
        with pytest.raises(SlmError, match=r"has one of the characters \* \? \[ \]"):
            prepare_remote_dataset(corpus, address, SETTINGS, Silent())


def test_a_directory_that_a_console_created_is_empty(
    store: Any, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ls = type(store).ls

    def with_itself(self: Any, path: str, detail: bool = True, **more: Any) -> Any:
        found = [{"name": "made/new/", "size": 0, "type": "directory"}] if path.endswith("made/new") else []
        with suppress(FileNotFoundError):
            found += ls(self, path, detail=True, **more)
        return found if detail else [each["name"] for each in found]

    monkeypatch.setattr(type(store), "ls", with_itself)
    corpus = open_corpus(["memory://texts/a.txt"], None)
    prepare_remote_dataset(corpus, "memory://made/new", SETTINGS, Silent())
    assert open_remote("memory://made/new").manifest.train.documents
    with pytest.raises(SlmError, match=r"memory://texts/a\.txt holds something that is not of a dataset: a\.txt"):
        prepare_remote_dataset(corpus, "memory://texts/a.txt", SETTINGS, Silent())


def test_a_reader_never_sees_half_of_a_dataset(store: Any, stored: list[str], dataset: str) -> None:
    prepare_dataset(open_corpus(["memory://texts/a.txt"], None), Path("local"), SETTINGS, Silent())
    local = open_dataset(Path("local"))

    def failing(name: str, target: str) -> None:
        if name.startswith("validation"):
            raise OSError("gone")
        store.put_file(str(Path("local", name)), target)

    with pytest.raises(SlmError, match="cannot write memory://made/stories"):
        publish(dataset, local.manifest, failing, Silent())
    with pytest.raises(SlmError, match=r"not found: memory://made/stories/dataset\.json"):
        open_remote(dataset)
    publish(dataset, local.manifest, lambda name, target: store.put_file(str(Path("local", name)), target), Silent())
    assert open_remote(dataset).manifest == local.manifest


def test_an_interrupted_upload_does_not_prepare_again(
    store: Any, stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(["memory://texts"], None)
    put = type(store).put_file
    monkeypatch.setattr(type(store), "put_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("secret")))
    with pytest.raises(SlmError, match=r"cannot write memory://new/stories \(ConnectionError\)") as caught:
        prepare_remote_dataset(corpus, "memory://new/stories", SETTINGS, Silent())
    assert "secret" not in str(caught.value) + str(caught.value.hint)
    monkeypatch.setattr(type(store), "put_file", put)
    monkeypatch.setattr(
        "slm.train.data.remote.preparation.prepare_dataset", lambda *_, **__: pytest.fail("prepared again")
    )
    prepare_remote_dataset(corpus, "memory://new/stories", SETTINGS, Silent())
    assert open_remote("memory://new/stories").manifest.train.documents


def out_of_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_error(store: Any, stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()

    def prepare() -> None:
        corpus = open_corpus(["memory://texts"], None)
        prepare_remote_dataset(corpus, "memory://new/stories", SETTINGS, notes)

    with (
        pytest.raises(SlmError, match="no space left on the disk for the cache: ") as caught,
        monkeypatch.context() as patch,
    ):
        patch.setattr(Path, "write_text", out_of_space)
        prepare()
    assert "SLM_CACHE=DIR" in (caught.value.hint or "")
    with (
        pytest.raises(SlmError, match=r"no space left to fetch memory:///texts/a\.txt") as caught,
        monkeypatch.context() as patch,
    ):
        patch.setattr(type(store), "get_file", out_of_space)
        prepare()
    assert "SLM_CACHE=DIR" in (caught.value.hint or "")
    add, left = TokenFileWriter.add, [40]

    def filling(*arguments: Any) -> None:
        left[0] -= arguments[-1]
        add(*arguments) if left[0] > 0 else out_of_space()

    monkeypatch.setattr(workers, "_BATCH_CHARACTERS", 1000)
    with (
        pytest.raises(SlmError, match="no space left on the disk for the cache: ") as caught,
        monkeypatch.context() as patch,
    ):
        patch.setattr(TokenFileWriter, "add", filling)
        prepare()
    with (
        pytest.raises(SlmError, match="no space left to write memory://new/stories") as caught,
        monkeypatch.context() as patch,
    ):
        patch.setattr(type(store), "put_file", out_of_space)
        prepare()
    assert "what is finished is kept" in (caught.value.hint or "")
    assert any(note.startswith("going on after ") for note in notes.lines)
    prepare()
    assert open_remote("memory://new/stories").manifest.train.documents


@pytest.mark.parametrize("name", ["train-00001.bin", "dataset.json", "tokenizer.json"])
def test_a_dataset_that_was_changed_before_the_upload_is_prepared_again(
    store: Any, stored: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(["memory://texts"], None)
    with monkeypatch.context() as patch, pytest.raises(SlmError, match="cannot write"):
        patch.setattr(type(store), "put_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError))
        prepare_remote_dataset(corpus, "memory://new/stories", SETTINGS, Silent())
    (file,) = cached_data().with_name("unfinished").glob(f"*/dataset/{name}")
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    prepare_remote_dataset(corpus, "memory://new/stories", SETTINGS, Silent())
    check_remote("memory://new/stories", open_remote("memory://new/stories").manifest)


def test_a_copy_is_fetched_once_and_again_where_it_is_damaged(dataset: str, downloads: list[str]) -> None:
    files = remote_manifest(dataset)[0].files
    open_remote(dataset)
    assert sorted(downloads) == sorted(set(files) - {"dataset.json"})
    open_remote(dataset)
    assert len(downloads) == len(files) - 1
    for damage in (
        lambda file: file.write_bytes(file.read_bytes()[:-2] + b"xx"),
        lambda file: file.write_bytes(b""),
        Path.unlink,
    ):
        downloads.clear()
        damage(cached_shard())
        opened = open_remote(dataset)
        assert downloads == ["train-00001.bin"]
        assert opened.train.ids[:].max() < 300


def test_damage_without_a_trace_is_found_when_the_check_is_old(
    dataset: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_remote(dataset)
    file = cached_shard()
    stat = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    downloads.clear()
    monkeypatch.setattr("slm.train.data.remote.datasets._CHECKED_FOR_S", 0.0)
    open_remote(dataset)
    assert downloads == ["train-00001.bin"]


def test_damage_in_the_store_is_found(store: Any, dataset: str) -> None:
    content = store.cat_file("/made/stories/train-00001.bin")
    store.pipe("/made/stories/train-00001.bin", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SlmError, match=r"train-00001.bin differs from the dataset's manifest \(SHA-256\)"):
        open_remote(dataset)
    assert not list(cached_data().glob("datasets/*/train-00001*"))
    with pytest.raises(SlmError, match=r"train-00001\.bin was altered"):
        check_remote(dataset, remote_manifest(dataset)[0])


def test_a_tokenizer_that_was_damaged_in_the_store_is_fetched_again(store: Any, dataset: str) -> None:
    content = store.cat_file("/made/stories/tokenizer.json")
    store.pipe("/made/stories/tokenizer.json", content.replace(b'"a":', b'"~a":', 1))
    with pytest.raises(SlmError):
        open_remote(dataset)
    store.pipe("/made/stories/tokenizer.json", content)
    assert open_remote(dataset).manifest.train.documents


def test_an_interrupted_copy_continues(dataset: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, left = text.fetch, [5]

    def stopping(address: str, local: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            local.write_bytes(b"half")
            raise KeyboardInterrupt
        fetch(address, local)

    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", stopping)
    with pytest.raises(KeyboardInterrupt):
        open_remote(dataset)
    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", fetch)
    downloads.clear()
    open_remote(dataset)
    assert len(downloads) == len(remote_manifest(dataset)[0].files) - 1 - 2 and not list(
        cached_data().glob("datasets/*/*.partial")
    )


def test_two_that_start_at_once_fetch_once(dataset: str, downloads: list[str]) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(open_remote(dataset).manifest)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(downloads) == len(found[0].files) - 1


def test_the_cache_is_bounded(store: Any, stored: list[str], dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [store.size(f"/texts/{name}") for name in ("a.txt", "b.jsonl.gz", "deep/c.jsonl")]
    monkeypatch.setenv("SLM_CACHE_BYTES", str(max(sizes[0] + sizes[1], sizes[2])))
    for path in cached_data().glob("files/*"):
        os.utime(path, (0, 0))
    corpus = open_corpus(["memory://texts"], None)  # more than the limit, one file after the other
    assert [*corpus.train(), *corpus.validation()] == [story.strip("\n") for story in stored]
    kept = sum(file.stat().st_size for file in cached_data().rglob("*.*") if file.is_file())
    assert kept <= cache.limit()
    monkeypatch.setenv("SLM_CACHE_BYTES", "1KiB")
    with pytest.raises(SlmError, match=r"memory://made/stories has .* KiB, and the cache may have 1 KiB") as caught:
        open_remote(dataset)
    assert "SLM_CACHE_BYTES" in (caught.value.hint or "")
    monkeypatch.setenv("SLM_CACHE_BYTES", "a lot")
    with pytest.raises(SlmError, match="SLM_CACHE_BYTES=a lot is not a size"):
        open_remote(dataset)


def test_the_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_CACHE_BYTES", "30")
    for name in ("old", "new", "mid"):
        with cache.entry("files", name, 10, name) as place:
            (place / "x").write_bytes(b"0" * 10)
    for age, name in ((30, "old"), (20, "mid"), (10, "new")):
        os.utime(cached_data() / "files" / name, (1e9 - age, 1e9 - age))
    with cache.entry("files", "another", 15, "another"):
        pass
    assert sorted(path.name for path in cached_data().glob("files/*") if path.is_dir()) == ["another", "new"]


@pytest.mark.parametrize("limit", ["1GiB", "500"])
def test_the_work_of_the_cache_is_linear_in_the_number_of_files(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 50 entries, every fifth one makes room; each time all of them are looked at."""
    monkeypatch.setenv("SLM_CACHE_BYTES", limit)
    looked: list[Path] = []
    size = cache._size
    monkeypatch.setattr(cache, "_size", lambda place: looked.append(place) or size(place))
    for number in range(150):
        with cache.entry("files", str(number), 10, "file"):
            pass
    kept = sum(path.is_dir() for path in cached_data().glob("files/*"))
    assert kept == 150 if limit == "1GiB" else 45 <= kept <= 50
    assert len(looked) <= (1 + 15) * 150


def test_the_size_of_the_cache_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_CACHE_BYTES", "100")
    for number in range(10):
        with cache.entry("files", str(number), 10, "file"):
            pass
    for number in range(5):
        shutil.rmtree(cached_data() / "files" / str(number))
    for number in range(20, 25):  # there is room for them
        with cache.entry("files", str(number), 10, "file"):
            pass
    assert sum(path.is_dir() for path in cached_data().glob("files/*")) == 10
    (cached_data() / "total").write_text("")
    with cache.entry("files", "30", 10, "file"):
        pass
    assert sum(path.is_dir() for path in cached_data().glob("files/*")) == 9


def test_a_manifest_cannot_name_files_elsewhere(store: Any, dataset: str) -> None:
    manifest = store.cat_file("/made/stories/dataset.json").decode()
    store.pipe("/made/stories/dataset.json", manifest.replace("train-00001.bin", "../../../train-00001.bin").encode())
    with pytest.raises(SlmError, match="names a file that no dataset has"):
        open_remote(dataset)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("dataset.json", b"{", "is damaged: not JSON"),
        ("dataset.json", b"[" * 200_000, "is damaged: not JSON"),
        ("dataset.json", b"[]", "format version None"),
        ("dataset.json", b" " * 3_000_000, "is longer than 2 MiB"),
        ("train-00001.bin", b"0" * 3_000_000, "has 3,000,000 bytes instead of"),
        ("tokenizer.json", b" " * 3_000_000, "is longer than 2 MiB"),
    ],
)
def test_what_does_not_fit_is_not_fetched(
    store: Any,
    dataset: str,
    downloads: list[str],
    name: str,
    content: bytes,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit in ("_MANIFEST_BYTES", "_TOKENIZER_BYTES"):
        monkeypatch.setattr(f"slm.train.data.remote.datasets.{limit}", 2 << 20)
    store.pipe(f"/made/stories/{name}", content)
    with pytest.raises(SlmError, match=said):
        open_remote(dataset)
    assert name not in downloads


def test_a_run_trains_on_an_address_and_resumes_without_it(
    store: Any, dataset: str, small_recipe: Callable[..., Recipe], downloads: list[str]
) -> None:
    prepare_dataset(open_corpus(["memory://texts"], None), Path("local"), SETTINGS, Silent())
    recipes = [small_recipe(data={"train": [place]}) for place in ("local", dataset)]
    train(recipes[0], Path("a"), Silent())
    notes = Notes()
    train(recipes[1], Path("b"), notes)
    assert any(note.startswith(f"fetching {dataset}: ") for note in notes.lines)
    weights = "checkpoint/last/model.safetensors"
    assert Path("a", weights).read_bytes() == Path("b", weights).read_bytes()
    reference = json.loads(Path("b/data/dataset.json").read_text(encoding="utf-8"))
    assert reference["dataset"] == dataset
    with pytest.raises(KeyboardInterrupt):
        train(recipes[1], Path("c"), Stopper(4))
    store.rm("/made", recursive=True)  # the cache has the dataset of this hash
    resume(Path("c"), Silent())
    assert Path("a", weights).read_bytes() == Path("c", weights).read_bytes()


def test_a_run_does_not_resume_on_another_dataset(
    store: Any, stored: list[str], dataset: str, small_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(data={"train": [dataset]}), Path("run"), Stopper(4))
    corpus = open_corpus(["memory://texts/a.txt"], None)
    prepare_remote_dataset(corpus, dataset, SETTINGS, Silent(), overwrite=True)
    for path in cached_data().glob("datasets/*/dataset.json"):
        path.unlink()
    with pytest.raises(SlmError, match="not the one that the run was started with: memory://made/stories"):
        resume(Path("run"), Silent())


def test_the_commands_accept_addresses(stored: list[str], slm: Any) -> None:
    slm("data", "prepare", "--data", "memory://texts", "--vocab-size", "300", "--out", "memory://made/x")
    report = json.loads(slm("data", "info", "memory://made/x", "--check", "--json").out)
    assert report["checked"] and report["dataset"] == "memory://made/x"
    result = slm("data", "prepare", "--data", "memory://texts", "--out", "memory://made/x")
    assert result.code == 1 and "there is a prepared dataset already" in result.err
    assert datasets.is_remote("memory://made/x")
