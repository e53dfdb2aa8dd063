"""What is trained on and what is held out."""

from pathlib import Path

import datasets
import pytest

from slm.core import sample
from slm.core.errors import SlmError
from slm.core.text.documents import Beginning
from slm.train.data.corpus import Reading, open_corpus


def dump(path: Path, documents: list[str]) -> str:
    path.write_text("".join(f"{document}\n<|endoftext|>\n" for document in documents), encoding="utf-8")
    return str(path)


def test_files_with_validation(tmp_path: Path) -> None:
    corpus = open_corpus(
        [dump(tmp_path / "a.txt", ["a", "b"]), dump(tmp_path / "b.txt", ["c"])], dump(tmp_path / "v.txt", ["v"])
    )
    for _ in range(2):  # read anew each time
        assert list(corpus.train()) == ["a", "b", "c"]
        assert list(corpus.validation()) == ["v"]


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    documents = [f"{number:05}" + "x" * 995 for number in range(20_000)]
    corpus = open_corpus([dump(tmp_path / "a.txt", documents)], None)
    held_out = list(corpus.validation())
    assert len(held_out) == 200  # one percent
    assert [*corpus.train(), *held_out] == documents
    assert "the last 200 documents" in corpus.about


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (50, 5), (100, 10), (1_000, 66)])
def test_of_little_text_up_to_a_tenth_is_held_out(tmp_path: Path, count: int, held_out: int) -> None:
    corpus = open_corpus([dump(tmp_path / "a.txt", ["x" * 1_000] * count)], None)
    assert (len(list(corpus.train())), len(list(corpus.validation()))) == (count - held_out, held_out)


def test_a_single_document_is_cut_at_a_space(tmp_path: Path) -> None:
    text = "to be or not to be " * 100
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    corpus = open_corpus([str(file)], None)
    (head,), (tail,) = list(corpus.train()), list(corpus.validation())
    assert head + tail == text
    assert tail[0] == " "
    assert 150 < len(tail) < 250


def test_a_long_document_comes_in_parts_and_is_cut_at_the_same_place(tmp_path: Path) -> None:
    text = "to be or not to be\n" * 300
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    whole, parts = (open_corpus([str(file)], None, Reading(limit=limit)) for limit in (1 << 20, 700))
    for split in ("train", "validation"):
        (wanted,) = getattr(whole, split)()
        found = list(getattr(parts, split)())
        assert "".join(found) == wanted
        assert not isinstance(found[-1], Beginning) and all(isinstance(part, Beginning) for part in found[:-1])
    assert len(list(parts.train())) > 3
    assert whole.about == parts.about


def test_long_documents_among_others_are_held_out_the_same(tmp_path: Path) -> None:
    documents = ["short one", "a long one " * 300, "short two", "another long one " * 200, "last"]
    data = [dump(tmp_path / "a.txt", documents)]
    whole, parts = (open_corpus(data, None, Reading(limit=limit)) for limit in (1 << 20, 700))
    assert whole.counts == parts.counts and whole.about == parts.about
    for split in ("train", "validation"):
        assert "".join(getattr(parts, split)()) == "".join(getattr(whole, split)())


def test_the_sample_brings_its_validation() -> None:
    corpus = open_corpus(["sample"], None)
    train, validation = list(corpus.train()), list(corpus.validation())
    assert len(train) > len(validation) > 10
    assert not set(train) & set(validation)
    assert "<|endoftext|>" not in "".join(train)


def test_the_sample_with_other_validation(tmp_path: Path) -> None:
    corpus = open_corpus(["sample"], str(sample.stories_path()))
    assert list(corpus.train()) == list(corpus.validation())


def test_tinystories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = datasets.load_dataset
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    for split, file in files.items():
        Path(file).write_text(f'{{"text": "\\nA story to {split}.\\n"}}\n{{"text": ""}}\n', encoding="utf-8")
    asked: list[str] = []

    def local(name: str) -> object:
        asked.append(name)
        return load("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    corpus = open_corpus(["tinystories"], None)
    assert asked == ["roneneldan/TinyStories"]
    assert list(corpus.train()) == ["A story to train."]
    assert list(corpus.validation()) == ["A story to validation."]


def test_tinystories_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> object:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SlmError, match="could not be downloaded") as error:
        open_corpus(["tinystories"], None)
    assert error.value.hint is not None
    assert "--data sample" in error.value.hint


def test_what_is_refused(tmp_path: Path) -> None:
    full, empty = dump(tmp_path / "a.txt", ["a"]), dump(tmp_path / "empty.txt", [" ", ""])
    with pytest.raises(SlmError, match="cannot be combined with other data"):
        open_corpus(["sample", full], None)
    with pytest.raises(SlmError, match=r"no text in .*empty.txt"):
        open_corpus([full, empty], None)
    with pytest.raises(SlmError, match=r"no text in .*empty.txt"):
        open_corpus([full], empty)
    with pytest.raises(SlmError, match="too little text"):
        open_corpus([full], None)
