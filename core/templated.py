"""Token ids of conversations in a chat template that came with a model.

A template may do anything with what people wrote: trim it, lowercase it, cut it, join it with its own text. So that their text
never forms a control token, each conversation is rendered as it is and once more with every visible character of the messages
replaced by a stand-in from a private plane of Unicode. Stand-ins have no case, are no white space, and occur in no control
token, so that the control tokens of that second text are the template's own, and where they stand is known. The first text is
encoded as a whole, as transformers does, when it has the same control tokens in the same places; else the text between them is
encoded literally. A third rendering, in which only punctuation is replaced, serves templates that read the messages.
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
# Words of stand-ins, which need not be tokenized one by one to see what stands around them.
_RUN = re.compile(f"{_PLACEHOLDER}(?:(?:{_PLACEHOLDER}|\\s)*{_PLACEHOLDER})?")
_BETWEEN = re.compile(f"[^{_PLACEHOLDER[1:-1]}]+")
# A token of a model's vocabulary that looks like a marker and is no added token.
_MARKER = re.compile(r"[<\[{|].*\w.*[>\]}|]", flags=re.DOTALL)
_LONGEST_MARKER = 128
# Characters that are translated at a time: other threads of Python wait meanwhile.
_AT_ONCE = 1 << 16
_PROBE = "\U0010fffd\U0010fffc\U0010fffd"

Placed = tuple[int, int, int]  # a token id, and the characters for which it stands: from where to where


@dataclass(frozen=True)
class Rendered:
    """What a template makes of a conversation, or a part of it.

    Attributes:
        text: The text as transformers has it.
        hidden: The same with a stand-in for every visible character of the messages; None when the template refuses that.
        marked: The same with a stand-in for every punctuation mark; None also where `hidden` suffices.
        back: From stand-ins to characters, for `str.translate`.
        written: What people wrote.
    """

    text: str
    hidden: str | None
    marked: str | None
    back: Mapping[int, str]
    written: tuple[str, ...]

    def after(self, start: "Rendered | None") -> "Rendered | None":
        """Returns what follows a text with which this one begins; None where it does not begin so."""
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
    """Renders conversations in a model's own template.

    Args:
        tokenizer: The model's.
        template: The template.
        conversations: The messages of each, and whether the model's turn begins after them.

    Returns:
        Texts for each, or the reason why there are none.

    Raises:
        SlmError: When the template passes a limit of time or memory.
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
    # Where the template read what was hidden, it is shown letters and digits.
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
    """Returns the ids of a rendered conversation, in which what people wrote forms no control token.

    Args:
        tokenizer: The model's.
        conversation: What `rendered` returned.
        stops: The model's stop tokens, which are control tokens too.

    Returns:
        The ids, or an error where the template makes control tokens of what people wrote and no view shows which.
    """
    controls = _Controls(tokenizer, conversation, stops)
    text = conversation.text
    for view in (conversation.hidden, conversation.marked):
        if view is not None and _aligned(text, view):
            return controls.encode(text, controls.placed(view))
    # The template makes something else of other text.
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
        "the messages spell a control token, and the model's chat template alters them",
        "leave out text such as <end_of_turn>",
    )


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the special tokens by the names that templates use; null in `tokenizer_config.json` means that there is none."""
    named = ((name, value) for name, value in tokenizer.config.items() if name.endswith("_token"))
    spelled = ((name, value.get("content") if isinstance(value, dict) else value) for name, value in named)
    return {name: value for name, value in spelled if isinstance(value, str)}


class _Controls:
    """The control tokens of a conversation: the tokenizer's, the stop tokens, and markers that its template writes."""

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
        """Returns the tokens of a view, in which each run of stand-ins is tokenized as one."""
        if view in self._views:
            return self._views[view]
        short, at = [], 0
        places: list[int] = []  # of the characters of the shortened view, and where it ends
        for run in _RUN.finditer(view):
            short.append(view[at : run.start() + 1])
            places.extend(range(at, run.start() + 1))
            at = run.end()
        places.extend(range(at, len(view) + 1))
        short.append(view[at:])
        encoding = self._tokenizer.encode_with_places("".join(short))
        # A token ends where its last character does: the next one may come after the rest of a run.
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
        """Returns the control tokens that the template itself places."""
        found = self._among(view, self._around(view))
        return [placed for placed in found if not _PLACEHOLDER_CHARACTER.search(view[placed[1] : placed[2]])]

    def _among(self, text: str, tokens: Sequence[Placed]) -> list[Placed]:
        found = [placed for placed in tokens if placed[0] in self._ids]
        unknown = self._tokenizer.unknown_ids
        if unknown.isdisjoint(token for token, _, _ in found):
            return found
        # The unknown token stands for characters that are not in the vocabulary, unless it is spelled.
        spelled = {_plain(self._tokenizer.text_of(token)) for token in unknown}
        return [(t, start, end) for t, start, end in found if t not in unknown or _plain(text[start:end]) in spelled]

    def encode(self, text: str, placed: Sequence[Placed]) -> list[int]:
        """Returns the ids of a text whose control tokens are known."""
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
    """Returns a stand-in for each visible character of the texts: one for one, so that equal texts stay equal."""
    characters = {character for text in texts for character in set(text) if not character.isspace()}
    room = _LAST - _FIRST
    return {ord(character): chr(_FIRST + number % room) for number, character in enumerate(sorted(characters))}


def _replaced(messages: Sequence[Mapping[str, Any]], table: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{**message, "content": _translated(message["content"], table)} for message in messages]


def _translated(text: str, table: Mapping[int, str]) -> str:
    return "".join(text[at : at + _AT_ONCE].translate(table) for at in range(0, len(text), _AT_ONCE))


def _shaped(messages: Sequence[Mapping[str, Any]], in_parts: bool) -> list[dict[str, Any]]:
    """Returns messages with their contents as texts, or as lists of parts."""
    if not in_parts:
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache(32)
def _reads_parts(template: str, tokens: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether a template loses contents that are texts and writes those that are lists of parts."""
    from slm.core.template import render_all

    probe = [{"role": "user", "content": _PROBE}]
    asked = [(_shaped(probe, in_parts), True) for in_parts in (False, True)]
    plain, parts = (_text(each) or "" for each in render_all(template, asked, dict(tokens)))
    return _PROBE not in plain and _PROBE in parts


def _aligned(text: str, view: str | SlmError | None) -> bool:
    """Returns whether a view is the text but for stand-ins, so that their places are those of what people wrote."""
    if not isinstance(view, str) or len(view) != len(text):
        return False
    return all(text.startswith(each.group(), each.start()) for each in _BETWEEN.finditer(view))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _text(found: str | SlmError | None) -> str | None:
    return found if isinstance(found, str) else None
