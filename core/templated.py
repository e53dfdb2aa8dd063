"""Token ids of conversations rendered by a chat template that came with a model.

A template may transform the messages: trim, lowercase, cut or join them. Text of messages must never form a control token.
Each conversation is therefore rendered twice: as it is, and with every visible character of the messages replaced by a
placeholder from a private-use plane of Unicode. Placeholders have no case, are not white space, and occur in no control
token, so the control tokens of the second text are the template's own, at known positions. If the first text has the same
control tokens at the same positions, it is encoded as a whole, as transformers does. Otherwise the text between them is
encoded literally. A third rendering, which replaces only punctuation, serves templates that depend on the messages' text.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer

# Planes 15 and 16 of Unicode, which are for private use.
_FIRST, _LAST = 0xF0000, 0x10FFFD
_PLACEHOLDER = f"[{chr(_FIRST)}-{chr(_LAST)}]"
_PLACEHOLDER_CHARACTER = re.compile(_PLACEHOLDER)
# Words of placeholders; each is tokenized as one character to find the tokens around it.
_RUN = re.compile(f"{_PLACEHOLDER}(?:(?:{_PLACEHOLDER}|\\s)*{_PLACEHOLDER})?")
_BETWEEN = re.compile(f"[^{_PLACEHOLDER[1:-1]}]+")
# A token of the vocabulary that looks like a marker but is not an added token.
_MARKER = re.compile(r"[<\[{|].*\w.*[>\]}|]", flags=re.DOTALL)
_LONGEST_MARKER = 128
# The number of characters to translate at a time: `str.translate` blocks other Python threads.
_AT_ONCE = 1 << 16
_PROBE = "\U0010fffd\U0010fffc\U0010fffd"

Placed = tuple[int, int, int]  # a token id, and the start and end of its characters


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered by a template, or a part of it.

    Attributes:
        text: The text as transformers renders it.
        hidden: The text with a placeholder for every visible character of the messages; None if the template rejects it.
        marked: The text with a placeholder for every punctuation mark; None also if `hidden` is sufficient.
        back: Characters by placeholder, for `str.translate`.
        written: The contents of the messages.
    """

    text: str
    hidden: str | None
    marked: str | None
    back: Mapping[int, str]
    written: tuple[str, ...]

    def after(self, start: "Rendered | None") -> "Rendered | None":
        """Returns the rest of this text after the text `start`; None if it does not begin with that text."""
        if start is None:
            return self
        views = []
        for whole, first in ((self.text, start.text), (self.hidden, start.hidden), (self.marked, start.marked)):
            if whole is not None and first is not None and not whole.startswith(first):
                return None
            views.append(None if whole is None or first is None else whole[len(first) :])
        text, hidden, marked = views
        assert text is not None
        return replace(self, text=text, hidden=hidden, marked=marked)


def rendered(
    tokenizer: Tokenizer, template: str, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], bool]]
) -> list[Rendered | SlmError]:
    """Renders conversations with a model's own template.

    Args:
        tokenizer: The model's tokenizer.
        template: The template.
        conversations: The messages of each, and whether to append the start of the model's turn.

    Returns:
        The texts of each conversation, or the template's error.

    Raises:
        SlmError: If the template exceeds a limit of time or memory.
    """
    from slm.core.template import render_all

    tokens = special_tokens(tokenizer)
    in_parts = _reads_parts(template, tuple(sorted(tokens.items())))
    table = _placeholders(message["content"] for messages, _ in conversations for message in messages)
    back = {ord(placeholder): chr(character) for character, placeholder in table.items()}
    hidden = [(_replaced(messages, table), begins) for messages, begins in conversations]
    asked = [(_shaped(messages, in_parts), begins) for messages, begins in (*conversations, *hidden)]
    texts = render_all(template, asked, tokens)
    pairs = list(zip(texts[: len(conversations)], texts[len(conversations) :], strict=True))
    # If the template depends on the replaced text, render again with letters and digits visible.
    marked: dict[int, str | SlmError] = {}
    unlike = [i for i, (text, other) in enumerate(pairs) if isinstance(text, str) and not _aligned(text, other)]
    if unlike:
        punctuation = {character: each for character, each in table.items() if not chr(character).isalnum()}
        some = [(_shaped(_replaced(conversations[i][0], punctuation), in_parts), conversations[i][1]) for i in unlike]
        marked = dict(zip(unlike, render_all(template, some, tokens), strict=True))
    found: list[Rendered | SlmError] = []
    for i, (text, other) in enumerate(pairs):
        if isinstance(text, SlmError):
            found.append(text)
            continue
        written = tuple(message["content"] for message in conversations[i][0])
        found.append(Rendered(text, _text(other), _text(marked.get(i)), back, written))
    return found


