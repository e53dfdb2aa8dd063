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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from slm.core.template import Conversation

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
# Words of calls and JSON schemas that templates look up or compare; they contain no control token.
_KEYWORDS = frozenset(
    {
        *("id", "type", "function", "name", "arguments", "response", "value", "description", "parameters"),
        *("properties", "required", "items", "additionalProperties", "$ref", "$defs", "title", "format", "nullable"),
        *("enum", "const", "anyOf", "oneOf", "allOf", "default", "minimum", "maximum"),
        *("string", "number", "integer", "boolean", "object", "array", "null"),
    }
)
# JSON escapes these, so that a placeholder for them would shift the text after it; they begin and end no control token.
_ESCAPED = {ord('"'): '"', ord("\\"): "\\"}
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
        written: The texts of the messages and tools.
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


def rendered(tokenizer: Tokenizer, template: str, conversations: "Sequence[Conversation]") -> list[Rendered | SlmError]:
    """Renders conversations with a model's own template.

    Args:
        tokenizer: The model's tokenizer.
        template: The template.
        conversations: The messages of each, whether to append the start of the model's turn, and the declared tools.

    Returns:
        The texts of each conversation, or the template's error.

    Raises:
        SlmError: If the template exceeds a limit of time or memory.
    """
    from slm.core.template import render_all

    tokens = special_tokens(tokenizer)
    in_parts = reads_parts(tokenizer, template)
    written = [tuple(dict.fromkeys(_texts(each))) for each in conversations]
    table = _placeholders(text for texts in written for text in texts)
    back = {ord(placeholder): chr(character) for character, placeholder in table.items()}
    hidden = [_replaced(each, table) for each in conversations]
    texts = render_all(template, [_shaped(each, in_parts) for each in (*conversations, *hidden)], tokens)
    pairs = list(zip(texts[: len(conversations)], texts[len(conversations) :], strict=True))
    # If the template depends on the replaced text, render again with letters and digits visible.
    marked: dict[int, str | SlmError] = {}
    unlike = [i for i, (text, other) in enumerate(pairs) if isinstance(text, str) and not _aligned(text, other)]
    if unlike:
        punctuation = {character: each for character, each in table.items() if not chr(character).isalnum()}
        some = [_shaped(_replaced(conversations[i], punctuation), in_parts) for i in unlike]
        marked = dict(zip(unlike, render_all(template, some, tokens), strict=True))
    found: list[Rendered | SlmError] = []
    for i, (text, other) in enumerate(pairs):
        if isinstance(text, SlmError):
            found.append(text)
            continue
        found.append(Rendered(text, _text(other), _text(marked.get(i)), back, written[i]))
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


def reads_parts(tokenizer: Tokenizer, template: str) -> bool:
    """Returns whether a template drops contents that are strings but renders contents that are lists of parts.

    Raises:
        SlmError: If the template exceeds a limit of time or memory.
    """
    return _reads_parts(template, tuple(sorted(special_tokens(tokenizer).items())))


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


def _texts(conversation: "Conversation") -> Iterator[str]:
    """Yields the texts that the template did not write: contents of messages, and the strings of calls and declarations."""
    messages, _, tools = conversation
    for message in messages:
        for name, value in message.items():
            if name == "content" and isinstance(value, str):
                yield value
            elif name != "role":
                yield from _strings(value)
    yield from _strings(tools)


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings of a JSON value and the names of its fields, except the keywords of calls and declarations."""
    if isinstance(value, str):
        if value not in _KEYWORDS:
            yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _strings(name)
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _replaced(conversation: "Conversation", table: Mapping[int, str]) -> "Conversation":
    """Returns a conversation with placeholders in the texts that `_texts` yields."""
    messages, begins, tools = conversation
    within = {**table, **_ESCAPED}

    def replaced(name: str, value: Any) -> Any:
        if name == "content" and isinstance(value, str):
            return _translated(value, table)
        return value if name == "role" else _replaced_strings(value, within)

    hidden = [{name: replaced(name, value) for name, value in message.items()} for message in messages]
    return hidden, begins, _replaced_strings(tools, within)


def _replaced_strings(value: Any, table: Mapping[int, str]) -> Any:
    if isinstance(value, str):
        return value if value in _KEYWORDS else _translated(value, table)
    if isinstance(value, Mapping):
        return {_replaced_strings(name, table): _replaced_strings(each, table) for name, each in value.items()}
    return [_replaced_strings(each, table) for each in value] if isinstance(value, list | tuple) else value


def _translated(text: str, table: Mapping[int, str]) -> str:
    return "".join(text[at : at + _AT_ONCE].translate(table) for at in range(0, len(text), _AT_ONCE))


def _shaped(conversation: "Conversation", in_parts: bool) -> "Conversation":
    """Returns a conversation whose contents are strings, or lists of parts."""
    messages, begins, tools = conversation
    if not in_parts:
        return conversation
    return (
        [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages],
        begins,
        tools,
    )


@lru_cache(32)
def _reads_parts(template: str, tokens: tuple[tuple[str, str], ...]) -> bool:
    """Returns whether a template drops contents that are strings but renders contents that are lists of parts."""
    from slm.core.template import render_all

    probe = [{"role": "user", "content": _PROBE}]
    asked = [_shaped((probe, True, None), in_parts) for in_parts in (False, True)]
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
