"""Conversations in rows: roles, which messages count in the loss, and what is rejected."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from slm.core.chat import Message, Role
from slm.core.errors import SlmError
from slm.core.text.json_rows import parse
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.tool_fields import called, matched
from slm.core.tools import Call, Tool
from slm.finetune.fields import (
    CALL_ROLES,
    CALLS,
    ROLES,
    absent,
    is_learned,
    known_in_message,
    present,
    refuse_in_message,
)

_FORM = 'a conversation is [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
_PAIR_FORM = 'history is [["a question", "its answer"], ...]'

# A message, and whether it counts in the loss.
Turn = tuple[Message, bool]


def kind_of(value: Any) -> str:
    """Returns the JSON name of a value's type."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def text_of(value: Any, name: str, where: str, *, empty: bool = False) -> str:
    """Returns a field of text.

    Raises:
        SlmError: When the field is not text, is empty but must not be, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise SlmError(f"{where}: {name!r} is {kind_of(value)} instead of text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SlmError(f"{where}: {name!r} holds half of a surrogate pair", "write the character itself") from None
    if not empty and not value.strip():
        raise SlmError(f"{where}: {name!r} is empty", "remove the row or fill the field")
    return value


def _parsed(value: Any, where: str) -> Any:
    """Returns the list that a text spells as JSON; returns any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = parse(value, DOCUMENT_BYTES)
    except SlmError as error:
        raise SlmError(f"{where}: {error.message}", error.hint) from None
    return value if isinstance(found, SlmError) else found


def turns(value: Any, name: str, where: str, left_out: Callable[[str], None], tools: Sequence[Tool] = ()) -> list[Turn]:
    """Returns the messages of a field, each with whether it counts in the loss; drops empty system messages.

    Args:
        value: The field: an array, or text that spells one as JSON.
        name: Name of the field.
        where: Place of the row, for messages.
        left_out: Receives the names of ignored fields.
        tools: The declared tools of the row.

    Raises:
        SlmError: When the field is not a conversation, or holds something that is not supported.
    """
    value = _parsed(value, where)
    if not isinstance(value, list):
        raise SlmError(f"{where}: {name!r} is {kind_of(value)} instead of an array of messages", _FORM)
    found: list[Turn] = []
    for number, each in enumerate(value, 1):
        turn = _turn(each, f"{where}, message {number}", left_out, tools)
        if turn is not None:
            found.append(turn)
    return found


