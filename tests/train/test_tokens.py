"""Token files: what is written is read, the same bytes every time, and nothing else is accepted."""

from pathlib import Path

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.core.progress import Silent
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train.data import tokens as module
from slm.train.data.tokenizer import train_bpe
from slm.train.data.tokens import open_tokens, write_tokens

TEXTS = [
    "Once upon a time there was a cat.",
    "Grüße, 世界 🙂",
    "literally <|endoftext|> inside",
    "  spaces\n\n\tand tabs ",
]


@pytest.fixture
def file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "train.bin"
    write_tokens(path, TEXTS, tokenizer, Silent(), "text")
    return path


def test_round_trip(file: Path, tokenizer: Tokenizer) -> None:
    opened = open_tokens(file, tokenizer)
    end = tokenizer.token_id(END_OF_TEXT)
    assert opened.ids.tolist() == [i for text in TEXTS for i in [*tokenizer.encode_literal(text), end]]
    assert opened.ids.tolist().count(end) == len(TEXTS)  # the one spelt inside a text is no token
    assert opened.ids.dtype == np.dtype("<u2")
    assert opened.header.documents == len(TEXTS)
    assert opened.header.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert not opened.ids.flags.writeable


def test_the_same_text_gives_the_same_bytes(file: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    again = tmp_path / "again.bin"
    write_tokens(again, iter(TEXTS), tokenizer, Silent(), "text")
    assert again.read_bytes() == file.read_bytes()


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", 70_000)
    path = tmp_path / "wide.bin"
    write_tokens(path, TEXTS, tokenizer, Silent(), "text")
    opened = open_tokens(path, tokenizer)
    assert opened.ids.dtype == np.dtype("<u4")
    assert opened.ids[: len(tokenizer.encode_literal(TEXTS[0]))].tolist() == tokenizer.encode_literal(TEXTS[0])


def test_pieces_of_a_long_document_are_encoded_like_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(stories[:20]) + "   \n\t x" + "y" * 300
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 101)
    assert len(list(module._pieces(text))) > 50
    path = tmp_path / "long.bin"
    write_tokens(path, [text], tokenizer, Silent(), "text")
    assert open_tokens(path, tokenizer).ids.tolist()[:-1] == tokenizer.encode_literal(text)


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
        write_tokens(directory / "train.bin", documents(), tokenizer, Silent(), "text")
    assert list(directory.iterdir()) == []
