"""Rows for fine-tuning: kinds of rows that other tools write. A file may mix them."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from slm.core.chat import Message, instruction_request
from slm.core.errors import SlmError
from slm.core.text.documents import read_documents
from slm.core.text.files import TEXT as TEXT_FILE
from slm.core.text.files import find_files, kind
from slm.core.text.rows import read_rows as read_values
from slm.core.text.streams import DOCUMENT_BYTES, size
from slm.core.text.value import Value
from slm.core.tool_fields import declared
from slm.core.tools import Tool, arguments_text
from slm.finetune.conversations import checked, history, kind_of, text_of, turns, with_system
from slm.finetune.fields import (
    CHOICES,
    COLUMNS,
    COMPLETION,
    CONTEXT,
    CONVERSATIONS,
    HISTORY,
    INSTRUCTION,
    OUTPUT,
    PREFERENCE,
    PROMPT,
    SYSTEM,
    TEXT,
    TOOLS,
    absent,
    known_column,
    present,
    refuse_beside,
    refuse_columns,
    renaming,
)
from slm.finetune.requests import with_placeholder

EXPECTED = (
    'each row is {"messages": [{"role": "user", "content": ...}, ...]}, '
    '{"conversations": [{"from": "human", "value": ...}, ...]}, '
    '{"instruction": ..., "output": ...} with an optional "input", '
    '{"prompt": ..., "completion": ...}, {"prompt": ..., "chosen": ..., "rejected": ...} or {"text": ...}'
)

_UNANSWERED = "add the answer as completion or output; with slm finetune --teacher MODEL, that model writes it"

# Default memory limit. Rows are held in memory, and their tokens take about ten times the memory of the text.
DATA_BYTES = 512 << 20
# Memory of a row and of a message besides their text.
_OVERHEAD = 200
# Maximum number of bad rows that are skipped before the file is rejected, and of field names that are reported.
_MOST_BAD = 10_000
_MOST_LEFT_OUT = 50


@dataclass(frozen=True)
class Limits:
    """Limits of reading.

    Attributes:
        row: Maximum UTF-8 bytes of a row.
        data: Maximum bytes of memory of all rows.
    """

    row: int = DOCUMENT_BYTES
    data: int = DATA_BYTES

    @classmethod
    def checked(cls, row: int | None, data: int | None) -> "Limits":
        """Returns limits, with the default in place of None."""
        return cls(DOCUMENT_BYTES if row is None else row, DATA_BYTES if data is None else data)


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and a completion, of which the completion counts in the loss. No template is applied.

    Attributes:
        prompt: The prompt.
        completion: The completion.
        place: The place of the row, for messages.
        unended: Whether the completion was cut, so that its end does not count in the loss.
    """

    prompt: str
    completion: str
    place: str = field(default="", compare=False)
    unended: bool = False


@dataclass(frozen=True)
class TextRow:
    """A text that counts in the loss as a whole."""

    text: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class ChatRow:
    """A conversation, of which the assistant's messages count in the loss.

    Attributes:
        messages: The messages.
        place: The place of the row, for messages.
        only_read: Numbers, from 0, of the assistant's messages that do not count in the loss.
        tools: The tools that the conversation declares.
        unended: Whether the last answer was cut, so that its end does not count in the loss.
    """

    messages: tuple[Message, ...]
    place: str = field(default="", compare=False)
    only_read: frozenset[int] = frozenset()
    tools: tuple[Tool, ...] = ()
    unended: bool = False


@dataclass(frozen=True)
class PreferenceRow:
    """Two rows that differ in their last answer, of which the first is preferred."""

    chosen: ChatRow | CompletionRow
    rejected: ChatRow | CompletionRow

    @property
    def place(self) -> str:
        """The place of the row, for messages."""
        return self.chosen.place


Row = ChatRow | CompletionRow | TextRow | PreferenceRow

_Names = Callable[[str], None]


