"""The text of a stream of tokens, in whole characters."""

from collections.abc import Collection

from slm.core.tokenizer import Tokenizer

# The replacement for bytes that are not a character.
_REPLACEMENT = "\ufffd"


class TextStream:
    """Converts a stream of tokens to text, in whole characters.

    The pieces together equal `Tokenizer.decode` of all tokens. Bytes that do not form a character become U+FFFD, as soon as
    that is certain or the text ends. (The library's own DecodeStream fails for byte-fallback vocabularies: one such byte makes
    its decoder treat the characters before it as invalid too.)
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()) -> None:
        """Starts a text.

        Args:
            tokenizer: The tokenizer.
            shown: Special tokens whose spelling is part of the text, such as the marks of calls.
        """
        self.tokenizer = tokenizer
        self._shown = shown
        self._before: list[int] = []  # the tokens of the last piece: decoders join and strip at the start of a text
        self._held: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether a token of the text has arrived."""
        return bool(self._before or self._held)

    def push(self, token: int) -> str:
        """Takes a token and returns the characters that it completes, often none."""
        if token in self.tokenizer.special_ids:
            return self.finish() + self.tokenizer.text_of(token) if token in self._shown else ""
        self._held.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT):  # perhaps the start of a character
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Returns the rest of a text that ended within a character."""
        text, self._held = self._text(), []
        return text

    def _text(self) -> str:
        before, text = (self.tokenizer.decode(ids) for ids in (self._before, self._before + self._held))
        return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(self._held)
