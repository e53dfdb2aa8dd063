"""Formats results as OpenAI's JSON.

Log-probabilities are formatted token by token as they arrive: those of a long completion are megabytes, and formatting them
at once would block the event loop.
"""

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from slm.core.call_stream import CallPart, CallStream
from slm.runtime.generation import Piece, Result, StopReason
from slm.runtime.token_bytes import TokenBytes
from slm.serve.service import Service
from slm.serve.tools import ToolUse, written_call

# OpenAI's finish reasons.
FINISH: Mapping[StopReason, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "deadline": "length",
}
# OpenAI's figure for a token with probability 0: JSON has no infinity.
_NEVER = -9999.0
# Tokens whose JSON is cached.
_KEPT = 1 << 15


class Scores(Protocol):
    """Formats the log-probabilities of one text."""

    def add(self, piece: Piece) -> None:
        """Adds a piece."""

    def taken(self) -> str:
        """Returns the JSON of the pieces since the last call."""


class Reader(Protocol):
    """Turns the pieces of one reply into contents of a stream's events."""

    def read(self, text: str) -> list[dict[str, Any]]:
        """Returns the contents for the next piece of the reply."""

    def finish(self) -> list[dict[str, Any]]:
        """Returns the contents for what was held back: the reply has ended."""


class _Plain:
    """Reads a reply that is text."""

    def __init__(self, shape: "ChatShape | CompletionShape") -> None:
        self._shape = shape

    def read(self, text: str) -> list[dict[str, Any]]:
        """Returns the content of an event, if there is text."""
        return [self._shape.part(text)] if text else []

    def finish(self) -> list[dict[str, Any]]:
        """Returns nothing: no text is held back."""
        return []


class ChatScores:
    """Log-probabilities in the format of chats: an object per token."""

    def __init__(self, own: TokenBytes) -> None:
        self._own = own
        self._content: list[str] = []
        self._first = True

    def add(self, piece: Piece) -> None:
        """Adds a piece."""
        if piece.token is None:
            return
        likeliest = ", ".join(f"{{{self._entry(*likely)}}}" for likely in piece.top)
        self._content.append(f'{{{self._entry(piece.token, piece.logprob)}, "top_logprobs": [{likeliest}]}}')
        self._first = self._first and self._own.is_special(piece.token)

    def taken(self) -> str:
        """Returns the JSON of the pieces since the last call."""
        content, self._content = ", ".join(self._content), []
        return f'{{"content": [{content}], "refusal": null}}'

    def _entry(self, token: int, logprob: float | None) -> str:
        return f'{_identity(self._own, token, self._first)}, "logprob": {_number(logprob)}'


class CompletionScores:
    """Log-probabilities in the format of completions: a list per field."""

    def __init__(self, own: TokenBytes) -> None:
        self._own = own
        self._columns: tuple[list[str], ...] = ([], [], [], [])
        # Counts the characters of the text; a token may be part of a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._first = True

    def add(self, piece: Piece) -> None:
        """Adds a piece."""
        if piece.token is None:
            return
        likeliest: dict[str, str] = {}
        for token, logprob in piece.top:
            spelling = self._own.at(token, self._first)
            name = _spelt(spelling)
            if name in likeliest:  # several tokens may have the same spelling
                name = _escaped(spelling)
            likeliest.setdefault(name, _number(logprob))
        top = ", ".join(f"{json.dumps(name)}: {logprob}" for name, logprob in likeliest.items())
        values = (
            json.dumps(_spelt(piece.raw)),
            _number(piece.logprob),
            f"{{{top}}}" if likeliest else "null",
            str(self._length),
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if not self._own.is_special(piece.token):
            self._first = False
            self._length += len(self._decoder.decode(piece.raw))

    def taken(self) -> str:
        """Returns the JSON of the pieces since the last call."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        told = ", ".join(f'"{name}": [{", ".join(each)}]' for name, each in zip(names, self._columns, strict=True))
        for column in self._columns:
            column.clear()
        return f"{{{told}}}"


def _spelt(own: bytes) -> str:
    """Returns a token's text; for a part of a character, OpenAI's spelling of its bytes."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return _escaped(own)


def _escaped(own: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


@lru_cache(_KEPT)
def _identity(own: TokenBytes, token: int, first: bool) -> str:
    """Returns the members that identify a token in a chat; its text escapes bytes that are part of a character."""
    spelling = own.at(token, first)
    return f'"token": {json.dumps(spelling.decode(errors="backslashreplace"))}, "bytes": {list(spelling)}'


def _number(logprob: float | None) -> str:
    if logprob is None:
        return "null"
    return repr(logprob) if math.isfinite(logprob) else repr(_NEVER)


def finish_of(result: Result, content: Mapping[str, Any], called: bool = False) -> str:
    """Returns OpenAI's finish reason of a text: tool_calls if it ended after a call.

    Args:
        result: The result of the text.
        content: The content of its choice.
        called: Whether earlier events had a call.
    """
    reason = FINISH[result.stopped]
    called = called or "tool_calls" in content.get("message", {})
    return "tool_calls" if called and reason == "stop" else reason


def choice(index: int, content: Mapping[str, Any], reason: str | None = None, scores: str | None = None) -> str:
    """Returns the JSON of a choice.

    Args:
        index: The index of the text.
        content: The content, from a shape.
        reason: The finish reason, if the text has ended.
        scores: The JSON of its log-probabilities.
    """
    fields = json.dumps({"index": index, **content, "finish_reason": reason})
    return f'{fields[:-1]}, "logprobs": {scores or "null"}}}'


def answer_of(head: Mapping[str, Any], choices: Sequence[str], **more: Any) -> str:
    """Returns the JSON of a response or event, from its common fields and the JSON of its choices."""
    last = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in more.items())
    return f'{json.dumps(head)[:-1]}, "choices": [{", ".join(choices)}]{last}}}'


class ChatShape:
    """The JSON format of chats."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Returns the content of a whole choice."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def reader(self) -> Reader:
        """Returns the reader of one reply."""
        return _Plain(self)

    def opening(self) -> dict[str, Any] | None:
        """Returns the first content of a stream's choice, if there is one."""
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str | None) -> dict[str, Any]:
        """Returns the content of a stream's piece; None stands for the end."""
        return {"delta": {} if text is None else {"content": text}}

    def scores(self, own: TokenBytes) -> Scores:
        """Returns the formatter of one text's log-probabilities."""
        return ChatScores(own)


