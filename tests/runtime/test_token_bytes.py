"""The bytes of every token in any vocabulary: joined they are the text, even if tokens are parts of characters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

import slm
from slm.core.tokenizer import Tokenizer
from slm.runtime.token_bytes import token_bytes

TEXTS = ("Once upon a time", "é 🦊 東京\n\tthe end", "a  b   c", "🦊" * 5)
WORDS = ["▁", "▁the", "the", "▁Once", "a", "b", "é", "▁end"]


def fallback(decoder: Any) -> Tokenizer:
    """Gemma's and Llama's kind: "▁" for a space, single bytes for what is not in the vocabulary."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {word: 256 + i for i, word in enumerate([*WORDS, "<unk>"])}
    merges = [("▁", "the")]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, {})


def gemma() -> Tokenizer:
    tokenizer = fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
    tokenizer.backend.add_tokens([AddedToken("東京", normalized=False)])
    return tokenizer


def llama() -> Tokenizer:
    tokenizer = fallback(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    )
    tokenizer.backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace() -> Tokenizer:
    characters = sorted({*"".join(TEXTS), "▁"} - {" "})
    backend = Backend(models.BPE(vocab={each: i for i, each in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, {})


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    own = token_bytes(tokenizer)
    return b"".join(own.at(token, first=number == 0) for number, token in enumerate(ids))


@pytest.mark.parametrize("make", [gemma, llama, metaspace], ids=["gemma", "llama", "metaspace"])
def test_joined_they_are_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for text in TEXTS:
        ids = tokenizer.encode_literal(text)
        assert joined(tokenizer, ids) == tokenizer.decode(ids).encode() == text.encode()


def test_byte_level(tokenizer: Tokenizer) -> None:
    own = token_bytes(tokenizer)
    for text in TEXTS:
        assert joined(tokenizer, tokenizer.encode_literal(text)) == text.encode()
    assert own[0] == b"<|endoftext|>" and own[10**6] == b""


def test_single_tokens() -> None:
    tokenizer = gemma()
    own = token_bytes(tokenizer)
    assert (
        own[0xF0] == b"\xf0"
        and own[256 + WORDS.index("▁the")] == b" the"
        and own[tokenizer.token_id("<end>") or 0] == b"<end>"
    )
    assert own[tokenizer.token_id("東京") or 0] == "東京".encode()
    assert own is token_bytes(tokenizer)


def test_a_decoder_that_joins_words_gives_the_bytes_of_its_text() -> None:
    """WordPiece puts spaces between tokens, which are of none of them alone."""
    backend = Backend(models.WordPiece(vocab={"[UNK]": 0, "un": 1, "##it": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend, {})
    assert token_bytes(tokenizer)[2] == tokenizer.text_of(2).encode()


def test_pieces_carry_them(shared_checkpoint: Path) -> None:
    checkpoint = slm.load(shared_checkpoint)
    fox = checkpoint.tokenizer.encode_literal("🦊")
    bias = {token: 1000.0 - 10 * number for number, token in enumerate(fox)}
    pieces = list(
        checkpoint.pieces(
            "One", temperature=0, max_new_tokens=len(fox), logit_bias=bias, frequency_penalty=500.0, logprobs=1
        )
    )
    assert b"".join(piece.raw for piece in pieces) == "🦊".encode()
    assert "".join(piece.text for piece in pieces) == "🦊"
