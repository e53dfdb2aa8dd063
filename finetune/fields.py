"""Fields of rows from other tools: those that are supported, and those that are rejected by name.

Any other field is harmless: it is ignored, and reported once.
"""

import re
from collections.abc import Mapping
from typing import Any

from slm.core.chat import Role
from slm.core.errors import SlmError

# Names of conversations in OpenAI, TRL, LLaMA-Factory, ShareGPT and Axolotl.
CONVERSATIONS = ("messages", "conversations", "conversation")
# Alpaca's names, and Dolly's names for the same fields.
INSTRUCTION, CONTEXT, OUTPUT = "instruction", ("input", "context"), ("output", "response")
PROMPT, COMPLETION, TEXT = "prompt", "completion", "text"
# The answers of a preference.
PREFERENCE = ("chosen", "rejected")
# The possible replies of a row, which `slm eval --task --metric choice` compares.
CHOICES = "choices"
# Fields that precede a conversation.
SYSTEM, HISTORY = ("system", "system_prompt"), "history"

# Other tools' names of roles.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response", "tool_result"), "tool"),
}
# Roles of messages whose text is the JSON of calls, in ShareGPT's form.
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
# Columns that declare tools, and the fields of a message that hold its calls.
TOOLS, CALLS = ("tools", "functions"), ("tool_calls", "function_call")

_TEXT_ONLY = "slm reads text only"
_PAIRS = "preference pairs are not supported"
_KEEP_CHOSEN = "keep the preferred answer as an assistant's message or as completion, and remove the other"
_REMOVE = "remove the field, or the rows that need it"
_RENAME_SYSTEM = "rename the column to system"
_ANSWERS_ONLY = "learn only a part of the answers with the field weight of messages, 0 or 1"

# Columns that would change training and are not supported, with the reason and a hint. Empty ones count as absent.
_REFUSED_COLUMNS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), (_TEXT_ONLY, _REMOVE)),
    "documents": ("the chat template has no documents", "write them into a message, or remove the column"),
    **dict.fromkeys(
        ("system_message", "system_instruction", "systemInstruction", "sys_prompt", "System", "SYSTEM"),
        ("slm reads the system text from the column system", _RENAME_SYSTEM),
    ),
    **dict.fromkeys(
        ("mask", "mask_history", "loss_mask", "labels_mask", "train_on_input", "train_on_inputs", "train_on_prompt"),
        ("every answer is learned, and nothing else", _ANSWERS_ONLY),
    ),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), ("the model's own chat template is used", _REMOVE)),
}
_NO_REASONING = "reasoning in a separate field is not supported"
_REFUSED_IN_MESSAGES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(TOOLS, ("tools are declared for the whole row", "move it to the column tools of the row")),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), (_TEXT_ONLY, _REMOVE)),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        (_NO_REASONING, "write it into the content, or remove the field"),
    ),
    "refusal": ("a refusal in a separate field is not supported", "write it into the content, or remove the row"),
    "train_detail": ("an answer is learned whole or not at all", "remove the field, or split the answer"),
    "prefix": ("an answer is learned from its beginning", "remove the field"),
}
# Fields that state whether an answer counts in the loss: OpenAI's weight, Axolotl's train and training, ms-swift's loss.
_LEARNED = ("weight", "train", "training", "train_on_turn", "loss")
_ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight", "example_weight")
# Other tools' names for the same, and for the reasoning before an answer. The meaning of their values is not known here.
_LEARNING_NAME = re.compile(r".*(weight|mask|loss|train|learn).*", re.IGNORECASE)
_REASONING_NAME = re.compile(r".*(reasoning|thinking|thought).*", re.IGNORECASE)
# Fields that state whether an answer is desirable: LLaMA-Factory's kto_tag, TRL's label. A label of a text may be a class.
_WANTED = ("kto_tag", "label")

# Columns that may mean prompt and completion, but also something else.
_RENAMED = (
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("question", "response"), ("prompt", "response"),
    ("prompt", "output"), ("prompt", "answer"), ("input", "output"), ("inputs", "targets"), ("user", "assistant"),
    ("human", "assistant"), ("source", "target"), ("problem", "solution"), ("instruction", "completion"),
    ("instruction", "answer"),
)  # fmt: skip

# All columns that are read; other columns of a Parquet file are not decoded.
COLUMNS = frozenset(
    (*CONVERSATIONS, INSTRUCTION, *CONTEXT, *OUTPUT, PROMPT, COMPLETION, TEXT, CHOICES, *SYSTEM, HISTORY, *TOOLS, *PREFERENCE,
     *_REFUSED_COLUMNS, *_ROW_WEIGHTS, *_WANTED, *(name for names in _RENAMED for name in names))
)  # fmt: skip


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are present: null means absent, and so does NaN, which pandas writes for null."""
    return {name: value for name, value in fields.items() if value is not None and value == value}


def absent(value: Any) -> bool:
    """Returns whether a field is null, empty, or text that spells an empty list or object."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False or (isinstance(value, (list, dict)) and not value)


