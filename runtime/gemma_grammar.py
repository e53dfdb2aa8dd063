"""Writes rules for values in Gemma's notation, from JSON schemas: `{city:<escape>Rome<escape>,days:3}`.

Strings stand between quote marks, and fields are sorted. Numbers are JSON's, so that their rules are llguidance's own.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from slm.core.tools import referred
from slm.runtime.schema_check import Impossible

# Keywords that a value may have without an effect on what is allowed.
_IGNORED = frozenset(
    {"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment"}
)
_KEYWORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_FIELD = re.compile(r"[^{}\[\],:<>]+")
# The most rules of one grammar, and the longest repetition.
_MOST_RULES = 4096
_MOST_REPEATED = 10_000


class GemmaRules:
    """Collects rules; each value has a rule, to which `value` returns a reference.

    Attributes:
        lines: The rules so far.
    """

    def __init__(self, mark: str, quote: str) -> None:
        """Begins without rules.

        Args:
            mark: The text of the quote mark, which no string contains.
            quote: The quote mark, as the grammar refers to it.
        """
        self.lines: list[str] = []
        self._without = f"~/(.|\\n)*{re.escape(mark)}(.|\\n)*/"
        self._quote = quote
        self._known: dict[str, str] = {}
        self._root: Any = {}
        self._lenient = False

    def value(self, schema: Any, root: Any, *, lenient: bool) -> str:
        """Returns the reference to a value's rule.

        Args:
            schema: The JSON schema of the value.
            root: The schema within which `$ref` refers to definitions.
            lenient: Whether to ignore keywords that are not supported.

        Raises:
            Impossible: If a keyword is not supported.
        """
        self._known, self._root, self._lenient = {}, root, lenient
        try:
            return self._value(schema)
        except RecursionError:  # a chain of references may be long, however little each definition nests
            raise Impossible("its references are nested too deeply") from None

    def _value(self, schema: Any) -> str:
        if schema is False:
            raise Impossible("a schema that is false is not supported with this model's format of calls")
        if not isinstance(schema, Mapping) or not schema.keys() - _IGNORED:
            return self._any()
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        if "const" in schema:
            return self._rule(self._exactly(schema["const"]))
        if "enum" in schema:
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                raise Impossible("enum is not a list of values")
            return self._rule(" | ".join(self._exactly(each) for each in schema["enum"]))
        choices = schema.get("anyOf", schema.get("oneOf"))
        if choices is not None:
            self._check(schema, frozenset({"anyOf", "oneOf", "type"}))
            if not isinstance(choices, list) or not choices:
                raise Impossible("anyOf and oneOf are lists of schemas")
            return self._rule(" | ".join(self._value(each) for each in choices))
        kinds = schema.get("type")
        if kinds is None:
            kinds = "object" if "properties" in schema else "array" if "items" in schema else None
        if kinds is None:
            self._check(schema, frozenset())
            return self._any()
        each = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(each, list) or not all(isinstance(kind, str) and kind in _KEYWORDS for kind in each):
            raise Impossible("type is not the name of a type of JSON")
        allowed = frozenset().union(*(_KEYWORDS[kind] for kind in each))
        self._check(schema, allowed | {"type", "nullable"})
        if schema.get("nullable") is True and "null" not in each:
            each = [*each, "null"]
        return self._rule(" | ".join(self._of_kind(kind, schema) for kind in each))

    def _of_kind(self, kind: str, schema: Mapping[str, Any]) -> str:
        match kind:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                bounds = {key: schema[key] for key in sorted(_KEYWORDS[kind]) if key in schema}
                return f"%json {json.dumps({'type': kind, **bounds})}"
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"None"'
            case "array":
                return self._array(schema)
        return self._object(schema)

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = _count(schema, "minLength") or 0, _count(schema, "maxLength")
        text = f"/(.|\\n){{{least},{'' if most is None else most}}}/ & {self._without}"
        if text not in self._known:
            self._known[text] = f"TEXT_{len(self.lines)}"
            self._add(f"{self._known[text]}: {text}")
        return f"{self._quote} {self._known[text]} {self._quote}"

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items", True))
        least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        if most == 0:
            return '"[]"'
        bounds = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        some = f'"[" {item} ("," {item}){bounds} "]"'
        return some if least else f'"[]" | {some}'

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            raise Impossible("properties is not an object of schemas")
        if not properties and schema.get("additionalProperties") is not False:
            return self._any_object()
        required = schema.get("required", ())
        after, first = self._rule('""'), self._rule('""')  # what follows after a field, and before any
        for name in sorted(properties, key=str.lower, reverse=True):
            if not _FIELD.fullmatch(name):
                raise Impossible(f"the field {name!r:.60} cannot be written in this model's format of calls")
            field = f"{literal(name + ':')} {self._value(properties[name])} {after}"
            skipped = "" if name in required else " | "
            first = self._rule(f"{field}{skipped}{first if skipped else ''}")
            after = self._rule(f'"," {field}{skipped}{after if skipped else ""}')
        return f'"{{" {first} "}}"'

    def _exactly(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, Mapping):
            fields = [f"{literal(key + ':')} {self._exactly(value[key])}" for key in sorted(value, key=str.lower)]
            return f'"{{" {_joined(fields)} "}}"'
        if isinstance(value, list):
            return f'"[" {_joined([self._exactly(each) for each in value])} "]"'
        return '"None"' if value is None else literal(json.dumps(value, allow_nan=False))

    def _referred(self, reference: Any) -> str:
        if reference in self._known:
            return self._known[reference]
        found = referred(reference, self._root)
        if found is None:
            raise Impossible(f"$ref {reference!r:.60} does not refer to a definition of the schema")
        name = self._known[reference] = f"reference_{len(self.lines)}"
        place = len(self.lines)
        self.lines.append("")
        self.lines[place] = f"{name}: {self._value(found)}"
        return name

    def _any(self) -> str:
        """Returns the rule of any value."""
        if "any" not in self._known:
            self._known["any"] = name = f"any_{len(self.lines)}"
            place = len(self.lines)
            self.lines.append("")
            text, inner = self._string({}), self._any_object()
            array = f'"[]" | "[" {name} ("," {name})* "]"'
            number = '%json {"type": "number"}'
            self.lines[place] = f'{name}: {text} | {number} | "true" | "false" | "None" | {array} | {inner}'
        return self._known["any"]

    def _any_object(self) -> str:
        """Returns the rule of an object with any fields."""
        if "object" not in self._known:
            self._known["object"] = name = f"fields_{len(self.lines)}"
            place = len(self.lines)
            self.lines.append("")
            field = f'/[A-Za-z0-9_ .-]+/ ":" {self._any()}'
            self.lines[place] = f'{name}: "{{}}" | "{{" {field} ("," {field})* "}}"'
        return self._known["object"]

    def _check(self, schema: Mapping[str, Any], allowed: frozenset[str]) -> None:
        unknown = sorted(schema.keys() - allowed - _IGNORED)
        if unknown and not self._lenient:
            raise Impossible(f"{unknown[0]!r:.60} is not supported with this model's format of calls")

    def _rule(self, body: str) -> str:
        if body in self._known:
            return self._known[body]
        name = self._known[body] = f"value_{len(self.lines)}"
        self._add(f"{name}: {body}")
        return name

    def _add(self, line: str) -> None:
        self.lines.append(line)
        if len(self.lines) > _MOST_RULES:
            raise Impossible(f"it needs more than {_MOST_RULES:,} rules")


def _count(schema: Mapping[str, Any], name: str) -> int | None:
    value = schema.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_REPEATED:
        raise Impossible(f"{name} is not a number from 0 to {_MOST_REPEATED:,}")
    return value


def _joined(parts: list[str]) -> str:
    return ' "," '.join(parts)


def literal(text: str) -> str:
    """Returns a text as the grammar spells it."""
    return json.dumps(text, ensure_ascii=False)