def encoded(tokenizer: Tokenizer, conversation: Rendered, stops: Collection[int] = ()) -> list[int] | SlmError:
    """Returns the ids of a rendered conversation; the contents of messages never form a control token.

    Args:
        tokenizer: The model's tokenizer.
        conversation: A result of `rendered`.
        stops: The model's stop tokens, which count as control tokens.

    Returns:
        The ids, or an error if messages may form control tokens and no rendering shows which.
    """
    controls = _Controls(tokenizer, conversation, stops)
    text = conversation.text
    for view in (conversation.hidden, conversation.marked):
        if view is not None and _aligned(text, view):
            return controls.encode(text, controls.placed(view))
    # The template transforms the messages, so that the renderings differ.
    views = [view for view in (conversation.hidden, conversation.marked) if view is not None]
    orders = [[token for token, _, _ in controls.placed(view)] for view in views]
    ids, found = controls.read(text)
    harmless = not any(controls.read(each)[1] for each in conversation.written)
    if harmless and [token for token, _, _ in found] in orders:
        return ids
    if conversation.marked is not None and orders[0] == orders[-1]:
        return controls.encode(
            _translated(conversation.marked, conversation.back), controls.placed(conversation.marked)
        )
    return SlmError(
        "the messages contain the text of a control token, and the model's chat template transforms them",
        "remove text such as <end_of_turn> from the messages",
    )


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the special tokens by the names that templates use, without those that `tokenizer_config.json` sets to null."""
    named = ((name, value) for name, value in tokenizer.config.items() if name.endswith("_token"))
    spelled = ((name, value.get("content") if isinstance(value, dict) else value) for name, value in named)
    return {name: value for name, value in spelled if isinstance(value, str)}


class _Controls:
    """The control tokens of a conversation: the tokenizer's, the stop tokens, and the template's own markers."""

    def __init__(self, tokenizer: Tokenizer, conversation: Rendered, stops: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._views: dict[str, list[Placed]] = {}
        ids = tokenizer.control_ids | tokenizer.lengthy(set(stops) - tokenizer.control_ids)
        view = conversation.hidden or conversation.marked or ""
        for token, start, end in self._around(view):
            spelled = view[start:end].strip()
            if token in ids or not 1 < len(spelled) <= _LONGEST_MARKER or _PLACEHOLDER_CHARACTER.search(spelled):
                continue
            if token in tokenizer.added_ids or _MARKER.fullmatch(spelled):
                ids |= {token}
        self._ids = ids

    def _around(self, view: str) -> list[Placed]:
        """Returns the tokens of a rendering, in which each run of placeholders is tokenized as one character."""
        if view in self._views:
            return self._views[view]
        short, at = [], 0
        places: list[int] = []  # positions of the shortened text's characters in the rendering, and of its end
        for run in _RUN.finditer(view):
            short.append(view[at : run.start() + 1])
            places.extend(range(at, run.start() + 1))
            at = run.end()
        places.extend(range(at, len(view) + 1))
        short.append(view[at:])
        encoding = self._tokenizer.encode_with_places("".join(short))
        # A token ends after its last character: the next token may start after the rest of a run.
        found = [
            (token, places[start], places[end - 1] + 1 if end > start else places[end])
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        self._views[view] = found
        return found

    def read(self, text: str) -> tuple[list[int], list[Placed]]:
        """Returns the ids of a text and the control tokens among them."""
        encoding = self._tokenizer.encode_with_places(text)
        ids: list[int] = encoding.ids
        if self._ids.isdisjoint(ids):
            return ids, []
        places = [place for place, token in enumerate(ids) if token in self._ids]
        found = [(ids[place], *(encoding.token_to_chars(place) or (0, 0))) for place in places]
        return ids, self._among(text, found)

    def placed(self, view: str) -> list[Placed]:
        """Returns the control tokens that the template itself writes."""
        found = self._among(view, self._around(view))
        return [placed for placed in found if not _PLACEHOLDER_CHARACTER.search(view[placed[1] : placed[2]])]

    def _among(self, text: str, tokens: Sequence[Placed]) -> list[Placed]:
        found = [placed for placed in tokens if placed[0] in self._ids]
        unknown = self._tokenizer.unknown_ids
        if unknown.isdisjoint(token for token, _, _ in found):
            return found
        # The unknown token also represents characters outside the vocabulary; it counts only where its text is spelled.
        spelled = {_plain(self._tokenizer.text_of(token)) for token in unknown}
        return [(t, start, end) for t, start, end in found if t not in unknown or _plain(text[start:end]) in spelled]

    def encode(self, text: str, placed: Sequence[Placed]) -> list[int]:
        """Returns the ids of a text with known control tokens."""
        whole, found = self.read(text)
        if found == placed:
            return whole
        besides = self._ids - self._tokenizer.control_ids
        ids: list[int] = []
        at = 0
        for token, start, end in placed:
            ids += [*self._tokenizer.encode_literal(text[at:start], besides), token]
            at = end
        return ids + self._tokenizer.encode_literal(text[at:], besides)


def _placeholders(texts: Iterable[str]) -> dict[int, str]:
    """Returns a placeholder for each visible character of the texts; the mapping is one-to-one, so equal texts stay equal."""
    characters = {character for text in texts for character in set(text) if not character.isspace()}
    room = _LAST - _FIRST
    return {ord(character): chr(_FIRST + number % room) for number, character in enumerate(sorted(characters))}


def _replaced(messages: Sequence[Mapping[str, Any]], table: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{**message, "content": _translated(message["content"], table)} for message in messages]


def _translated(text: str, table: Mapping[int, str]) -> str:
    return "".join(text[at : at + _AT_ONCE].translate(table) for at in range(0, len(text), _AT_ONCE))


def _shaped(messages: Sequence[Mapping[str, Any]], in_parts: bool) -> list[dict[str, Any]]:
    """Returns copies of messages with their contents as strings, or as lists of parts."""
    if not in_parts:
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache(32)
def _reads_parts(template: str, tokens: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether a template drops contents that are strings but renders contents that are lists of parts."""
    from slm.core.template import render_all

    probe = [{"role": "user", "content": _PROBE}]
    asked = [(_shaped(probe, in_parts), True) for in_parts in (False, True)]
    plain, parts = (_text(each) or "" for each in render_all(template, asked, dict(tokens)))
    return _PROBE not in plain and _PROBE in parts


def _aligned(text: str, view: str | SlmError | None) -> bool:
    """Returns whether a rendering equals the text except for placeholders, so that their positions are the messages'."""
    if not isinstance(view, str) or len(view) != len(text):
        return False
    return all(text.startswith(each.group(), each.start()) for each in _BETWEEN.finditer(view))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _text(found: str | SlmError | None) -> str | None:
    return found if isinstance(found, str) else None
