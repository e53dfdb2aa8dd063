"""Selection of documents: what each filter removes, near duplicates, and the same result with any number of workers."""

import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.train.data.corpus import Reading, open_corpus
from slm.train.data.dataset import DatasetManifest
from slm.train.data.preparation import DatasetSettings, prepare_dataset
from slm.train.data.selection import findings, settings
from slm.train.data.selection.minhash import NearDuplicates, rows_per_band, shingles, signature
from slm.train.data.selection.quality import fault
from slm.train.data.selection.selector import selecting
from slm.train.data.selection.settings import Selection
from tests.train.preparing import contents

END = "\n<|endoftext|>\n"
FRENCH = (
    "Il était une fois un petit renard qui vivait dans la forêt avec sa mère. Chaque matin il allait au bord de la "
    "rivière pour regarder les poissons, et chaque soir il rentrait à la maison pour dormir sous les étoiles."
)
WORDS = [f"{a}{b}{c}" for a in "bdgmt" for b in ("an", "el", "or", "up") for c in ("", "ik", "o", "uth", "ery")]


def drawn(seed: int, words: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def changed(text: list[str], places: int, seed: int = 0) -> list[str]:
    """The text with other words at some places."""
    chosen = random.Random(seed).sample(range(len(text)), places)
    return ["other" if place in chosen else word for place, word in enumerate(text)]


def prepared(out: str, documents: list[str], workers: int = 1, progress: Any = None, **options: Any) -> DatasetManifest:
    Path("text.txt").write_text(END.join(documents), encoding="utf-8")
    corpus = open_corpus(["text.txt"], None, Reading())
    options = {"vocab_size": 300, "shard_tokens": 20_000} | options
    return prepare_dataset(corpus, Path(out), DatasetSettings(**options), progress or Silent(), workers=workers)


# Gopher's thresholds, each with a text beyond it and one at it.
STORY = (
    "Once upon a time there was a fox that lived in the forest with her mother. Every morning she went to the river and "
    "looked at the fish. One day a small bird fell out of its nest, and nobody knew how to help it. The fox carried the "
    "bird home, fed it with berries, and waited until it could fly again. They have been friends ever since."
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (STORY, None),
        (FRENCH * 2, "repeated lines"),
        (" ".join(STORY.split()[:49]), "too short"),
        (" ".join(STORY.split()[:50]), None),
        ("of to " * 40 + STORY.replace(" ", " x ", 60), "word length"),
        (STORY + " #" * 7, None),
        (STORY + " #" * 9, "symbols"),
        (STORY.replace(". ", ".\n- ").replace("Once", "- Once"), "bullets"),
        (STORY.replace(". ", ".\n- "), None),  # the first of five lines has none
        (STORY.replace(". ", "...\n"), "ellipses"),
        (STORY + " 1234567" * 20, "few words"),
        (STORY + " 3 4 5 6 7 8 9", None),
        (STORY.replace("upon", "lorem ipsum"), "placeholder or code"),
        (STORY + " { }", "placeholder or code"),
        (STORY + "\n" + "\n".join(f"A line that is here twice{i % 2}" for i in range(8)), "repeated lines"),
        (STORY + " the fox went home again" * 6, "repeated words"),
        (STORY + " The fox went home. The bird went home.", None),
    ],
)  # fmt: skip
def test_a_rule_of_quality_removes_what_breaks_it(text: str, rule: str | None) -> None:
    text = text if "\n" in text or rule != "repeated lines" else f"{text}\n{text}"
    assert fault(text) == rule


def test_stop_words_are_required_of_english_text_only() -> None:
    assert fault(" ".join(changed(WORDS, 0))) is None
    assert fault(" ".join(changed(WORDS, 0)), english=True) == "stop words"