def history(value: Any, where: str) -> list[Turn]:
    """Returns the earlier turns that LLaMA-Factory keeps beside an instruction. Their answers count in the loss.

    Raises:
        SlmError: When the field is not a list of pairs of texts.
    """
    value = _parsed(value, where)
    if absent(value):
        return []
    if not isinstance(value, list):
        raise SlmError(f"{where}: 'history' is {kind_of(value)} instead of an array of pairs", _PAIR_FORM)
    found: list[Turn] = []
    for number, pair in enumerate(value, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise SlmError(f"{where}: pair {number} of 'history' is not a question and an answer", _PAIR_FORM)
        place = f"{where}, history {number}"
        found.append(({"role": "user", "content": text_of(pair[0], "question", place)}, False))
        found.append(({"role": "assistant", "content": text_of(pair[1], "answer", place)}, True))
    return found


def with_system(system: str, conversation: list[Turn], where: str) -> list[Turn]:
    """Returns a conversation with a system text at its beginning.

    Raises:
        SlmError: When it begins with another system text.
    """
    if not system.strip():
        return conversation
    if conversation and conversation[0][0]["role"] == "system":
        if conversation[0][0]["content"].strip() == system.strip():
            return conversation
        raise SlmError(
            f"{where}: the column 'system' and the first message are different system texts", "keep one of them"
        )
    return [({"role": "system", "content": system}, False), *conversation]


def checked(conversation: Sequence[Turn], where: str) -> tuple[tuple[Message, ...], frozenset[int]]:
    """Returns the messages up to the last answer that counts in the loss, and the numbers of answers that do not.

    Raises:
        SlmError: When roles do not alternate, or no answer counts in the loss.
    """
    roles = [message["role"] for message, _ in conversation]
    if "assistant" not in roles:
        raise SlmError(f"{where}: no message of the assistant's, so there is nothing to learn", _FORM)
    if "system" in roles[1:]:
        raise SlmError(f"{where}: a system message comes after the first message", "move it to the beginning")
    for number, (before, following) in enumerate(pairwise(roles), 2):
        if before == following != "tool":
            raise SlmError(
                f"{where}, message {number}: two {before} messages in a row", "join them: user and assistant take turns"
            )
    learned = [number for number, (_, learn) in enumerate(conversation) if learn]
    if not learned:
        raise SlmError(f"{where}: nothing to learn: every answer has weight 0", "remove the row")
    kept = conversation[: learned[-1] + 1]
    try:
        messages = tuple(matched([message for message, _ in kept]))
    except SlmError as error:
        raise SlmError(f"{where}, {error.message}", error.hint) from None
    return messages, frozenset(
        number for number, (message, learn) in enumerate(kept) if message["role"] == "assistant" and not learn
    )


def _turn(value: Any, where: str, left_out: Callable[[str], None], tools: Sequence[Tool]) -> Turn | None:
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: {kind_of(value)} instead of an object", _FORM)
    message = present(value)
    role_name, content_name = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    try:
        refuse_in_message(message)
        calls = _calls(message, role_name, content_name, tools)
    except SlmError as error:
        raise SlmError(f"{where}: {error.message}", error.hint) from None
    if calls:
        message.setdefault(content_name, "")
    other_role, other_content = ("role", "content") if role_name == "from" else ("from", "value")
    for name, other in ((role_name, other_role), (content_name, other_content)):
        if (
            not absent(message.get(name))
            and not absent(message.get(other))
            and not _agree(message[name], message[other])
        ):
            raise SlmError(f"{where}: {name!r} and {other!r} contradict each other", "keep one of them")
    if role_name not in message or content_name not in message:
        names = ", ".join(map(repr, list(message)[:8])) or "no field"
        raise SlmError(f"{where}: has {names} instead of 'role' and 'content' (or 'from' and 'value')", _FORM)
    said_by = text_of(message[role_name], role_name, where)
    if said_by not in ROLES:
        raise SlmError(f"{where}: unknown role {said_by!r:.60}", f"{role_name!r} is one of {', '.join(ROLES)}")
    role = ROLES[said_by]
    said = "" if said_by in CALL_ROLES else _content(message[content_name], where, result=role == "tool")
    content = text_of(said, content_name, where, empty=role in ("system", "tool") or bool(calls))
    try:
        learned = is_learned(message, role)
    except SlmError as error:
        raise SlmError(f"{where}: {error.message}", error.hint) from None
    for name in message:
        if not known_in_message(name) and not (name == "name" and role == "tool"):
            left_out(f"{name} of messages")
    if role == "system" and not content.strip():
        return None
    return _said(role, content, calls, message), learned


def _calls(message: Mapping[str, Any], role_name: str, content_name: str, tools: Sequence[Tool]) -> tuple[Call, ...]:
    """Returns the calls of a message: OpenAI's and TRL's fields, or ShareGPT's text of a message of its own.

    Raises:
        SlmError: When they are not calls of declared tools, or a message that is not the assistant's has some; the message
            names no place.
    """
    role = message.get(role_name)
    fields = [name for name in CALLS if not absent(message.get(name))]
    if isinstance(role, str) and role in CALL_ROLES:
        value = _parsed_calls(message.get(content_name))
    elif len(fields) > 1:
        raise SlmError(f"has {' and '.join(map(repr, fields))}, which mean the same", "keep one of them")
    elif fields:
        value = message[fields[0]]
    else:
        return ()
    if isinstance(role, str) and ROLES.get(role) != "assistant":
        raise SlmError(f"{fields[0]!r} in a message of the role {role!r:.40}", "only the assistant makes calls")
    return called([value] if isinstance(value, Mapping) else value, tools)


def _parsed_calls(value: Any) -> Any:
    """Returns the call, or the list of calls, that a text spells as JSON."""
    found = parse(value, DOCUMENT_BYTES) if isinstance(value, str) else value
    if isinstance(found, SlmError):
        raise found
    return found


def _agree(first: Any, second: Any) -> bool:
    return first == second or (
        isinstance(first, str) and isinstance(second, str) and ROLES.get(first, first) == ROLES.get(second, second)
    )


def _said(role: Role, content: str, calls: Sequence[Call], fields: Mapping[str, Any]) -> Message:
    said: Message = {"role": role, "content": content}
    if calls:
        said["calls"] = calls
    if role == "tool":
        if isinstance(fields.get("tool_call_id"), str):
            said["tool_call_id"] = fields["tool_call_id"]
        if isinstance(fields.get("name"), str):
            said["name"] = fields["name"]
    return said


def _content(value: Any, where: str, *, result: bool) -> Any:
    """Returns the text of content that is a list of parts, as in OpenAI's format; returns any other content unchanged.

    A result that is another JSON value becomes its JSON text.
    """
    parts = isinstance(value, list) and value and all(isinstance(each, Mapping) and "type" in each for each in value)
    if result and not isinstance(value, str) and not parts:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise SlmError(f"{where}: the result is not valid JSON") from None
    if not isinstance(value, list) or not value:
        return value
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise SlmError(f"{where}: a part of the content is {what!r:.40}, and slm reads text only", "remove the row")
    return "".join(part["text"] for part in value)
