"""Stop texts: the same end wherever the text is cut, and nothing shown that belongs to one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.core.errors import SlmError
from slm.runtime.stopping import StopTexts


def shown(stops: list[str], pieces: list[str]) -> list[str]:
    """What is let through for each piece, and at the end."""
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
