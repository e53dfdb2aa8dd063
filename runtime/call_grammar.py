"""Writes the grammar of replies with calls, in llguidance's dialect of Lark.

A call follows the schema of its tool. Before a call there may be any text: its opening switches to the grammar of calls.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slm.core.tools import Style, Tool
from slm.runtime.gemma_grammar import GemmaRules, literal
from slm.runtime.schema_check import GRAMMAR, json_of

# The most calls in one reply.
MOST_CALLS = 32
# How chat templates spell JSON. `lenient` ignores the keywords that llguidance does not support.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords that describe fields besides `properties`, so that other fields must stay allowed.
_OPEN = frozenset(
    {
        *("additionalProperties", "patternProperties", "unevaluatedProperties"),
        *("allOf", "anyOf", "oneOf", "$ref", "if", "not"),
    }
)


@dataclass(frozen=True)
class Replies:
    """What a reply may be.

    Attributes:
        tools: The tools that it may call, at least one.
        style: The format of calls.
        choice: Whether it may be text, or must be calls.
        parallel: Whether it may have several calls.
        lenient: Names of tools whose schemas may have keywords that the grammar ignores.
        answer: The JSON schema of a reply without calls; None for any text.
        native: Whether the model spells the marks of calls by their tokens, if it has them, rather than as plain text.
    """

    tools: Sequence[Tool]
    style: Style
    choice: Literal["auto", "required"]
    parallel: bool = True
    lenient: Collection[str] = ()
    answer: Mapping[str, Any] | None = None
    native: bool = True

    @property
    def free(self) -> bool:
        """Whether a reply may begin with any text."""
        return self.choice == "auto" and self.answer is None


@dataclass(frozen=True)
class Marks:
    """How grammars refer to marks of the format of calls.

    Attributes:
        tokens: The token of each mark that has one.
    """

    tokens: Mapping[str, int]

    def __getitem__(self, mark: str) -> str:
        """Returns a mark as the grammar refers to it: its token, or its text."""
        return f"<[{self.tokens[mark]}]>" if mark in self.tokens else literal(mark)


def grammar_of_replies(replies: Replies, marks: Marks) -> str:
    """Returns the grammar of replies, or of the next part of a reply that may begin with any text: up to the end of a call.

    Raises:
        Impossible: If a schema has keywords that are not supported in the format of calls.
    """
    style = replies.style
    opening, closing = marks[style.opening], marks[style.closing]
    between = f"{literal(style.between)} " if style.between else ""
    more = f" ({between}call){{0,{MOST_CALLS - 1}}}" if replies.parallel else ""
    lines = [GRAMMAR]
    if replies.free:
        # The text of an opening begins a call even if it is spelled by other tokens than its own.
        lines += [
            "start: told | TEXT",
            f"told: trigger body{f' | TEXT {opening} body' if opening.startswith('<[') else ''}",
        ]
        lines += [f"trigger[lazy]: TEXT {literal(style.opening)}", r"TEXT: /(.|\n)*/"]
    elif replies.choice == "required":
        lines.append(f"start: call{more}")
    else:
        lines += [f"start: call{more} | answer", f"answer: %json {_schema(replies.answer or {}, lenient=False)}"]
    if not replies.free:
        lines.append(f"call: {opening} body")
    names = [f"tool_{number}" for number in range(len(replies.tools))]
    if style.quote is None:
        before, after = '\n{"name": ', "}\n"
        lines.append(f"body: {literal(before)} tool {literal(after)} {closing}")
        for name, tool in zip(names, replies.tools, strict=True):
            head = f'"{tool.name}", "arguments": '
            schema = _schema(closed(tool.parameters), lenient=tool.name in replies.lenient)
            lines.append(f"{name}: {literal(head)} %json {schema}")
    else:
        lines.append(f"body: {literal('call:')} tool {closing}")
        rules = GemmaRules(style.quote, marks[style.quote])
        for name, tool in zip(names, replies.tools, strict=True):
            value = rules.value(closed(tool.parameters), tool.parameters, lenient=tool.name in replies.lenient)
            lines.append(f"{name}: {literal(tool.name)} {value}")
        lines += rules.lines
    lines.append(f"tool: {' | '.join(names)}")
    return "\n".join(lines) + "\n"


def closed(schema: Any) -> Any:
    """Returns a schema in which objects have no other fields than those that they describe, unless it says otherwise.

    JSON schemas allow other fields by default, which no tool expects. A value of the closed schema is one of the schema too.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {
        key: {name: closed(each) for name, each in value.items()}
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, Mapping)
        else closed(value)
        if key in ("items", "anyOf", "oneOf", "additionalProperties", "prefixItems")
        else value
        for key, value in schema.items()
    }
    return found | ({"additionalProperties": False} if "properties" in found and not _OPEN & found.keys() else {})


def _schema(schema: Mapping[str, Any], *, lenient: bool) -> str:
    return json_of({**schema, "x-guidance": {**_SPELLING, "lenient": lenient}})
