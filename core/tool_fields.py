"""Reads tools and calls as other programs write them: in OpenAI's format, in TRL's, and as bare functions.

Declarations are `{"type": "function", "function": {"name", "description", "parameters"}}`, with a JSON schema as parameters;
calls are `{"function": {"name", "arguments"}}`, with an object or its JSON text as arguments.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm.core.errors import SlmError
from slm.core.tools import DECODER, MAX_DEPTH, Call, Tool, arguments_text, check_json, depth, ordered, referred

if TYPE_CHECKING:
    from slm.core.chat import Message

# OpenAI's limits.
MAX_TOOLS = 128
MAX_NAME = 64
# The limit of the parameters of one tool, in characters of JSON.
MAX_PARAMETERS = 1 << 16

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FORM = 'a tool is {"type": "function", "function": {"name": ..., "description": ..., "parameters": {a JSON schema}}}'
_RESULT_FORM = 'a result is {"role": "tool", "tool_call_id": the id of its call, "content": ...}'
_CALL_FORM = 'a call is {"type": "function", "function": {"name": ..., "arguments": {...}}}'


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_fields(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, Mapping | bool) for each in value.values())


# The keywords of JSON schemas that slm reads: the form of their values in words, and its check.
_KEYWORDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "properties": ("an object of schemas", _is_fields),
    "required": ("a list of names", _is_names),
    "type": ("the name of a type, or a list of them", lambda value: _is_text(value) or _is_names(value)),
    "enum": ("a list of values", _is_list),
    "anyOf": ("a list of schemas", _is_list),
    "oneOf": ("a list of schemas", _is_list),
    "$ref": ("text", _is_text),
    "description": ("text", _is_text),
}


def declared(value: Any) -> tuple[Tool, ...]:
    """Returns the tools of a list of declarations; JSON text of such a list is accepted too.

    A function without the surrounding `{"type": "function"}` is accepted, because several data sets have it.

    Raises:
        SlmError: If the value is not a list of declarations, has too many of them, or a declaration is too large.
    """
    if isinstance(value, str):
        value = _parsed(value, "tools")
    if not isinstance(value, list | tuple):
        raise SlmError("tools is not a list of declarations", _FORM)
    if len(value) > MAX_TOOLS:
        raise SlmError(f"{len(value):,} tools are declared; the limit is {MAX_TOOLS}")
    tools = tuple(_tool(each, f"tool {number}") for number, each in enumerate(value, 1))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SlmError(f"two tools have the name {twice!r}", "give each tool a name of its own")
    return tools


def called(value: Any, tools: Sequence[Tool] = ()) -> tuple[Call, ...]:
    """Returns the calls of a message's `tool_calls`.

    The arguments are ordered as the tool declares them, so that the same call has the same text in training and in serving.

    Args:
        value: The list; JSON text of such a list is accepted too.
        tools: The declared tools; if there are any, a call must name one of them.

    Raises:
        SlmError: If the value is not a list of calls, or a call names no declared tool.
    """
    if isinstance(value, str):
        value = _parsed(value, "tool_calls")
    if not isinstance(value, list | tuple):
        raise SlmError("tool_calls is not a list of calls", _CALL_FORM)
    known = {tool.name: tool for tool in tools}
    calls = []
    for number, each in enumerate(value, 1):
        call = _call(each, f"call {number}")
        if known and call.name not in known:
            raise SlmError(f"call {number} names {call.name!r:.80}, which is not declared", "declare it in tools")
        calls.append(ordered(call, known.get(call.name)))
    return tuple(calls)


def matched(messages: "Sequence[Message]") -> "list[Message]":
    """Returns a conversation in which the results follow in the order of their calls and name the tools.

    Raises:
        SlmError: If a result has no call, or a call that is not in the last message has no result.
    """
    found: list[Message] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        found.append(message)
        if message["role"] == "tool":
            raise SlmError(
                f"message {at}: a result without a call before it", "the calls come in the message before it"
            )
        calls = message.get("calls", ())
        if not calls or at == len(messages):
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        found += _results(calls, messages[at:end], at)
        at = end
    return found


def openai_messages(messages: "Sequence[Message]") -> list[dict[str, Any]]:
    """Returns a conversation in OpenAI's format, as rows for `slm finetune` have it."""
    found: list[dict[str, Any]] = []
    ids: list[str] = []  # of the calls without a result so far
    number = 0
    for message in messages:
        written: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if calls := message.get("calls", ()):
            ids = [f"call_{number + place}" for place in range(len(calls))]
            number += len(calls)
            written["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments_text(call)}}
                for name, call in zip(ids, calls, strict=True)
            ]
        if message["role"] == "tool" and ids:
            written["tool_call_id"] = ids.pop(0)
        found.append(written)
    return found


