"""Rows to fine-tune on: five kinds of object, which a file may mix."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from slm.core.chat import Message, Role, instruction_request
from slm.core.errors import SlmError
from slm.finetune.tables import read_values

EXPECTED = (
    'each row is {"messages": [{"role": "user", "content": ...}, ...]}, '
    '{"conversations": [{"from": "human", "value": ...}, ...]}, '
    '{"instruction": ..., "output": ...} with an optional "input", '
    '{"prompt": ..., "completion": ...} or {"text": ...}'
)


@dataclass(frozen=True)
class CompletionRow:
    """A beginning, and the continuation to learn; neither is wrapped in anything."""

    prompt: str
    completion: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class TextRow:
    """A text to learn from its first word."""

    text: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class ChatRow:
    """A conversation, of which the assistant's turns are learned: every one of them."""

    messages: tuple[Message, ...]
    place: str = field(default="", compare=False)


Row = ChatRow | CompletionRow | TextRow

# Required fields of each kind.
_KINDS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("text",),
)
# What other people call those who speak.
_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}


def instruction_row(instruction: str, context: str, output: str, place: str = "") -> ChatRow:
    """Returns a request, what it is about, and the answer, as the conversation in which they will be met."""
    request = instruction_request(instruction, context)
    return ChatRow(({"role": "user", "content": request}, {"role": "assistant", "content": output}), place)


def read_rows(path: Path, bad: list[SlmError] | None = None) -> list[Row]:
    """Reads the rows of a file: JSON lines or one JSON array, CSV or TSV with a line of names, or Parquet.

    Args:
        path: The file.
        bad: Takes what is wrong with rows, which are then left out; None makes the first of them an error.

    Raises:
        SlmError: When the file cannot be read, holds no row, or a row is not what is expected; it names the line, or
            the number of the row in an array or a Parquet file.
    """
    rows: list[Row] = []
    for value in read_values(path, EXPECTED):
        where = f"{path}, {value.place}"
        try:
            if isinstance(value.content, SlmError):
                raise SlmError(f"{where}{value.content.message}", value.content.hint)
            rows.append(_row(value.content, where))
        except SlmError as error:
            if bad is None:
                raise
            bad.append(error)
    if not rows:
        raise SlmError(f"there is no row in {path}" if not bad else f"there is no good row in {path}", EXPECTED)
    return rows


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: {_kind(value)} instead of an object", EXPECTED)
    fitting = [required for required in _KINDS if all(name in value for name in required)]
    if not fitting:
        names = ", ".join(map(repr, value)) or "no field"
        raise SlmError(f"{where}: has {names}, which is no kind of row", EXPECTED)
    if len(fitting) > 1:
        names = " and ".join(" + ".join(map(repr, required)) for required in fitting)
        raise SlmError(f"{where}: has {names}, which are {len(fitting)} kinds of row", "keep the fields of one kind")

    def text(name: str, *, empty: bool = False) -> str:
        return _text(value[name], name, where, empty=empty)

    match fitting[0]:
        case ("instruction", _):
            # An optional field may be null, as tables exported to JSON have it.
            context = text("input", empty=True) if value.get("input") is not None else ""
            return instruction_row(text("instruction"), context, text("output"), where)
        case ("prompt", _):
            return CompletionRow(text("prompt", empty=True), text("completion"), where)
        case ("text",):
            return TextRow(text("text"), where)
        case (name,):
            return ChatRow(tuple(_messages(value[name], name, where)), where)
    raise AssertionError(fitting)


def _messages(value: Any, name: str, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise SlmError(f"{where}: {name!r} is {_kind(value)} instead of an array of messages", EXPECTED)
    messages = [_message(each, f"{where}, message {number}") for number, each in enumerate(value, 1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise SlmError(f"{where}: nobody answers in {name!r}, so there is nothing to learn", EXPECTED)
    if "system" in roles[1:]:
        raise SlmError(f"{where}: a message of the system's comes after the first", "a conversation begins with it")
    for number, (before, after) in enumerate(pairwise(roles), 2):
        if before == after:
            raise SlmError(f"{where}, message {number}: {after} again", "user and assistant take turns")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: {_kind(value)} instead of an object", EXPECTED)
    keys = next(((who, said) for who, said in (("role", "content"), ("from", "value")) if who in value), None)
    if keys is None or keys[1] not in value:
        names = ", ".join(map(repr, value)) or "no field"
        raise SlmError(f"{where}: has {names} instead of 'role' and 'content' (or 'from' and 'value')", EXPECTED)
    who = _text(value[keys[0]], keys[0], where)
    if who not in _ROLES:
        raise SlmError(f"{where}: nobody is called {who!r}", f"{keys[0]!r} is one of {', '.join(_ROLES)}")
    return {"role": _ROLES[who], "content": _text(value[keys[1]], keys[1], where)}


def _text(value: Any, name: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise SlmError(f"{where}: {name!r} is {_kind(value)} instead of text", EXPECTED)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SlmError(f"{where}: {name!r} holds half of a surrogate pair", "write the character itself") from None
    if not empty and not value.strip():
        raise SlmError(f"{where}: {name!r} is empty", "remove the row or fill the field")
    return value


def _kind(value: Any) -> str:
    """Returns what JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