def instruction_row(instruction: str, context: str, output: str, place: str = "") -> ChatRow:
    """Returns an instruction, its input and its output as a conversation."""
    request = instruction_request(instruction, context)
    return ChatRow(({"role": "user", "content": request}, {"role": "assistant", "content": output}), place)


def read_rows(
    path: Path,
    bad: list[SlmError] | None = None,
    *,
    left_out: set[str] | None = None,
    limits: Limits | None = None,
    choices: list[Any] | None = None,
    unanswered: list[int] | None = None,
) -> list[Row]:
    """Reads the rows of a file, or of all files below a directory; see `slm.core.text` for the kinds of files.

    Args:
        path: The file or directory.
        bad: Receives the errors of bad rows, which are then skipped; None raises the first one.
        left_out: Receives the names of ignored fields.
        limits: Limits of reading; the defaults when None.
        choices: Receives the column `choices` of each row, unchecked; None for a row without it. Fine-tuning ignores it.
        unanswered: Receives the numbers, from 0, of rows that end with a request: their last answer is a placeholder, which
            the caller replaces. None rejects a prompt alone, and drops requests after the last answer of a conversation.

    Raises:
        SlmError: When a file cannot be read or has no row, or a row is of an unknown kind, too long, or not supported; the
            message names the line, or the number of the row in an array or a Parquet file.
    """
    rows: list[Row] = []
    limits = limits or Limits()
    taken = 0
    names: set[str] = set() if left_out is None else left_out

    def leave_out(name: str) -> None:
        if len(names) < _MOST_LEFT_OUT:
            names.add(name)

    for file in find_files(path.expanduser()):
        unread: set[str] = set()
        for value in _values(file, limits.row, unread):
            where = f"{file}, {value.place}"
            try:
                if isinstance(value.content, SlmError):
                    raise SlmError(f"{where}: {value.content.message}", value.content.hint or EXPECTED)
                content = value.content if unanswered is None else with_placeholder(value.content)
                row = _row(content, where, leave_out, unread)
            except SlmError as error:
                wrong = SlmError(error.message, error.hint or EXPECTED)
                if bad is None:
                    raise wrong from None
                bad.append(wrong)
                if len(bad) > _MOST_BAD:
                    raise SlmError(
                        f"more than {_MOST_BAD:,} rows are wrong; the first: {bad[0].message}", EXPECTED
                    ) from None
                continue
            options = value.content.get(CHOICES) if choices is not None else None
            taken += _bytes(row) + (_OVERHEAD + len(str(options)) if options else 0)
            if taken > limits.data:
                raise SlmError(
                    f"{where}: the rows take more than {size(limits.data)}, and all are held in memory",
                    "give fewer rows, or raise the limit of slm finetune with --max-data-bytes",
                )
            if unanswered is not None and content is not value.content:
                unanswered.append(len(rows))
            rows.append(row)
            if choices is not None:
                choices.append(options)
        for name in sorted(unread):
            leave_out(name)
    if not rows:
        raise SlmError(f"there is no {'good ' if bad else ''}row in {path}", EXPECTED)
    return rows


def _values(file: Path, limit: int, unread: set[str]) -> Iterator[Value]:
    if kind(file) != TEXT_FILE:
        yield from read_values(file, limit, columns=COLUMNS, unread=unread)
        return
    for number, document in enumerate(read_documents(file, limit=limit), 1):
        if number == 1 and _is_object(document.partition("\n")[0]):
            raise SlmError(f"{file}: a .txt file is read as text, and this one holds JSON", "name it .jsonl")
        yield Value(f"document {number}", {TEXT: document})


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _bytes(row: Row) -> int:
    match row:
        case ChatRow():
            return _OVERHEAD + sum(_OVERHEAD + _characters(message) for message in row.messages)
        case CompletionRow():
            return _OVERHEAD + len(row.prompt) + len(row.completion)
        case TextRow():
            return _OVERHEAD + len(row.text)
        case PreferenceRow():
            return _bytes(row.chosen) + _bytes(row.rejected)


def _characters(message: Message) -> int:
    return len(message["content"]) + sum(_OVERHEAD + len(arguments_text(call)) for call in message.get("calls", ()))


