"""Tokenizers: one learned from text, and tiktoken's turned into a tokenizer.json that gives the same ids."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import tiktoken

from slm.core import sample
from slm.core.errors import SlmError
from slm.core.tokenizer import SPECIAL_TOKENS, Tokenizer
from slm.train.data.tokenizer import _byte_to_text, _finished, _from_ranks, gpt2, resolve_tokenizer, train_bpe

# GPT-2's pattern, as tiktoken writes it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

AWKWARD = [
    "",
    " ",
    "a",
    "   leading and trailing   ",
    "tabs\t\tand\n\n\nlines \n mixed\r\n",
    "I'll say it's 'quoted', they've 'S",
    "numbers 1234567890 3.14159 ½ ٣",
    "Grüße aus Köln, 世界 こんにちは 한국어 עברית",
    "emoji 🙂👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿 and e\u0301 \u200b zero width",
    "non-breaking\u00a0space\u2003em space\u3000ideographic",
    "<|endoftext|> is only text here, <start_of_turn> too",
    "x" * 500 + " " * 70 + "!?" * 40,
    "def f(x):\n    return x**2  # comment\n",
]


def texts() -> Iterable[str]:
    yield from AWKWARD
    yield from sample.validation_path().read_text(encoding="utf-8").split("<|endoftext|>")


def byte_ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The vocabulary of a trained BPE as tiktoken has it: bytes to the order of merging."""
    to_byte = {character: byte for byte, character in enumerate(_byte_to_text())}
    plain = [token for token in tokenizer.backend.get_vocab() if token not in SPECIAL_TOKENS]
    in_order = sorted(plain, key=lambda token: tokenizer.token_id(token) or 0)
    return {bytes(to_byte[character] for character in token): rank for rank, token in enumerate(in_order)}


def test_ranks_become_merges_that_give_the_same_ids(stories: list[str]) -> None:
    ranks = byte_ranks(train_bpe(stories, 900, max_length=256))
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    converted = _finished(_from_ranks(ranks, PATTERN), max_length=256)
    assert len(ranks) == 896
    for text in texts():
        assert converted.encode_literal(text) == encoding.encode_ordinary(text), text
        assert converted.decode(converted.encode_literal(text)) == text


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_gpt2_gives_tiktokens_ids() -> None:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"GPT-2's vocabulary is neither cached nor to be had ({type(error).__name__})")
    tokenizer = gpt2(max_length=1024)
    assert tokenizer.vocab_size == 50_260
    assert tokenizer.token_id("<|endoftext|>") == 50_256 == encoding.eot_token
    for text in texts():
        assert tokenizer.encode_literal(text) == encoding.encode_ordinary(text), text
        assert tokenizer.decode(tokenizer.encode_literal(text)) == text


def test_gpt2_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> object:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(SlmError, match=r"GPT-2's vocabulary could not be downloaded \(ConnectionError\)") as error:
        gpt2(max_length=1024)
    assert "--tokenizer bpe" in (error.value.hint or "")


def test_a_learned_one_round_trips(tokenizer: Tokenizer) -> None:
    for text in texts():
        assert tokenizer.decode(tokenizer.encode_literal(text)) == text
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_special_tokens_in_a_text_are_only_characters(tokenizer: Tokenizer) -> None:
    special = {tokenizer.token_id(token) for token in SPECIAL_TOKENS}
    text = " ".join(SPECIAL_TOKENS)
    assert not special & set(tokenizer.encode_literal(text))
    assert not special & set(tokenizer.encode_documents([text])[0])
    assert special <= set(tokenizer.encode(text))


def test_documents_are_encoded_like_single_texts(tokenizer: Tokenizer) -> None:
    many = [text for text in texts() if text]
    assert tokenizer.encode_documents(many) == [tokenizer.encode_literal(text) for text in many]


def test_resolve(tmp_path: Path, tokenizer: Tokenizer, stories: list[str]) -> None:
    learned = resolve_tokenizer("bpe", stories, 320, 256)
    assert learned.sha256 == tokenizer.sha256
    learned.save(tmp_path)
    loaded = resolve_tokenizer(str(tmp_path / "tokenizer.json"), [], 320, 256)
    assert loaded.sha256 == learned.sha256
    with pytest.raises(SlmError, match="320 tokens and the model's vocabulary 300") as error:
        resolve_tokenizer(str(tmp_path), [], 300, 256)
    assert error.value.hint == "--set model.vocab_size=320"
    with pytest.raises(SlmError, match="tokenizer not found"):
        resolve_tokenizer("gpt3", [], 320, 256)
