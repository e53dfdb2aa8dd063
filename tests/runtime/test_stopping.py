"""Stop texts: the text ends at the same place however it is cut, and no part of a stop text is shown."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

import slm
from slm.core.errors import SlmError
from slm.core.text_stream import TextStream
from slm.core.tokenizer import START_OF_TURN, Tokenizer
from slm.runtime.model import Model
from slm.runtime.stopping import StopTexts


def shown(stops: list[str], pieces: list[str]) -> list[str]:
    """Returns the text that passes for each piece, and at the end."""
    texts = StopTexts(stops)
    return [*(texts.push(piece) for piece in pieces), texts.finish()]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["a", "b"], ["a", "b", ""]),
        (["."], ["One. Two."], ["One", ""]),
        (["END"], ["the ", "E", "N", "D of"], ["the ", "", "", "", ""]),
        (["END"], ["the ", "E", "N", "T"], ["the ", "", "", "ENT", ""]),
        (["END"], ["the EN"], ["the ", "EN"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""]),
        (["\n\n"], ["x\n", "y\n\n", "z"], ["x", "\ny", "", ""]),
        (["cd", "abcde"], ["ab", "c", "d", "e"], ["", "", "ab", "", ""]),  # the first that is complete
        (["cd", "abcd"], ["xab", "cd"], ["x", "", ""]),  # of two that are complete at once, the longest
    ],
)
def test_what_is_let_through(stops: list[str], pieces: list[str], expected: list[str]) -> None:
    assert shown(stops, pieces) == expected


def test_an_empty_one_is_refused() -> None:
    with pytest.raises(SlmError, match="empty"):
        StopTexts(["x", ""])


def first_stop(text: str, stops: list[str]) -> str:
    """The definition: read character by character, the text ends before the stop text that is complete first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


FEW_LETTERS = st.text("ab\n", max_size=12)


@given(st.lists(FEW_LETTERS), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_any_cut_ends_where_the_definition_says(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    let_through = shown(stops, pieces)
    assert "".join(let_through) == first_stop(text, stops)
    # No more is held back than could become a stop text.
    if first_stop(text, stops) == text:
        assert len(let_through[-1]) < max(map(len, stops), default=1)
        assert let_through[-1] == "" or any(stop.startswith(let_through[-1]) for stop in stops)


def with_turns() -> Tokenizer:
    """Letters, and two special tokens."""
    backend = Backend(models.BPE(vocab={each: i for i, each in enumerate("abc<>\n_")}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<a_b>", special=True), AddedToken("<c>", special=True)])
    return Tokenizer(backend, {})


TURNS = with_turns()
AB, C = 7, 8


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "found"),
    [
        ("<a_b>", [0, AB, 1], "a", True),
        ("<a_b>", [0, C, 1], "ab", False),
        ("<a_b>\n", [0, AB, 5, 1], "a", True),  # a special token and text
        ("<a_b>\n", [0, AB, 1], "ab", False),  # held back, and let through without the token
        ("b<a_b><c>", [0, 1, AB, C, 1], "a", True),
        ("<a_b>", [0, 3, 0, 6, 1, 4, 1], "a", True),  # the same spelling in ordinary tokens
        (">", [0, AB, 1], "ab", False),  # a token's characters are no text
        ("_b>", [AB, 0], "a", False),
    ],
)
def test_special_tokens(stop: str, tokens: list[int], text: str, found: bool) -> None:
    stops, stream = StopTexts([stop], TURNS), TextStream(TURNS)
    shown = "".join([*(stops.push(stream.push(token), token) for token in tokens), stops.finish()])
    assert (shown, stops.found) == (text, found)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(SlmError, match="surrogate"):
        StopTexts(["\ud800"], TURNS)


def test_a_model_stops_at_a_special_token(shared_checkpoint: Path) -> None:
    """In Python; the token is forced."""
    checkpoint = slm.load(shared_checkpoint)
    end = START_OF_TURN
    token = checkpoint.tokenizer.token_id(end)
    assert token is not None and token not in Model(checkpoint.tokenizer, checkpoint.decoder, ()).stop_token_ids
    model = Model(checkpoint.tokenizer, checkpoint.decoder, ())
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 5, "logit_bias": {token: 1000.0}}
    stream = model.pieces("One", stop=[end], **options)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == [token] and pieces[0].text == ""
    assert stream.result.stopped == "stop"
    assert model.complete("One", stop=["x" + end], **options).stopped == "length"
