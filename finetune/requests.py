"""Rows that end with a request, whose answer a teacher writes."""

from collections.abc import Mapping
from typing import Any

from slm.core.errors import SlmError
from slm.core.text.json_rows import parse
from slm.core.text.streams import DOCUMENT_BYTES
from slm.finetune.fields import (
    COMPLETION,
    CONVERSATIONS,
    INSTRUCTION,
    OUTPUT,
    PREFERENCE,
    PROMPT,
    ROLES,
    TEXT,
    absent,
    present,
)

# The answer of a row that has none. It is not learned: the caller replaces it.
PLACEHOLDER = "-"
_ASKING = ("user", "tool")


def with_placeholder(row: Any) -> Any:
    """Returns a row with a placeholder as its answer if it ends with a request; else the row itself, unchanged.

    A row ends with a request if it has a prompt without a completion, an instruction without an output, or turns that end with
    one of the user or with a result of a tool. A row that is not understood is returned as it is.
    """
    if not isinstance(row, Mapping):
        return row
    given = {name for name, value in present(row).items() if not absent(value)}
    if given & {*PREFERENCE, TEXT}:
        return row
    if PROMPT in given:
        if given & {COMPLETION, *CONVERSATIONS, INSTRUCTION}:
            return row
        return {**row, COMPLETION: [_message()] if isinstance(row[PROMPT], list) else PLACEHOLDER}
    if INSTRUCTION in given:
        return row if given & {*OUTPUT, *CONVERSATIONS} else {**row, OUTPUT[0]: PLACEHOLDER}
    for name in CONVERSATIONS:
        turns = _parsed(row[name]) if name in given else None
        if isinstance(turns, list) and turns and _asks(turns[-1]):
            return {**row, name: [*turns, _message()]}
    return row


def _message() -> dict[str, str]:
    return {"role": "assistant", "content": PLACEHOLDER}


def _asks(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    role = message.get("role") if not absent(message.get("role")) else message.get("from")
    return isinstance(role, str) and ROLES.get(role) in _ASKING


def _parsed(value: Any) -> Any:
    """Returns the list that a cell of a table spells as JSON; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = parse(value, DOCUMENT_BYTES)
    except SlmError:
        return value
    return found if isinstance(found, list) else value
