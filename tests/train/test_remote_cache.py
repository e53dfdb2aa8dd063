"""The cache of remote text and datasets: copies are fetched once, checked, and replaced if damaged; its size is bounded."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.runs import cached_data
from slm.train.data.corpus import open_corpus
from slm.train.data.dataset import open_remote
from slm.train.data.remote import cache, datasets, text
from slm.train.data.remote.datasets import check_remote, remote_manifest
from tests.train.preparing import END

pytestmark = pytest.mark.usefixtures("store")


def cached_shard() -> Path:
    return sorted(cached_data().glob("datasets/*/train-00001.bin"))[0]


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


def test_a_copy_is_fetched_once_and_again_where_it_is_damaged(remote_dataset: str, downloads: list[str]) -> None:
    files = remote_manifest(remote_dataset)[0].files
    open_remote(remote_dataset)
    assert sorted(downloads) == sorted(set(files) - {"dataset.json"})
    open_remote(remote_dataset)
    assert len(downloads) == len(files) - 1
    for damage in (
        lambda file: file.write_bytes(file.read_bytes()[:-2] + b"xx"),
        lambda file: file.write_bytes(b""),
        Path.unlink,
    ):
        downloads.clear()
        damage(cached_shard())
        opened = open_remote(remote_dataset)
        assert downloads == ["train-00001.bin"]
        assert opened.train.ids[:].max() < 300


def test_damage_without_a_trace_is_found_when_the_check_is_old(
    remote_dataset: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_remote(remote_dataset)
    file = cached_shard()
    stat = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    downloads.clear()
    monkeypatch.setattr("slm.train.data.remote.datasets._CHECKED_FOR_S", 0.0)
    open_remote(remote_dataset)
    assert downloads == ["train-00001.bin"]


def test_damage_in_the_store_is_found(store: Any, remote_dataset: str) -> None:
    content = store.cat_file("/made/stories/train-00001.bin")
    store.pipe("/made/stories/train-00001.bin", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SlmError, match=r"train-00001.bin differs from the dataset's manifest \(SHA-256\)"):
        open_remote(remote_dataset)
    assert not list(cached_data().glob("datasets/*/train-00001*"))
    with pytest.raises(SlmError, match=r"train-00001\.bin was altered"):
        check_remote(remote_dataset, remote_manifest(remote_dataset)[0])


def test_a_tokenizer_that_was_damaged_in_the_store_is_fetched_again(store: Any, remote_dataset: str) -> None:
    content = store.cat_file("/made/stories/tokenizer.json")
    store.pipe("/made/stories/tokenizer.json", content.replace(b'"a":', b'"~a":', 1))
    with pytest.raises(SlmError, match=r"invalid tokenizer\.json"):
        open_remote(remote_dataset)
    store.pipe("/made/stories/tokenizer.json", content)
    assert open_remote(remote_dataset).manifest.train.documents


def test_an_interrupted_copy_continues(
    remote_dataset: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, left = text.fetch, [5]

    def stopping(address: str, local: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            local.write_bytes(b"half")
            raise KeyboardInterrupt
        fetch(address, local)

    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", stopping)
    with pytest.raises(KeyboardInterrupt):
        open_remote(remote_dataset)
    monkeypatch.setattr("slm.train.data.remote.datasets.fetch", fetch)
    downloads.clear()
    open_remote(remote_dataset)
    assert len(downloads) == len(remote_manifest(remote_dataset)[0].files) - 1 - 2 and not list(
        cached_data().glob("datasets/*/*.partial")
    )


def test_several_that_start_at_once_fetch_once(
    remote_dataset: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = datasets.fetch

    def slow(address: str, local: Path) -> None:
        time.sleep(0.05)  # without the lock, the others look for the file and fetch it too
        fetch(address, local)

    monkeypatch.setattr(datasets, "fetch", slow)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(open_remote(remote_dataset).manifest)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(downloads) == len(found[0].files) - 1


def test_the_cache_is_bounded(
    store: Any, stored: list[str], remote_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        open_remote(remote_dataset)
    assert "SLM_CACHE_BYTES" in (caught.value.hint or "")
    monkeypatch.setenv("SLM_CACHE_BYTES", "a lot")
    with pytest.raises(SlmError, match="SLM_CACHE_BYTES=a lot is not a size"):
        open_remote(remote_dataset)


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


def test_a_manifest_cannot_name_files_elsewhere(store: Any, remote_dataset: str) -> None:
    manifest = store.cat_file("/made/stories/dataset.json").decode()
    store.pipe("/made/stories/dataset.json", manifest.replace("train-00001.bin", "../../../train-00001.bin").encode())
    with pytest.raises(SlmError, match="names a file that no dataset has"):
        open_remote(remote_dataset)


@pytest.mark.parametrize(
    ("name", "content", "message"),
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
    remote_dataset: str,
    downloads: list[str],
    name: str,
    content: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit in ("_MANIFEST_BYTES", "_TOKENIZER_BYTES"):
        monkeypatch.setattr(f"slm.train.data.remote.datasets.{limit}", 2 << 20)
    store.pipe(f"/made/stories/{name}", content)
    with pytest.raises(SlmError, match=message):
        open_remote(remote_dataset)
    assert name not in downloads
