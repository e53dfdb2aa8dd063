"""Divides a reply into text and calls while it is generated."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from slm.core.tools import JSON_STYLE, Style, Tool, arguments_text, ordered, parsed_calls

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_GEMMA_HEADER = re.compile(r"\s*call:([^\s{}<>,:]+)(?=\{)")
_END = re.compile(r"\s*\}\s*")
# A call whose name does not follow within so many characters is text.
_MAX_HEADER = 1024


@dataclass(frozen=True)
class CallPart:
    """A part of a call.

    Attributes:
        index: The number of the call, from 0.
        name: The name of the tool, in the first part of a call; empty in the others.
        arguments: The next part of the JSON text of the arguments.
    """

    index: int
    name: str = ""
    arguments: str = ""


class CallStream:
    """Reads a reply piece by piece.

    The texts and calls are those of `parsed_calls`, except that a call counts as soon as its name is complete: a reply that
    ends within a call has an incomplete call. White space around calls is not text.

    Attributes:
        begun: The number of calls that have begun.
        complete: The number of calls that have ended.
    """

    def __init__(self, style: Style = JSON_STYLE, tools: Mapping[str, Tool] | None = None) -> None:
        """Starts a reply.

        Args:
            style: The format of calls.
            tools: The tools by name; arguments in Gemma's formats are reordered as they are declared.
        """
        self._style, self._tools = style, tools or {}
        self._buffer = ""
        self._space = ""  # white space that is text only if text follows
        self._said = self._after_call = False
        self._read = self._text  # the state: the method that reads the buffer
        self._name = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self.begun = self.complete = 0

    def push(self, text: str) -> list[str | CallPart]:
        """Takes the next piece of the reply. Returns the texts and parts of calls that are certain."""
        self._buffer += text
        found: list[str | CallPart] = []
        while self._read(found):
            pass
        return found

    def finish(self) -> list[str | CallPart]:
        """Returns the text that is still held back: the reply has ended."""
        found: list[str | CallPart] = []
        if self._read == self._header:  # the call has no name, so it is text
            self._buffer, self._read = self._style.opening + self._buffer, self._text
        if self._read == self._text:
            self._say(self._buffer, found)
            if self._space and not self._after_call:
                found.append(self._space)
        self._buffer = self._space = ""
        return found

    def _text(self, found: list[str | CallPart]) -> bool:
        start = self._buffer.find(self._style.opening)
        if start < 0:
            keep = _begun(self._buffer, self._style.opening)
            certain, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
            self._say(certain, found)
            return False
        self._say(self._buffer[:start], found)
        self._buffer = self._buffer[start + len(self._style.opening) :]
        self._read = self._header
        return True

    def _say(self, text: str, found: list[str | CallPart]) -> None:
        """Adds a text, without the white space at its end, which may come before a call."""
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            found.append(f"\n{said}" if self._after_call and self._said else said)
            self._said, self._after_call = True, False

    def _header(self, found: list[str | CallPart]) -> bool:
        header = (_HEADER if self._style.quote is None else _GEMMA_HEADER).match(self._buffer)
        name = None if header is None else _name(header[1])
        if header is None or not name:
            if len(self._buffer) <= _MAX_HEADER and self._style.closing not in self._buffer and header is None:
                return False
            # Not a call: the opening is text, and what follows may have a call.
            self._say(self._style.opening, found)
            self._read = self._text
            return True
        found.append(CallPart(self.begun, name))
        self._name, self.begun = name, self.begun + 1
        self._space, self._after_call = "", True
        self._buffer = self._buffer[header.end() :]
        self._read = self._arguments if self._style.quote is None else self._whole
        return True

    def _arguments(self, found: list[str | CallPart]) -> bool:
        end = self._end_of_object()
        part = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(part) :]
        if part:
            found.append(CallPart(self.begun - 1, arguments=part))
        if end is None:
            return False
        self._read = self._closing
        return True

    def _end_of_object(self) -> int | None:
        """Returns where the object of arguments ends in the buffer; None if it does not."""
        for place, character in enumerate(self._buffer):
            if self._in_string:
                ends = character == '"' and not self._escaped
                self._escaped = character == "\\" and not self._escaped
                self._in_string = not ends
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None

    def _closing(self, found: list[str | CallPart]) -> bool:
        end = _END.match(self._buffer)
        if end is None or not self._buffer.startswith(self._style.closing, end.end()):
            return False
        self._ended(end.end() + len(self._style.closing))
        return True

    def _whole(self, found: list[str | CallPart]) -> bool:
        """Reads the arguments of a call in Gemma's formats, which become JSON at its end."""
        head = f"{self._style.opening}call:{self._name}"
        end = -1
        while (end := self._buffer.find(self._style.closing, end + 1)) >= 0:
            length = end + len(self._style.closing)
            _, calls = parsed_calls(head + self._buffer[:length], self._style)
            if calls:  # a closing within a string does not end the call
                call = ordered(calls[0], self._tools.get(self._name))
                found.append(CallPart(self.begun - 1, arguments=arguments_text(call)))
                self._ended(length)
                return True
        return False

    def _ended(self, length: int) -> None:
        self._buffer = self._buffer[length:]
        self.complete += 1
        self._read = self._text


def _begun(text: str, opening: str) -> int:
    """Returns how many characters at the end of a text may begin an opening."""
    for length in range(min(len(text), len(opening) - 1), 0, -1):
        if opening.startswith(text[-length:]):
            return length
    return 0


def _name(spelled: str) -> str | None:
    """Returns the name of a tool, which JSON spells in quotes."""
    if not spelled.startswith('"'):
        return spelled
    try:
        name = json.loads(spelled)
    except ValueError:
        return None
    return name if isinstance(name, str) else None