class CompletionShape:
    """The JSON format of completions."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Returns the content of a whole choice."""
        return {"text": text}

    def reader(self) -> Reader:
        """Returns the reader of one completion."""
        return _Plain(self)

    def opening(self) -> dict[str, Any] | None:
        """Returns the first content of a stream's choice, if there is one."""
        return None

    def part(self, text: str | None) -> dict[str, Any]:
        """Returns the content of a stream's piece; None stands for the end."""
        return {"text": text or ""}

    def scores(self, own: TokenBytes) -> Scores:
        """Returns the formatter of one text's log-probabilities."""
        return CompletionScores(own)


class ToolShape(ChatShape):
    """The JSON format of chats in which the reply may call tools."""

    def __init__(self, tools: ToolUse) -> None:
        self._tools = tools

    def reader(self) -> Reader:
        """Returns the reader of one reply."""
        return _Calls(self._tools.stream())

    def whole(self, text: str) -> dict[str, Any]:
        """Returns the content of a whole choice."""
        stream = self._tools.stream()
        calls: list[dict[str, Any]] = []
        said = ""
        for part in (*stream.push(text), *stream.finish()):
            if isinstance(part, str):
                said += part
            elif part.name:
                calls.append(written_call(part, streamed=False))
            else:
                calls[part.index]["function"]["arguments"] += part.arguments
        message = {"role": "assistant", "content": said if said or not calls else None, "refusal": None}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    def opening(self) -> dict[str, Any]:
        """Returns the first content of a stream's choice."""
        return {"delta": {"role": "assistant", "content": None}}


class _Calls:
    """Reads a reply that may call tools."""

    def __init__(self, stream: CallStream) -> None:
        self._stream = stream

    def read(self, text: str) -> list[dict[str, Any]]:
        """Returns the contents of a stream's events for the next piece of the reply."""
        return [self._content(part) for part in self._stream.push(text)]

    def finish(self) -> list[dict[str, Any]]:
        """Returns the contents for what was held back."""
        return [self._content(part) for part in self._stream.finish()]

    def _content(self, part: str | CallPart) -> dict[str, Any]:
        if isinstance(part, str):
            return {"delta": {"content": part}}
        return {"delta": {"tool_calls": [written_call(part, streamed=True)]}}


Shape = ChatShape | CompletionShape


def card(service: Service, name: str) -> dict[str, Any]:
    """Returns the entry of a model or adapter in `/v1/models`."""
    card = {"id": name, "object": "model", "created": service.started, "owned_by": "slm"}
    return card if name == service.name else card | {"parent": service.name}


def usage_of(prompts: Sequence[Sequence[int]], results: Sequence[Result]) -> dict[str, Any]:
    """Returns the token usage."""
    read, written = sum(map(len, prompts)), sum(len(each.tokens) for each in results)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in results)},
    }