def _refuse_listed(fields: Mapping[str, Any], refused: Mapping[str, tuple[str, str]], what: str = "") -> None:
    """Rejects fields by a table of reasons and hints."""
    for name, (reason, hint) in refused.items():
        if name in fields and not absent(fields[name]):
            raise SlmError(f"{what}{name!r} is not supported: {reason}", hint)


def refuse_columns(row: Mapping[str, Any]) -> None:
    """Rejects columns that would change training and are not supported.

    Raises:
        SlmError: When the row has one; the message names the column and the reason, but no place.
    """
    _refuse_listed(row, _REFUSED_COLUMNS, "column ")
    for name in _ROW_WEIGHTS:
        weight = _number(row.get(name))
        if weight is not None and weight != 1:
            raise SlmError(
                f"column {name!r} is {weight:g}: rows cannot be weighted", "remove the column, or rows of weight 0"
            )
    for name in _WANTED:
        if name in row and _unwanted(name, row):
            raise SlmError(
                f"column {name!r} is false, which marks an answer not to learn",
                "remove the row, or the column if it means something else",
            )


def refuse_beside(row: Mapping[str, Any], names: tuple[str, ...], fields: str) -> None:
    """Rejects text that belongs to another kind of row and would be lost.

    Args:
        row: The row.
        names: The columns that must be empty.
        fields: The fields as which the row is read, for the message.

    Raises:
        SlmError: When one of the columns is not empty; the message names the column, but no place.
    """
    for name in names:
        if not absent(row.get(name)):
            raise SlmError(
                f"column {name!r} is not supported beside {fields}", "write it into the text, or remove the column"
            )


def refuse_in_message(message: Mapping[str, Any]) -> None:
    """Rejects fields of a message that would change training and are not supported.

    Raises:
        SlmError: When the message has one; the error names the field and the reason, but no place.
    """
    _refuse_listed(message, _REFUSED_IN_MESSAGES)
    for name, value in message.items():
        if known_in_message(name):
            continue
        if _LEARNING_NAME.fullmatch(name) and value not in ([], {}, ""):
            raise SlmError(
                f"{name!r} is not supported: it may mean that the message is learned, or that it is not",
                "write 'weight': 1 or 0 instead, or remove the field",
            )
        if _REASONING_NAME.fullmatch(name) and not absent(value):
            raise SlmError(f"{name!r} is not supported: {_NO_REASONING}", "write it into the content, or remove it")


def is_learned(message: Mapping[str, Any], role: Role) -> bool:
    """Returns whether a message counts in the loss: an answer does, unless its weight is 0.

    Raises:
        SlmError: When the weight is neither 0 nor 1, or a message that is not an answer has a weight of 1.
    """
    given = {name: message[name] for name in _LEARNED if name in message}
    for name, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise SlmError(f"{name!r} is {value!r:.40}: only 0 and 1 are supported", "write 0, 1, false or true")
    if role != "assistant":
        for name, value in given.items():
            if value:
                raise SlmError(f"{name!r} is {value} in a {role} message: only answers are learned", f"remove {name!r}")
        return False
    if len(set(map(bool, given.values()))) > 1:
        raise SlmError(f"{' and '.join(map(repr, given))} contradict each other", "keep one of them")
    return all(given.values())


def known_in_message(name: str) -> bool:
    """Returns whether a field of a message is read."""
    return name in ("role", "content", "from", "value", *CALLS, "tool_call_id", *_LEARNED, *_REFUSED_IN_MESSAGES)


def known_column(name: str) -> bool:
    """Returns whether a column is a weight, has no effect on training, or is rejected unless empty."""
    return name in _REFUSED_COLUMNS or name in _ROW_WEIGHTS or name in ("kto_tag", "parallel_tool_calls")


def renaming(row: Mapping[str, Any]) -> str | None:
    """Returns a hint for renaming the columns of an unknown kind of row; None if that is not clear."""
    for question, answer in _RENAMED:
        if question in row and answer in row:
            return f"rename {question} and {answer} to instruction and output (a chat) or to prompt and completion (plain text)"
    return None


def _unwanted(name: str, row: Mapping[str, Any]) -> bool:
    if name == "label" and not row.keys() & {*CONVERSATIONS, COMPLETION, INSTRUCTION}:
        return False
    value = row[name]
    numbers = name == "kto_tag" or COMPLETION in row
    return value is False or str(value).lower() == "false" or (numbers and str(value) in ("0", "0.0"))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
