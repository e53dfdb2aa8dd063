"""Preparation at scale: the same bytes for any number of workers, little memory, duplicates, and Hugging Face datasets."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.train.data import workers
from slm.train.data.corpus import Reading, open_corpus
from slm.train.data.dataset import open_dataset
from slm.train.data.shards import ShardWriter
from tests.train.preparing import END, all_ended, contents, make

pytestmark = pytest.mark.usefixtures("stories_txt")


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
    ahead = 2 * 3  # batches of three workers
    a_batch = 3000 // 180 + 2  # documents of about 180 characters
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


def test_two_preparations_of_one_dataset_exclude_each_other(small_batches: None) -> None:
    class Second(Silent):
        def start(self, name: str, total: int | None, unit: str) -> None:
            make("out", "stories.txt")

    with pytest.raises(SlmError, match=r"another process \(\d+\) prepares"):
        make("out", "stories.txt", progress=Second())


def test_only_a_new_or_empty_directory_is_written_to() -> None:
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
    reading: dict[str, Any] = {"column": "content", "streaming": streaming}
    manifest = make("out", "hf:hub", reading=reading)
    assert manifest.held_out == "one document in 100, by its hash"
    assert manifest.train.documents + manifest.validation.documents == 1000
    assert 2 <= manifest.validation.documents <= 22  # 10 expected, four standard deviations

    def splits() -> tuple[list[str], list[str]]:
        corpus = open_corpus(["hf:hub"], None, Reading(**reading))
        return list(corpus.train()), list(corpus.validation())

    train, validation = splits()
    assert len(validation) == manifest.validation.documents
    parquet(hub / "train.parquet", texts[::-1], "content")
    assert splits() == (train[::-1], validation[::-1])  # the place of a document does not matter


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
