"""Text and datasets behind addresses: what is read, prepared, uploaded and trained on."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.runs import cached_data
from slm.train.data import workers
from slm.train.data.corpus import open_corpus
from slm.train.data.dataset import open_dataset, open_remote
from slm.train.data.preparation import prepare_dataset
from slm.train.data.remote.datasets import check_remote, publish, remote_manifest
from slm.train.data.remote.preparation import prepare_remote_dataset
from slm.train.data.remote.text import remote_files
from slm.train.data.tokens import TokenFileWriter
from slm.train.recipe import Recipe
from slm.train.run import resume, train
from tests.progress import Notes, Stopper
from tests.train.preparing import END, SETTINGS, contents

pytestmark = pytest.mark.usefixtures("store")


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


@pytest.mark.parametrize(
    ("address", "message"),
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
    store: Any, stored: list[str], address: str, message: str | None
) -> None:
    store.pipe("/broken/x.jsonl", b'{"text": "one"}\n{"other": 1}\n')
    store.pipe("/binary.exe", b"\0")
    store.pipe("/empty/x.png", b"\0")
    if message is None:
        open_corpus([address], None)
        return
    with pytest.raises(SlmError) as caught:
        open_corpus([address], None)
    assert message in caught.value.message and str(cached_data()) not in caught.value.message


def test_a_dataset_behind_an_address_has_the_bytes_of_a_local_one(store: Any, remote_dataset: str) -> None:
    prepare_dataset(open_corpus(["memory://texts"], None), Path("local"), SETTINGS, Silent())
    assert {name: store.cat_file(f"/made/stories/{name}") for name in contents("local")} == {
        file.name: file.read_bytes() for file in Path("local").iterdir()
    }
    assert len(store.ls("/made/stories")) == len(contents("local"))
    check_remote(remote_dataset, remote_manifest(remote_dataset)[0])
    opened, local = open_remote(remote_dataset), open_dataset(Path("local"))
    assert (opened.train.ids[:] == local.train.ids[:]).all() and opened.manifest == local.manifest
    assert not cached_data().with_name("unfinished").exists()


def test_a_taken_address_is_not_overwritten(store: Any, stored: list[str], remote_dataset: str) -> None:
    corpus = open_corpus(["memory://texts/a.txt"], None)
    with pytest.raises(SlmError, match="there is a prepared dataset already: memory://made/stories"):
        prepare_remote_dataset(corpus, remote_dataset, SETTINGS, Silent())
    with pytest.raises(SlmError, match="memory://texts holds something that is not of a dataset"):
        prepare_remote_dataset(corpus, "memory://texts", SETTINGS, Silent(), overwrite=True)
    prepare_remote_dataset(corpus, remote_dataset, SETTINGS, Silent(), overwrite=True)
    manifest, _ = remote_manifest(remote_dataset)
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


def test_a_reader_never_sees_half_of_a_dataset(store: Any, stored: list[str], remote_dataset: str) -> None:
    prepare_dataset(open_corpus(["memory://texts/a.txt"], None), Path("local"), SETTINGS, Silent())
    local = open_dataset(Path("local"))

    def failing(name: str, target: str) -> None:
        if name.startswith("validation"):
            raise OSError("gone")
        store.put_file(str(Path("local", name)), target)

    with pytest.raises(SlmError, match="cannot write memory://made/stories"):
        publish(remote_dataset, local.manifest, failing, Silent())
    with pytest.raises(SlmError, match=r"not found: memory://made/stories/dataset\.json"):
        open_remote(remote_dataset)
    publish(
        remote_dataset, local.manifest, lambda name, target: store.put_file(str(Path("local", name)), target), Silent()
    )
    assert open_remote(remote_dataset).manifest == local.manifest


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


def test_a_run_trains_on_an_address_and_resumes_without_it(
    store: Any, remote_dataset: str, small_recipe: Callable[..., Recipe], downloads: list[str]
) -> None:
    prepare_dataset(open_corpus(["memory://texts"], None), Path("local"), SETTINGS, Silent())
    recipes = [small_recipe(data={"train": [place]}) for place in ("local", remote_dataset)]
    train(recipes[0], Path("a"), Silent())
    notes = Notes()
    train(recipes[1], Path("b"), notes)
    assert any(note.startswith(f"fetching {remote_dataset}: ") for note in notes.lines)
    weights = "checkpoint/last/model.safetensors"
    assert Path("a", weights).read_bytes() == Path("b", weights).read_bytes()
    reference = json.loads(Path("b/data/dataset.json").read_text(encoding="utf-8"))
    assert reference["dataset"] == remote_dataset
    with pytest.raises(KeyboardInterrupt):
        train(recipes[1], Path("c"), Stopper(4))
    store.rm("/made", recursive=True)  # the cache has the dataset of this hash
    resume(Path("c"), Silent())
    assert Path("a", weights).read_bytes() == Path("c", weights).read_bytes()


def test_a_run_does_not_resume_on_another_dataset(
    store: Any, stored: list[str], remote_dataset: str, small_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(data={"train": [remote_dataset]}), Path("run"), Stopper(4))
    corpus = open_corpus(["memory://texts/a.txt"], None)
    prepare_remote_dataset(corpus, remote_dataset, SETTINGS, Silent(), overwrite=True)
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
