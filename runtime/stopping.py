"""Texts that end a text, wherever tokens cut them."""

from collections.abc import Sequence

from slm.core.errors import SlmError


class StopTexts:
    """Lets text through up to the first stop text, and holds back what may be the beginning of one.

    The first is the one that is complete first when the text is read character by character; of several that are complete
    at the same character, the longest. So it does not matter how the text is cut into pieces.

    Attributes:
        found: Whether one has come; nothing after it is let through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Begins a text.

        Raises:
            SlmError: When one is empty.
        """
        if "" in stops:
            raise SlmError("a stop text is empty", "leave it out, or say which text ends the answer")
        self.found = False
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece of text and returns what is certain not to belong to a stop text."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = next(
            (i for i in range(max(0, len(text) - self._longest + 1), len(text)) if self._begins(text[i:])), None
        )
        certain, self._held = (text, "") if keep is None else (text[:keep], text[keep:])
        return certain

    def finish(self) -> str:
        """Returns what is held back still: the text is over, and no stop text came of it."""
        rest, self._held = self._held, ""
        return rest

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
