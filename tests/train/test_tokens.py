"""Token files: what is written is read, the same bytes every time, and nothing else is accepted."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.text import cuts
from slm.core.text.cuts import cuts_at_spaces, pieces
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train.data import encoder as module
from slm.train.data.encoder import Encoder
from slm.train.data.shards import ShardWriter
from slm.train.data.tokenizer import gpt2, train_bpe
from slm.train.data.tokens import TokenIds, open_tokens

TEXTS = [
    "Once upon a time there was a cat.",
    "Grüße, 世界 🙂",
    "literally <|endoftext|> inside",
    "  spaces\n\n\tand tabs ",
]


def write(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Path:
    """Writes one token file."""
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(path.parent)
    ShardWriter(path.parent, tokenizer, Silent()).write(path.stem, iter(texts))
    return path


@pytest.fixture
def file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write(tmp_path / "train.bin", TEXTS, tokenizer)


def test_round_trip(file: Path, tokenizer: Tokenizer) -> None:
    opened = open_tokens(file, tokenizer)
    end = tokenizer.token_id(END_OF_TEXT)
    assert opened.ids[:].tolist() == [i for text in TEXTS for i in [*tokenizer.encode_literal(text), end]]
    assert opened.ids[:].tolist().count(end) == len(TEXTS)  # the one spelt inside a text is no token
    assert opened.ids[:].dtype == np.dtype("<u2")
    assert opened.header.documents == len(TEXTS)
    assert opened.header.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert not opened.ids[:].flags.writeable


def test_the_same_text_gives_the_same_bytes(file: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    again = write(tmp_path / "again.bin", TEXTS, tokenizer)
    assert again.read_bytes() == file.read_bytes()


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", 70_000)
    opened = open_tokens(write(tmp_path / "wide.bin", TEXTS, tokenizer), tokenizer)
    assert opened.ids[:].dtype == np.dtype("<u4")
    assert opened.ids[: len(tokenizer.encode_literal(TEXTS[0]))].tolist() == tokenizer.encode_literal(TEXTS[0])


def test_pieces_of_a_long_document_are_encoded_like_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(stories[:20]) + "   \n\t x" + "y" * 300
    monkeypatch.setattr(cuts, "_PIECE_CHARACTERS", 101)
    assert len(list(pieces(text))) > 50
    path = write(tmp_path / "long.bin", [text], tokenizer)
    assert open_tokens(path, tokenizer).ids[:].tolist()[:-1] == tokenizer.encode_literal(text)


def refused(file: Path, tokenizer: Tokenizer) -> str:
    with pytest.raises(SlmError) as error:
        open_tokens(file, tokenizer)
    assert str(file) in error.value.message
    return error.value.message


def test_truncated(file: Path, tokenizer: Tokenizer) -> None:
    file.write_bytes(file.read_bytes()[:-2])
    assert "bytes instead of" in refused(file, tokenizer)


@pytest.mark.parametrize("content", [b"", b"SLMTOK", b"\x00" * 4096])
def test_wrong_magic(file: Path, tokenizer: Tokenizer, content: bytes) -> None:
    file.write_bytes(content)
    assert "not a token file" in refused(file, tokenizer)


def test_damaged_header(file: Path, tokenizer: Tokenizer) -> None:
    content = bytearray(file.read_bytes())
    content[20] ^= 0xFF
    file.write_bytes(content)
    assert "damaged" in refused(file, tokenizer)


def test_another_tokenizer(file: Path, stories: list[str]) -> None:
    assert "another tokenizer" in refused(file, train_bpe(stories[:50], 300, 256))


def test_missing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert "not found" in refused(tmp_path / "none.bin", tokenizer)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "a" * (5 << 20)
        raise KeyboardInterrupt

    directory = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        write(directory / "train.bin", documents(), tokenizer)
    assert sorted(path.name for path in directory.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_slices_across_files_are_those_of_one_file(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths), dtype="<u2")
    ids = TokenIds(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(ids) == len(whole)
    bound = st.none() | st.integers(-len(whole) - 2, len(whole) + 2)
    start, stop = data.draw(bound), data.draw(bound)
    assert ids[start:stop].tolist() == whole[start:stop].tolist()
    assert ids[start:stop].dtype == whole.dtype


# What the cuts depend on: kinds of white space, some of them none to GPT-2's pattern, beside words, digits, punctuation.
CHARACTERS = [
    *" \n\t\r\x0b\x1c\x1f\x85\u00a0\u2028\u3000\u200b",
    "  ",
    "a",
    "The",
    "'s",
    "'",
    "!",
    "1",
    "é",
    "世",
    END_OF_TEXT,
]


@given(st.lists(st.lists(st.sampled_from(CHARACTERS), max_size=20).map("".join), max_size=8))
def test_remembered_words_have_the_ids_of_the_whole_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder = Encoder(tokenizer)
    for _ in range(2):  # learned, then looked up
        assert decoded(encoder.encode(texts)) == [tokenizer.encode_literal(text) for text in texts]


def test_remembered_words_of_gpt2(gpt2_vocabulary: None, stories: list[str]) -> None:
    try:
        tokenizer = gpt2(1024)
    except SlmError:
        pytest.skip("GPT-2's vocabulary is neither cached nor to be downloaded")
    assert cuts_at_spaces(tokenizer)
    texts = [*stories, "  def f(x):\n\t    return  x \n", "a\x1c b\u00a0 c !\n", "I'll  don't 12345 ...\n\n \n"]
    assert decoded(Encoder(tokenizer).encode(texts)) == [tokenizer.encode_literal(text) for text in texts]


def test_what_is_remembered_is_bounded(
    tokenizer: Tokenizer, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MEMORY_CHARACTERS", 200)
    encoder = Encoder(tokenizer)
    for story in stories:
        assert decoded(encoder.encode([story])) == [tokenizer.encode_literal(story)]
        assert sum(map(len, encoder._ids_after_space)) <= 200 + len(story)


def decoded(encoded: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(ids, dtype="<u2").tolist() for ids in encoded]


def with_a_word_of_two(backend: Backend) -> None:
    backend.add_tokens([AddedToken("was a")])


def with_spaces_after(backend: Backend) -> None:
    split = pre_tokenizers.Split(Regex(r"\S+\s*"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def with_lower_case(backend: Backend) -> None:
    backend.normalizer = normalizers.Lowercase()


def with_a_space_before(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [with_a_word_of_two, with_spaces_after, with_lower_case, with_a_space_before])
def test_another_kind_of_tokenizer_gets_whole_documents(tokenizer: Tokenizer, change, stories: list[str]) -> None:  # type: ignore[no-untyped-def]
    other = Tokenizer(Backend.from_str(tokenizer.backend.to_str()), {})
    assert cuts_at_spaces(other)
    change(other.backend)
    assert not cuts_at_spaces(other)
    texts = [story.strip() for story in stories[:20]]
    assert decoded(Encoder(other).encode(texts)) == [other.encode_literal(text) for text in texts]