def test_shingles_ignore_case_and_punctuation() -> None:
    assert shingles("The fox, the BIRD and the moon!") == {
        "the fox the bird and",
        "fox the bird and the",
        "the bird and the moon",
    }
    assert shingles("Short one.") == {"short one"}
    assert shingles("...") == {"..."}
    # Scripts without spaces count characters.
    assert len(shingles("昔々ある所に狐がいた")) == 6


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_documents_at_the_threshold_are_compared(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def similarity(first: list[str], second: list[str]) -> float:
    one, other = shingles(" ".join(first)), shingles(" ".join(second))
    return len(one & other) / len(one | other)


def test_near_duplicates_are_found_and_others_kept() -> None:
    pytest.importorskip("rensa", reason="the extra data is not installed")
    with sqlite3.connect(":memory:") as connection:
        near = NearDuplicates(connection, 0.8)
        texts = [drawn(seed, 300) for seed in range(40)]
        assert all(near.add(signature(" ".join(text))) for text in texts)
        alike, unlike = [changed(text, 2) for text in texts], [changed(text, 14) for text in texts]
        assert all(similarity(text, other) > 0.93 for text, other in zip(texts, alike, strict=True))
        assert all(similarity(text, other) < 0.7 for text, other in zip(texts, unlike, strict=True))
        assert not any(near.add(signature(" ".join(text))) for text in alike)
        assert all(near.add(signature(" ".join(text))) for text in unlike)


def test_an_estimate_is_near_the_similarity() -> None:
    pytest.importorskip("rensa", reason="the extra data is not installed")
    for seed in range(20):
        text = drawn(seed, 300)
        other = changed(text, 1 + seed, seed)
        equal = sum(
            a == b for a, b in zip(*(memoryview(signature(" ".join(t))).cast("I") for t in (text, other)), strict=True)
        )
        assert abs(equal / 128 - similarity(text, other)) < 0.18  # four standard errors


@pytest.fixture
def documents(stories: list[str]) -> list[str]:
    """Stories with near duplicates, French and short documents among them; the last ones become validation text."""
    texts = [story.strip() for story in stories]
    for number in range(0, 40, 4):
        words = stories[number].strip().split(" ")
        texts.insert(number + 20, " ".join([*words[:-1], "indeed."]))
    texts[7:7] = [FRENCH + f" Numéro {number}." for number in range(3)]
    texts[9:9] = ["Too short to keep."] * 2
    return texts


OPTIONS: dict[str, Any] = {"near_duplicates": 0.7, "languages": ("en",), "quality": True, "deduplicate": True}


def test_any_number_of_workers_and_interruptions_select_the_same(
    documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rensa", reason="the extra data is not installed")
    pytest.importorskip("py3langid", reason="the extra data is not installed")
    whole = prepared("one", documents, **OPTIONS)
    monkeypatch.setattr(findings, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(findings, "_WORTH_WORKERS", 2)
    prepared("two", documents, 2, **OPTIONS)
    assert contents("one") == contents("two")

    class Interrupted(Silent):
        left = 60

        def advance(self, amount: int = 1, **fields: str) -> None:
            self.left -= amount
            if self.left < 0:
                raise KeyboardInterrupt

    small = {"shard_tokens": 2_000}
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr("slm.train.data.workers._BATCH_CHARACTERS", 3000)
        prepared("cut", documents, progress=Interrupted(), **OPTIONS, **small)
    assert list(Path(".cut.unfinished").glob("train-*.bin"))
    prepared("cut", documents, **OPTIONS, **small)
    prepared("uncut", documents, **OPTIONS, **small)
    assert contents("cut") == contents("uncut")
    assert whole.selection is not None
    removed = whole.selection.removed["train"]
    assert removed["language"] >= 3 and removed["too short"] == 2
    assert removed["near duplicate"] >= 10
    kept = sum(split.documents + split.duplicates_removed for split in (whole.train, whole.validation))
    gone = sum(sum(counts.values()) for counts in whole.selection.removed.values())
    assert kept + gone == len(documents)


@pytest.mark.parametrize("option", [{"near_duplicates": 0.7}, {"languages": ("en",)}, {"quality": True}])
def test_each_option_removes_something_and_is_recorded(documents: list[str], option: dict[str, Any]) -> None:
    pytest.importorskip("rensa", reason="the extra data is not installed")
    pytest.importorskip("py3langid", reason="the extra data is not installed")
    everything = prepared("all", documents)
    some = prepared("some", documents, **option)
    assert some.train.documents < everything.train.documents
    assert some.selection is not None and len(some.selection.versions) == 1
    assert everything.selection is None and "selection" not in json.loads(Path("all/dataset.json").read_text())


def test_another_version_of_a_package_starts_over(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = Selection(quality=True).versions()
    monkeypatch.setattr(settings, "QUALITY_RULES", 2)
    assert Selection(quality=True).versions() != first


def test_a_tokenizer_is_learned_from_what_the_filters_keep(documents: list[str]) -> None:
    prepared("all", documents)
    prepared("good", documents, quality=True)
    assert contents("all")["tokenizer.json"] != contents("good")["tokenizer.json"]


def test_a_missing_package_and_an_unknown_language_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if settings._installed("py3langid"):
        with pytest.raises(SlmError, match="--language klingon is not a language"):
            Selection(languages=("klingon",)).check()
        Selection(languages=("en", "de", "zh")).check()
    monkeypatch.setattr(settings, "_installed", lambda package: False)
    with pytest.raises(SlmError, match="--near-dedup needs the package rensa") as caught:
        Selection(near_duplicates=0.8).check()
    assert caught.value.hint == "pip install 'slm-edge[data]'"
    with pytest.raises(SlmError, match="--language needs the package py3langid"):
        Selection(languages=("en",)).check()
    Selection(quality=True, deduplicate=True).check()


def test_a_document_in_parts_is_rejected_with_the_option_that_was_given() -> None:
    from slm.core.text.documents import Beginning

    with (
        selecting(Selection(quality=True), Path("seen")) as selector,
        pytest.raises(SlmError, match="--quality compares whole documents"),
    ):
        list(selector.chosen([Beginning("a"), "b"], "train", 1, 1))
    assert not Path("seen").exists()