def _results(calls: Sequence[Call], results: "Sequence[Message]", number: int) -> "list[Message]":
    """Returns the results of the calls of message `number`, in the order of the calls."""
    if len(calls) != len(results):
        count = "a result" if len(results) == 1 else f"{len(results)} results"
        raise SlmError(
            f"message {number} has {len(calls)} {'call' if len(calls) == 1 else 'calls'}, and {count} "
            f"{'follows' if len(results) == 1 else 'follow'}",
            "each call has one result",
        )
    given = [result.get("tool_call_id", "") for result in results]
    wanted = [call.id for call in calls]
    if not all(given) or not all(wanted):  # rows without ids may name the tools instead
        given, wanted = [result.get("name", "") for result in results], [call.name for call in calls]
        if not all(given) or len(set(given)) < len(given):
            given = wanted
    unknown = next((name for name in given if name not in wanted), None)
    if unknown is not None:
        raise SlmError(f"message {number}: a result is of {unknown!r:.80}, which was not called", _RESULT_FORM)
    if len(set(given)) < len(given) and given is not wanted:
        raise SlmError(f"message {number}: two results are of the same call", _RESULT_FORM)
    ordered = range(len(calls)) if given is wanted else [given.index(name) for name in wanted]
    found: list[Message] = []
    for call, place in zip(calls, ordered, strict=True):
        found.append({"role": "tool", "content": results[place]["content"], "name": call.name})
    return found


def _parsed(text: str, name: str) -> Any:
    try:
        return DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        raise SlmError(f"{name} is text that is not valid JSON") from None


def _check_json(value: Any, where: str) -> None:
    """Raises SlmError if a value is not valid JSON, or nested too deeply."""
    if depth(value) > MAX_DEPTH:
        raise SlmError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    try:
        check_json(value)
    except (TypeError, ValueError):
        raise SlmError(f"{where} is not valid JSON") from None


def _tool(value: Any, where: str) -> Tool:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise SlmError(f"{where} is not an object", _FORM)
    kind = value.get("type")
    if kind not in (None, "function"):
        raise SlmError(f"{where} has the type {kind!r:.40}; only functions are supported", _FORM)
    name, description = _name(function, where), function.get("description")
    if description is not None and not isinstance(description, str):
        raise SlmError(f"{where}: the description is not text", _FORM)
    parameters = function.get("parameters")
    if isinstance(parameters, str):  # a data set of tables may hold it as text
        parameters = _parsed(parameters, f"{where}: parameters")
    return Tool(name, description or "", _parameters(parameters, where))


def _parameters(value: Any, where: str) -> dict[str, Any]:
    """Returns the schema of a tool's arguments, without keywords that are null."""
    if value is None or value == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(value, Mapping):
        raise SlmError(f"{where}: parameters is not an object", "it is the JSON schema of the arguments")
    _check_json(value, f"{where}: parameters")
    size = len(json.dumps(value, ensure_ascii=False))
    if size > MAX_PARAMETERS:
        raise SlmError(f"{where}: parameters has {size:,} characters; the limit is {MAX_PARAMETERS:,}")
    found: dict[str, Any] = _without_null(value)
    if found.setdefault("type", "object") != "object":
        raise SlmError(f"{where}: parameters has the type {found['type']!r:.40}", 'its type is "object"')
    properties = found.setdefault("properties", {})
    _check_schemas(found, where)
    missing = next((each for each in found.get("required", ()) if each not in properties), None)
    if missing is not None:
        raise SlmError(f"{where}: the required parameter {missing!r:.80} is not in properties", _FORM)
    return found


def _check_schemas(root: Mapping[str, Any], where: str) -> None:
    """Checks the keywords that slm reads in a schema, in the schemas within it, and in those that it refers to.

    Raises:
        SlmError: If a keyword has a value of the wrong type.
    """
    left: list[Any] = [root]
    checked: set[int] = set()
    while left:
        schema = left.pop()
        if not isinstance(schema, Mapping) or id(schema) in checked:
            continue
        checked.add(id(schema))
        for key, (form, is_valid) in _KEYWORDS.items():
            # `required: true` in the schema of a single field is that of an early draft of JSON schemas.
            if key in schema and not is_valid(schema[key]) and not (key == "required" and "properties" not in schema):
                raise SlmError(f"{where}: {key} is not {form}", _FORM)
        left += schema.get("properties", {}).values()
        left += [schema.get("items"), schema.get("additionalProperties"), referred(schema.get("$ref"), root)]
        left += [*schema.get("anyOf", ()), *schema.get("oneOf", ())]


def _without_null(value: Any) -> Any:
    """Returns a schema without fields that are null: a table gives every object the fields of all objects."""
    if isinstance(value, Mapping):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list | tuple) else value


def _call(value: Any, where: str) -> Call:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise SlmError(f"{where} is not an object", _CALL_FORM)
    if value.get("type") not in (None, "function"):
        raise SlmError(f"{where} has the type {value['type']!r:.40}; only functions are supported", _CALL_FORM)
    name, arguments = _name(function, where), function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise SlmError(f"{where}: arguments is not an object", _CALL_FORM)
    _check_json(arguments, f"{where}: arguments")
    number = value.get("id")
    return Call(name, dict(arguments), number if isinstance(number, str) else "")


def _name(function: Mapping[str, Any], where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise SlmError(f"{where} has no name", _FORM)
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise SlmError(
            f"{where} has the name {name!r:.80}", f"names have up to {MAX_NAME} letters, digits, '_', '-' and '.'"
        )
    return name
