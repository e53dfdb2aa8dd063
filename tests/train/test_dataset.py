"""Datasets: the manifest says what is there, and nothing else is opened."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core import machine
from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.text.documents import read_documents
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train.data.corpus import Corpus, open_corpus
from slm.train.data.dataset import DatasetManifest, check_files, open_dataset, read_manifest, refer_to
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.shards import ShardWriter
from slm.train.data.tokenizer import gpt2, is_gpt2, train_bpe
from slm.train.prepare import prepare
from slm.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def make(out: Path, *files: Path, **options: Any) -> DatasetManifest:
    """Prepares a dataset; the default sizes are small."""
    settings = DatasetSettings(**{"vocab_size": 320, "shard_tokens": 1000} | options)
    return prepare_dataset(open_corpus([str(file) for file in files], None), out, settings, Silent())


@pytest.fixture
def dataset(tmp_path: Path, story_file: Path) -> Path:
    """Sixty stories in shards of about a thousand tokens."""
    make(tmp_path / "dataset", story_file)
    return tmp_path / "dataset"


def test_the_manifest_equals_a_recount(dataset: Path, story_file: Path) -> None:
    opened = open_dataset(dataset)
    documents = list(read_documents(story_file))
    count = opened.manifest.train.documents
    for split, tokens, texts in (
        (opened.manifest.train, opened.train, documents[:count]),
        (opened.manifest.validation, opened.validation, documents[count:]),
    ):
        end = opened.tokenizer.token_id(END_OF_TEXT)
        ids = [i for text in texts for i in [*opened.tokenizer.encode_literal(text), end]]
        assert tokens.ids[:].tolist() == ids
        assert (split.tokens, split.documents) == (len(ids), len(texts)) == (len(tokens.ids), len(texts))
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.text_sha256 == hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()
        assert tokens.header.model_dump() == {
            "dtype": "uint16",
            "tokenizer_sha256": opened.tokenizer.sha256,
            **split.model_dump(include={"tokens", "documents", "text_bytes", "text_sha256"}),
        }
        for shard in split.shards:
            content = (dataset / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
            assert np.frombuffer(content, "<u2")[-1] == end
        for shard in split.shards[:-1]:
            longest = max(len(opened.tokenizer.encode_literal(text)) for text in texts)
            assert 1000 <= shard.tokens <= 1000 + longest
    assert len(opened.manifest.train.shards) > 5
    assert sorted(path.name for path in dataset.iterdir()) == sorted(opened.manifest.files)
    (source,) = opened.manifest.sources
    assert (source.name, source.kind, source.bytes) == (str(story_file), "file", story_file.stat().st_size)
    check_files(dataset, opened.manifest)


def test_shards_are_one_file_cut(dataset: Path, tmp_path: Path, story_file: Path) -> None:
    make(tmp_path / "whole", story_file, shard_tokens=10**9)
    whole, cut = open_dataset(tmp_path / "whole"), open_dataset(dataset)
    assert len(whole.manifest.train.shards) == 1
    assert whole.train.header == cut.train.header
    assert whole.train.ids[:].tolist() == cut.train.ids[:].tolist()
    for start in range(0, len(cut.train.ids) - 100, 37):
        assert whole.train.ids[start : start + 100].tolist() == cut.train.ids[start : start + 100].tolist()


def remove(file: Path, other: Path) -> None:
    file.unlink()


def truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def lengthen(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\0")


def swap(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def overwrite(file: Path, other: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "token file not found"),
        (truncate, "bytes instead of"),
        (lengthen, "bytes instead of"),
        (swap, "is not the one that dataset.json lists"),
        (overwrite, "not a token file"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(dataset: Path, change: Callable, message: str) -> None:
    open_dataset(dataset)
    change(dataset / "train-00003.bin", dataset / "train-00001.bin")
    with pytest.raises(SlmError, match=message) as error:
        open_dataset(dataset)
    assert "train-00003.bin" in error.value.message


def test_one_changed_id_is_found_when_every_byte_is_read(dataset: Path) -> None:
    file = dataset / "train-00002.bin"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    with pytest.raises(SlmError, match=r"train-00002.bin was altered"):
        check_files(dataset, open_dataset(dataset).manifest)


def test_a_shard_of_another_tokenizer(dataset: Path, tmp_path: Path, stories: list[str], story_file: Path) -> None:
    other = train_bpe(stories[:50], 300, 256)
    other.save(tmp_path)
    make(tmp_path / "other", story_file, tokenizer=str(tmp_path / "tokenizer.json"))
    shutil.copy(tmp_path / "other/train-00000.bin", dataset / "train-00000.bin")
    with pytest.raises(SlmError, match=r"another tokenizer: .*train-00000.bin"):
        open_dataset(dataset)
    other.save(dataset)
    with pytest.raises(SlmError, match="another tokenizer"):
        open_dataset(dataset)


def edit(dataset: Path, **fields: object) -> None:
    file = dataset / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_no_name_leads_out_of_the_directory(dataset: Path) -> None:
    (dataset / "train-00000.bin").rename(dataset.parent / "train-00000.bin")
    train = read_manifest(dataset).train.model_dump()
    edit(
        dataset, train=train | {"shards": [{**train["shards"][0], "file": "../train-00000.bin"}, *train["shards"][1:]]}
    )
    with pytest.raises(SlmError, match="leads out of the directory"):
        open_dataset(dataset)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_no_file_of_the_tokenizer_lies_elsewhere(dataset: Path, name: str) -> None:
    (dataset.parent / "secret").write_text("{}")
    (dataset / name).unlink(missing_ok=True)
    (dataset / name).symlink_to(dataset.parent / "secret")
    with pytest.raises(SlmError, match="leads out of the directory"):
        open_dataset(dataset)


def test_a_manifest_that_does_not_add_up(dataset: Path) -> None:
    train = read_manifest(dataset).train.model_dump()
    edit(dataset, train=train | {"tokens": train["tokens"] + 1})
    with pytest.raises(SlmError, match="the totals are not those of the shards"):
        open_dataset(dataset)
    edit(dataset, train=train, more=1)
    with pytest.raises(SlmError, match=r"dataset.json is wrong: more"):
        open_dataset(dataset)
    edit(dataset, format_version=2)
    with pytest.raises(SlmError, match="format version 2 is not 1"):
        open_dataset(dataset)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="not a prepared dataset"):
        open_dataset(tmp_path)


def test_a_run_makes_a_dataset_of_its_own(small_recipe: MakeRecipe, story_file: Path) -> None:
    prepare(small_recipe(), Path("runs/own"), Silent())
    opened = open_dataset(Path("runs/own/data"))
    assert sorted(path.name for path in Path("runs/own/data").iterdir()) == [
        "dataset.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "validation.bin"
    ]  # fmt: skip
    assert opened.manifest.train.documents + opened.manifest.validation.documents == 60


def test_a_run_refers_to_a_prepared_dataset(dataset: Path, small_recipe: MakeRecipe) -> None:
    recipe = small_recipe(data={"train": "dataset"})
    prepare(recipe, Path("runs/refers"), Silent())
    data = Path("runs/refers/data")
    assert sorted(path.name for path in data.iterdir()) == ["dataset.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((data / "dataset.json").read_text(encoding="utf-8")) == refer_to(dataset).model_dump()
    opened, direct = open_dataset(data), open_dataset(dataset)
    assert opened.manifest == direct.manifest
    assert opened.train.ids[:].tolist() == direct.train.ids[:].tolist()
    assert Tokenizer.load(data).config["model_max_length"] == 64  # the model's
    edit(dataset, licence="another")
    with pytest.raises(SlmError, match="not the one that the run was started with"):
        open_dataset(data)
    dataset.rename("elsewhere")
    with pytest.raises(SlmError, match="is gone"):
        open_dataset(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": "stories.txt"}, "with its own validation text"),
        ({"train": ["dataset", "stories.txt"]}, "a prepared dataset holds tokens, not text"),
        ({"tokenizer": "other/tokenizer.json"}, "was made with another tokenizer than"),
    ],
)
def test_what_does_not_go_with_a_dataset(
    dataset: Path, small_recipe: MakeRecipe, stories: list[str], data: dict[str, object], message: str
) -> None:
    Path("other").mkdir()
    train_bpe(stories[:50], 300, 64).save(Path("other"))
    with pytest.raises(SlmError, match=message):
        prepare(small_recipe(data={"train": "dataset"} | data), Path("runs/refused"), Silent())
    assert not Path("runs").exists()


def test_the_datasets_own_tokenizer_may_be_named(dataset: Path, small_recipe: MakeRecipe) -> None:
    recipe = small_recipe(data={"train": "dataset", "tokenizer": "dataset/tokenizer.json"})
    prepare(recipe, Path("runs/named"), Silent())
    assert open_dataset(Path("runs/named/data")).path == dataset.resolve()


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_gpt2s_tokenizer_is_recognized_without_its_files(
    small_recipe: MakeRecipe, story_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        made = gpt2(64)
    except SlmError as error:
        pytest.skip(error.message)
    make(Path("of-gpt2"), story_file, tokenizer="gpt2")
    monkeypatch.setattr("tiktoken.get_encoding", lambda _: pytest.fail("it would be downloaded"))
    recipe = small_recipe(data={"train": "of-gpt2", "tokenizer": "gpt2"}, model={"vocab_size": 50_304})
    prepare(recipe, Path("runs/gpt2"), Silent())
    assert open_dataset(Path("runs/gpt2/data")).path == Path("of-gpt2").resolve()
    made.backend.add_tokens(["once upon"])
    assert not is_gpt2(made)


def test_a_run_on_the_dataset_that_another_run_refers_to(dataset: Path, small_recipe: MakeRecipe) -> None:
    prepare(small_recipe(data={"train": "dataset"}), Path("runs/first"), Silent())
    prepare(small_recipe(data={"train": "runs/first/data"}), Path("runs/second"), Silent())
    assert open_dataset(Path("runs/second/data")).path == dataset.resolve()


def test_a_vocabulary_that_does_not_fit_the_model(dataset: Path, small_recipe: MakeRecipe) -> None:
    with pytest.raises(SlmError, match="320 tokens and the model's vocabulary 300"):
        prepare(small_recipe(data={"train": "dataset"}, model={"vocab_size": 300}), Path("runs/small"), Silent())


@pytest.mark.parametrize(("quota", "workers"), [(None, 8), (3.5, 3)])
def test_no_more_workers_than_the_container_may_use(
    small_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, quota: float | None, workers: int
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "_siblings", str)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    asked: list[int] = []

    def stop(writer: ShardWriter, corpus: Corpus) -> None:
        asked.append(writer.workers)
        raise SlmError("far enough")

    monkeypatch.setattr("slm.train.prepare.write_dataset", stop)
    with pytest.raises(SlmError, match="far enough"):
        prepare(small_recipe(), Path("runs/own"), Silent())
    assert asked == [workers]
