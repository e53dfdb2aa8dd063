"""Tools: their declarations, the calls that a model makes, and the formats in which replies spell calls.

The module is pure: `slm.core.tool_fields` reads other programs' formats, and `slm.core.chat` writes tools into prompts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

# The deepest nesting of declarations and arguments; JSON schemas of real tools have less than ten levels.
MAX_DEPTH = 64


@dataclass(frozen=True)
class Tool:
    """A tool that a model may call.

    Attributes:
        name: Its name.
        description: What it does, for the model; may be empty.
        parameters: The JSON schema of its arguments, an object schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def declaration(self) -> dict[str, Any]:
        """The declaration in OpenAI's format."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: The name of the tool.
        arguments: Its arguments, as JSON values.
        id: The id that its result names; empty if there is none. Calls with different ids are equal.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", compare=False)


def ordered(call: Call, tool: Tool | None) -> Call:
    """Returns a call with its arguments, and the fields of objects within them, in the order of the declaration.

    An argument that is null although the declaration does not allow null counts as absent: tables fill columns with it.
    """
    if tool is None:
        return call
    return replace(call, arguments=_ordered(call.arguments, tool.parameters, tool.parameters))


def canonical(call: Call) -> str:
    """Returns a text that is equal for equal calls: the order of arguments and the spelling of numbers do not matter."""
    return json.dumps([call.name, _plain(call.arguments)], sort_keys=True, ensure_ascii=False)


def arguments_text(call: Call) -> str:
    """Returns the arguments of a call as JSON text, spelled as chat templates spell JSON."""
    return json.dumps(call.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Style:
    """A format in which replies spell calls.

    Attributes:
        opening: The text that begins a call.
        closing: The text that ends it.
        quote: The text around strings in Gemma's formats, `call:NAME{KEY:VALUE,...}`; None for the JSON object
            `{"name": NAME, "arguments": {...}}`.
        between: The text between two calls.
        result: The token that ends a reply with calls, because the results follow in the same turn; None if calls end with the
            turn.
    """

    opening: str
    closing: str
    quote: str | None = None
    between: str = ""
    result: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that may be control tokens of a vocabulary."""
        return (self.opening, self.closing) if self.quote is None else (self.opening, self.closing, self.quote)


# Qwen's and Hermes's format, and that of slm's own turns.
JSON_STYLE = Style("<tool_call>", "</tool_call>", between="\n")
FUNCTION_GEMMA = Style("<start_function_call>", "<end_function_call>", "<escape>", result="<start_function_response>")
GEMMA_4 = Style("<|tool_call>", "<tool_call|>", '<|"|>', result="<|tool_response>")
STYLES = (JSON_STYLE, FUNCTION_GEMMA, GEMMA_4)


def written(calls: Sequence[Call], style: Style = JSON_STYLE) -> str:
    """Returns calls as a reply spells them."""
    return style.between.join(_written(call, style) for call in calls)


def with_calls(text: str, calls: Sequence[Call]) -> str:
    """Returns a reply of a text and calls, as slm's own turns spell it."""
    said = text.strip()
    return "\n".join([said] * bool(said) + [written(calls)] * bool(calls))


def parsed_calls(text: str, style: Style = JSON_STYLE) -> tuple[str, list[Call]]:
    """Returns a reply's text and its calls. Text that only resembles a call stays text.

    Args:
        text: The whole reply, including markers that are special tokens.
        style: The format of the calls.

    Returns:
        The text without the calls and the white space around them, and the calls in order.
    """
    parts, calls = [], []
    at = begin = 0
    while (start := text.find(style.opening, begin)) >= 0:
        found = _read(text, start + len(style.opening), style)
        if found is None:
            begin = start + len(style.opening)
            continue
        call, end = found
        calls.append(call)
        parts.append(text[at:start])
        at = begin = end
    parts.append(text[at:])
    if not calls:
        return text, []
    return "\n".join(part.strip() for part in parts if part.strip()), calls


def _written(call: Call, style: Style) -> str:
    if style.quote is None:
        return f'{style.opening}\n{{"name": {_json(call.name)}, "arguments": {arguments_text(call)}}}\n{style.closing}'
    fields = ",".join(f"{key}:{_gemma(value, style.quote)}" for key, value in _sorted(call.arguments))
    return f"{style.opening}call:{call.name}{{{fields}}}{style.closing}"


def _gemma(value: Any, quote: str) -> str:
    """Returns a value as Gemma's formats spell it."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_gemma(each, quote)}' for key, each in _sorted(value))}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_gemma(each, quote) for each in value)}]"
    return "None" if value is None else _json(value)


def _sorted(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns fields in the order of Jinja's `dictsort`."""
    return sorted(fields.items(), key=lambda item: item[0].lower())