def _row(value: Any, where: str, left_out: _Names, unread: Collection[str]) -> Row:
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: {kind_of(value)} instead of an object")
    row = present(value)
    if any(not absent(row.get(name)) for name in PREFERENCE):
        return _preference(row, where, left_out, unread)
    with _placed(where):
        refuse_columns(row)
    fields = _fields(row, where, unread)
    with _placed(where):
        if fields[0] == PROMPT:
            refuse_beside(row, (INSTRUCTION, *CONTEXT), "prompt and completion")
        elif fields[0] in CONVERSATIONS:
            refuse_beside(row, ("context",), fields[0])
    for name in row:
        if name not in (*fields, *SYSTEM, HISTORY, *TOOLS) and not known_column(name) and not absent(row[name]):
            left_out(name)
    match fields:
        case ("prompt", _):
            return _prompt(row, where, left_out)
        case ("text",):
            _refuse_before(row, "text", where)
            return TextRow(text_of(row[TEXT], TEXT, where), where)
        case ("instruction", *_):
            return _chat(row, _instruction(row, where), where)
        case (name, *_):
            return _chat(row, turns(row[name], name, where, left_out, _tools(row, where)), where)
    raise AssertionError(fields)


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Prefixes the message of an error with the place."""
    try:
        yield
    except SlmError as error:
        raise SlmError(f"{where}: {error.message}", error.hint) from None


def _fields(row: Mapping[str, Any], where: str, unread: Collection[str]) -> tuple[str, ...]:
    """Returns the fields of a row's kind."""
    kinds = _kinds(row, where)
    # In a table every row has all columns; the columns of other kinds are empty.
    if len(kinds) > 1:
        kinds = [names for names in kinds if not all(absent(row[name]) for name in names)] or kinds[:1]
    if len(kinds) > 1:
        names = " and ".join(" + ".join(map(repr, each)) for each in kinds)
        raise SlmError(f"{where}: has {names}, which are {len(kinds)} kinds of row", "keep the fields of one kind")
    if not kinds:
        names = ", ".join([*row, *sorted(unread)][:20]) or "none"
        hint = renaming(row) or (_UNANSWERED if PROMPT in row or INSTRUCTION in row else None)
        raise SlmError(f"{where}: unknown kind of row (fields: {names})", hint)
    return kinds[0]


def _kinds(row: Mapping[str, Any], where: str) -> list[tuple[str, ...]]:
    """Returns the fields of every kind that a row may be."""
    kinds: list[tuple[str, ...]] = [(name,) for name in CONVERSATIONS if name in row]
    output = _one_of(row, OUTPUT, where)
    if INSTRUCTION in row and output in row:
        context = _one_of(row, CONTEXT, where)
        kinds.append((INSTRUCTION, output, *((context,) if context in row else ())))
    if PROMPT in row and COMPLETION in row:
        kinds.append((PROMPT, COMPLETION))
    # A text beside other fields repeats them, as in Alpaca.
    if TEXT in row and all(absent(row[name]) for names in kinds for name in names):
        kinds.append((TEXT,))
    return kinds


def _one_of(row: Mapping[str, Any], names: tuple[str, str], where: str) -> str:
    """Returns which of two synonymous names a row has."""
    first, second = names
    if INSTRUCTION in row and not absent(row.get(first)) and not absent(row.get(second)):
        raise SlmError(f"{where}: has {first!r} and {second!r}, which mean the same", "keep one of them")
    return second if second in row and (first not in row or absent(row[first])) else first


def _instruction(row: Mapping[str, Any], where: str) -> list[tuple[Message, bool]]:
    context, output = _one_of(row, CONTEXT, where), _one_of(row, OUTPUT, where)
    about = text_of(row[context], context, where, empty=True) if context in row else ""
    request, answer = text_of(row[INSTRUCTION], INSTRUCTION, where), text_of(row[output], output, where)
    asked, answered = instruction_row(request, about, answer).messages
    return [(asked, False), (answered, True)]


