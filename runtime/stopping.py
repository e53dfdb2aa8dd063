"""Finds stop texts, independent of token boundaries."""

from collections.abc import Sequence
from copy import copy

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer

# Special tokens within a stop text are matched as one character each: surrogates, which no decoded text contains.
_FIRST_MARK = 0xD800
_MOST_MARKS = 0x800


class StopTexts:
    """Passes text through up to the first stop text, and holds back text that may be the beginning of one.

    The first stop text is the one that is complete first, reading character by character; of several that are complete at the
    same character, the longest. The result therefore does not depend on how the text is cut into pieces.

    A stop text that spells special tokens also matches the tokens themselves, which have no text.

    Attributes:
        found: Whether a stop text was found; nothing after it is passed through.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None = None) -> None:
        """Starts a text.

        Args:
            stops: The stop texts.
            tokenizer: Finds special tokens in them; None matches characters only.

        Raises:
            SlmError: If a stop text is empty, or not valid Unicode.
        """
        if "" in stops:
            raise SlmError("a stop text is empty", "leave it out, or pass the text that ends the completion")
        self.found = False
        self._marks: dict[int, str] = {}
        with_tokens = [] if tokenizer is None else [self._with_marks(stop, tokenizer) for stop in stops]
        self._stops = tuple(dict.fromkeys((*stops, *with_tokens)))
        self._hidden = dict.fromkeys(map(ord, self._marks.values()))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def fresh(self) -> "StopTexts":
        """Returns the same stop texts for another text."""
        other = copy(self)
        other.found, other._held = False, ""
        return other

    def push(self, text: str, token: int | None = None) -> str:
        """Takes the next piece of text. Returns the text that is certain not to belong to a stop text.

        Args:
            text: The text of the token.
            token: The token; special ones have no text.
        """
        if self.found:
            return ""
        text = self._held + text + ("" if token is None else self._marks.get(token, ""))
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return self._shown(text[: min(ends)[1]])
        keep = next(
            (i for i in range(max(0, len(text) - self._longest + 1), len(text)) if self._begins(text[i:])), None
        )
        certain, self._held = (text, "") if keep is None else (text[:keep], text[keep:])
        return self._shown(certain)

    def finish(self) -> str:
        """Returns the text that is still held back: the text has ended, and it is not part of a stop text."""
        rest, self._held = self._held, ""
        return self._shown(rest)

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _shown(self, text: str) -> str:
        return text.translate(self._hidden) if self._hidden else text

    def _with_marks(self, stop: str, tokenizer: Tokenizer) -> str:
        """Returns a stop text with a surrogate in place of each special token that it spells."""
        parts, end = [], 0
        for token, start, stop_at in tokenizer.special_tokens_in(stop):
            if token not in self._marks and len(self._marks) == _MOST_MARKS:
                break
            mark = self._marks.setdefault(token, chr(_FIRST_MARK + len(self._marks)))
            parts += [stop[end:start], mark]
            end = stop_at
        return "".join([*parts, stop[end:]])