def _read(text: str, at: int, style: Style) -> tuple[Call, int] | None:
    """Returns the call whose opening ends at a position, and the end of its closing; None if there is no call."""
    try:
        call, at = _read_json(text, at) if style.quote is None else _Gemma(text, at, style.quote).call()
        check_json(call.arguments)
    except (ValueError, RecursionError):
        return None
    at = _past_space(text, at)
    return (call, at + len(style.closing)) if text.startswith(style.closing, at) else None


def _read_json(text: str, at: int) -> tuple[Call, int]:
    found, end = DECODER.raw_decode(text, _past_space(text, at))
    if not isinstance(found, dict) or found.keys() not in ({"name", "arguments"}, {"name", "parameters"}):
        raise ValueError
    name, arguments = found["name"], found.get("arguments", found.get("parameters"))
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError
    return Call(name, arguments), end


class _Gemma:
    """Reads `call:NAME{KEY:VALUE,...}`, where strings stand between quote marks."""

    def __init__(self, text: str, at: int, quote: str) -> None:
        self._text, self._at, self._quote = text, at, quote

    def call(self) -> tuple[Call, int]:
        """Returns the call and its end.

        Raises:
            ValueError: If there is no call.
        """
        self._skip("call:")
        name = self._matched(_BARE_NAME)
        return Call(name, self._object(1)), self._at

    def _object(self, depth: int) -> dict[str, Any]:
        self._skip("{")
        found: dict[str, Any] = {}
        while not self._follows("}"):
            if found:
                self._skip(",")
            key = self._string() if self._text.startswith(self._quote, self._at) else self._matched(_BARE_KEY)
            self._skip(":")
            if key in found:
                raise ValueError
            found[key] = self._value(depth)
        return found

    def _array(self, depth: int) -> list[Any]:
        self._skip("[")
        found: list[Any] = []
        while not self._follows("]"):
            if found:
                self._skip(",")
            found.append(self._value(depth))
        return found

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError
        if self._text.startswith(self._quote, self._at):
            return self._string()
        if self._text.startswith("{", self._at):
            return self._object(depth + 1)
        if self._text.startswith("[", self._at):
            return self._array(depth + 1)
        for word, value in (("true", True), ("false", False), ("null", None), ("None", None)):
            if self._follows(word):
                return value
        return json.loads(self._matched(_NUMBER))

    def _string(self) -> str:
        self._skip(self._quote)
        end = self._text.index(self._quote, self._at)
        found, self._at = self._text[self._at : end], end + len(self._quote)
        return found

    def _matched(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise ValueError
        self._at = found.end()
        return found.group()

    def _follows(self, text: str) -> bool:
        follows = self._text.startswith(text, self._at)
        self._at += len(text) * follows
        return follows

    def _skip(self, text: str) -> None:
        if not self._follows(text):
            raise ValueError


_BARE_NAME = re.compile(r"[^\s{}<>,:]+")
_BARE_KEY = re.compile(r"[^{}\[\],:<>]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,400})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SPACE = re.compile(r"\s*")


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def check_json(value: Any) -> None:
    """Raises ValueError if a value is not valid JSON in Unicode, or nested too deeply."""
    if depth(value) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def depth(value: Any) -> int:
    """Returns how deep a JSON value is nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return deepest


def _ordered(value: Any, schema: Any, root: Any) -> Any:
    schema = _described(schema, root)
    if isinstance(value, list):
        return [_ordered(each, schema.get("items"), root) for each in value]
    properties = schema.get("properties")
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return value
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    required = schema.get("required", ())
    return {
        name: _ordered(value[name], properties.get(name), root)
        for name in names
        if value[name] is not None
        or name in required
        or allows_null(properties.get(name, schema.get("additionalProperties", False)))
    }


def _described(schema: Any, root: Any) -> Mapping[str, Any]:
    """Returns the schema that describes a value: the target of a reference, or the only choice with fields or items."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        choices = schema.get("anyOf", schema.get("oneOf"))
        if "$ref" in schema:
            schema = referred(schema["$ref"], root)
        elif isinstance(choices, list):
            described = [
                each for each in choices if isinstance(each, Mapping) and {"properties", "items", "$ref"} & each.keys()
            ]
            schema = described[0] if len(described) == 1 else None
        else:
            return schema
    return {}


def referred(reference: Any, root: Any) -> Any:
    """Returns the definition that `$ref` of a schema refers to, within the same schema; None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def allows_null(schema: Any) -> bool:
    """Returns whether null may match a schema; True if that is not clear."""
    if not isinstance(schema, Mapping):
        return schema is not False
    if "const" in schema:
        return schema["const"] is None
    if "enum" in schema:
        return None in schema["enum"]
    if schema.get("nullable") is True:
        return True
    kinds = schema.get("type")
    if isinstance(kinds, str | list):
        return "null" in ([kinds] if isinstance(kinds, str) else kinds)
    choices = schema.get("anyOf", schema.get("oneOf"))
    return any(map(allows_null, choices)) if isinstance(choices, list) else True


def _plain(value: Any) -> Any:
    """Returns a value in which whole numbers are integers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
