"""Streaming: whole characters for any vocabulary, and the same text however it is cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from slm.core.text_stream import TextStream
from slm.core.tokenizer import Tokenizer
from slm.runtime.generation import Generation, Piece, Request
from slm.runtime.sampling import GREEDY
from slm.runtime.stopping import StopTexts
from slm.runtime.streaming import Stream, run

# Fixtures here are read and never changed.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

PIECES = ["▁", "▁the", "the", "a", "b", "é", "🦊", "▁🦊", "▁▁", "東", "<unk>"]
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def byte_fallback(decoder: Any) -> Tokenizer:
    """A SentencePiece-like vocabulary: ids 0 to 255 are bytes, then some pieces, then a special token."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {piece: 256 + i for i, piece in enumerate(PIECES)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, {})


VOCABULARIES = {"gemma": byte_fallback(GEMMA), "llama": byte_fallback(LLAMA)}
SPECIAL = 256 + len(PIECES)


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text of the tokens, as it becomes certain."""
    stream = TextStream(tokenizer)
    return [piece for piece in (*(stream.push(i) for i in ids), stream.finish()) if piece]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Returns a text and tokens that spell it: at each place a piece that fits, or a character's bytes."""
    text = draw(st.text("thea bé🦊東ß", max_size=12))
    marked, ids = "▁" + text.replace(" ", "▁"), []
    while marked:
        fitting = [piece for piece in PIECES if marked.startswith(piece)]
        piece = draw(st.sampled_from([None, *fitting]))
        ids += list(marked[0].replace("▁", " ").encode()) if piece is None else [256 + PIECES.index(piece)]
        marked = marked[len(piece or "?") :]
        if draw(st.booleans()):
            ids.append(SPECIAL)
    return text, ids


@given(cut=cuts(), name=st.sampled_from(sorted(VOCABULARIES)))
def test_any_cut_with_byte_fallback_gives_the_text(cut: tuple[str, list[int]], name: str) -> None:
    text, ids = cut
    pieces = streamed(VOCABULARIES[name], ids)
    assert "".join(pieces) == (text if name == "llama" else f" {text}") == VOCABULARIES[name].decode(ids)
    assert not any("�" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, SPECIAL) | st.sampled_from([0xC3, 0xA9, 0xF0, 0x9F, 0xA6, 0x8A])))
@pytest.mark.parametrize("name", VOCABULARIES)
def test_bytes_that_are_no_text_take_no_character_along(ids: list[int], name: str) -> None:
    """The decoder turns whole runs of bytes into U+FFFD, and the library's own stream fails then."""
    shown = iter("".join(streamed(VOCABULARIES[name], ids)))
    assert all(character in shown for character in VOCABULARIES[name].decode(ids).replace("�", ""))


def test_a_character_that_was_shown_stays() -> None:
    assert streamed(VOCABULARIES["gemma"], [0xC3, 0xA9, 0xFF, 259]) == ["é", "�a"]


@SHARED
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_any_bytes_give_what_decoding_at_once_does(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@SHARED
@given(text=st.text(max_size=20))
def test_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = [i for character in text for i in tokenizer.encode_literal(character)]  # most of them bytes
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


def test_a_text_that_ends_within_a_character_says_so(tokenizer: Tokenizer) -> None:
    for stream, ids in (
        (TextStream(tokenizer), tokenizer.encode_literal("a🦊")[:-1]),
        (TextStream(VOCABULARIES["gemma"]), [259, 0xF0, 0x9F]),
    ):
        assert [stream.push(i) for i in ids] == ["a", *[""] * (len(ids) - 1)]
        assert set(stream.finish()) == {"�"} and stream.finish() == ""


def test_the_text_of_one_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.text_of(i) for i in tokenizer.encode_literal(" é")] == [" ", "�", "�"]
    assert tokenizer.text_of(0) == "<|endoftext|>"
    for vocabulary in VOCABULARIES.values():
        assert [vocabulary.text_of(256 + i) for i in range(4)] == [" ", " the", "the", "a"]


class Scripted:
    """A reader whose logits name the next of some tokens."""

    def __init__(self, ids: Sequence[int], fail_after: int | None = None) -> None:
        self.ids, self.fail_after = ids, fail_after

    def reset(self) -> None:
        self.number = 0

    def read(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        if self.number == self.fail_after:
            raise KeyboardInterrupt
        self.number += 1
        return np.arange(320) == self.ids[self.number - 1]


def start(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], **options: Any) -> Stream[Piece]:
    request = Request([1], GREEDY, len(ids), stop=stops)
    return run(Scripted(ids, **options), Generation(request, 4096, 320, tokenizer))


@given(cut=cuts(), stops=st.lists(st.text("thea bé🦊", min_size=1, max_size=3), max_size=2))
def test_any_cut_ends_at_the_same_stop_text(cut: tuple[str, list[int]], stops: list[str]) -> None:
    text, ids = cut
    pieces = start(VOCABULARIES["llama"], ids, stops)
    made = list(pieces)
    result = pieces.result
    assert "".join(piece.text for piece in made) == result.text == StopTexts(stops).push(text) + _held(text, stops)
    assert result.stopped == ("stop" if any(stop in text for stop in stops) else "length")
    tokens = [piece.token for piece in made if piece.token is not None]
    assert tokens == result.tokens == ids[: len(tokens)]
    if result.stopped == "stop":  # the model is not called after the stop text
        complete = VOCABULARIES["llama"].decode(tokens)
        assert any(stop in complete for stop in stops)
        assert not any(stop in VOCABULARIES["llama"].decode(tokens[:-1]) for stop in stops)


def _held(text: str, stops: list[str]) -> str:
    texts = StopTexts(stops)
    texts.push(text)
    return texts.finish()


def test_a_piece_for_every_token_and_one_for_what_was_held_back() -> None:
    pieces = start(VOCABULARIES["llama"], [257, 0xC3, 0xA9, 259, 0xC3], ["éab"])
    shown = [(piece.text, piece.token) for piece in pieces]
    assert shown == [("the", 257), ("", 0xC3), ("", 0xA9), ("", 259), ("", 0xC3), ("éa�", None)]


def test_ctrl_c_shows_what_was_held_back_and_goes_on_its_way() -> None:
    pieces = start(VOCABULARIES["llama"], [257, 259, 260, 259], ["ab!"], fail_after=3)
    shown = []
    with pytest.raises(KeyboardInterrupt):
        for piece in pieces:
            shown.append(piece.text)
    assert shown == ["the", "", "", "ab"]
    assert pieces.result.stopped == "interrupted" and pieces.result.tokens == [257, 259, 260]