def _prompt(row: Mapping[str, Any], where: str, left_out: _Names) -> Row:
    prompt, completion = row[PROMPT], row[COMPLETION]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversations
        tools = _tools(row, where)
        read = turns(prompt, PROMPT, where, left_out, tools)
        conversation = [(message, False) for message, _ in read] + turns(completion, COMPLETION, where, left_out, tools)
        return _chat(row, conversation, where)
    _refuse_before(row, "prompt and completion", where)
    return CompletionRow(text_of(prompt, PROMPT, where, empty=True), text_of(completion, COMPLETION, where), where)


def _chat(row: Mapping[str, Any], conversation: list[tuple[Message, bool]], where: str) -> ChatRow:
    before = history(row.get(HISTORY), where)
    if before and conversation and conversation[0][0]["role"] == "system":
        conversation = [conversation[0], *before, *conversation[1:]]
    else:
        conversation = before + conversation
    for name in SYSTEM:
        if name in row:
            conversation = with_system(text_of(row[name], name, where, empty=True), conversation, where)
    messages, only_read = checked(conversation, where)
    return ChatRow(messages, where, only_read, _tools(row, where))


def _preference(row: Mapping[str, Any], where: str, left_out: _Names, unread: Collection[str]) -> PreferenceRow:
    """Returns a pair of answers: the row with the chosen and with the rejected one as its answer."""
    missing = [name for name in PREFERENCE if absent(row.get(name))]
    if missing:
        raise SlmError(f"{where}: a preference has chosen and rejected, and {missing[0]} is missing")
    others = {name: value for name, value in row.items() if name not in PREFERENCE and not absent(value)}
    pair = []
    for name in PREFERENCE:
        completed = _row(_completed(others, row[name], where), where, left_out, unread)
        if not isinstance(completed, ChatRow | CompletionRow):
            raise SlmError(f"{where}: a preference has a prompt")
        pair.append(completed)
    if pair[0] == pair[1]:
        raise SlmError(f"{where}: chosen and rejected are equal")
    return PreferenceRow(pair[0], pair[1])


def _completed(others: Mapping[str, Any], answer: Any, where: str) -> dict[str, Any]:
    """Returns the row with an answer: TRL's prompt or whole conversations, an instruction, or turns and one more message."""
    conversation = next((name for name in CONVERSATIONS if name in others), None)
    if conversation is not None and isinstance(others[conversation], list):
        return {**others, conversation: [*others[conversation], *(answer if isinstance(answer, list) else [answer])]}
    if PROMPT in others:
        return {**others, COMPLETION: answer}
    if INSTRUCTION in others:
        return {**others, OUTPUT[0]: answer}
    if isinstance(answer, list):
        return {**others, CONVERSATIONS[0]: answer}
    raise SlmError(f"{where}: chosen and rejected without a prompt", 'a preference is {"prompt", "chosen", "rejected"}')


def _tools(row: Mapping[str, Any], where: str) -> tuple[Tool, ...]:
    """Returns the declared tools of a row. Rows with the same declarations share them."""
    given = [name for name in TOOLS if not absent(row.get(name))]
    if len(given) > 1:
        raise SlmError(f"{where}: has {' and '.join(map(repr, given))}, which mean the same", "keep one of them")
    if not given:
        return ()
    value = row[given[0]]
    with _placed(where):
        try:
            return _declared(value if isinstance(value, str) else json.dumps(value))
        except (TypeError, RecursionError):
            raise SlmError("tools is not JSON, or nested too deep") from None


@lru_cache(256)
def _declared(text: str) -> tuple[Tool, ...]:
    return declared(text)


def _refuse_before(row: Mapping[str, Any], fields: str, where: str) -> None:
    """Rejects system texts, tools and history in rows without turns."""
    for name in (*SYSTEM, *TOOLS, HISTORY):
        if not absent(row.get(name)):
            raise SlmError(
                f"{where}: column {name!r} is not supported beside {fields}, which have no turns",
                "write it into the text, or use messages",
            )
