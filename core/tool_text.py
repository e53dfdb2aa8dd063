"""Tools as plain text in turns: slm's own form, for models whose chat template does not know tools.

A system message lists the tools, one signature a line, which takes about a third of the tokens of their JSON schemas. A reply
spells calls as `slm.core.tools.JSON_STYLE` does. Results are messages of the role "tool".
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm.core.tools import Tool, with_calls

if TYPE_CHECKING:
    from slm.core.chat import Message

HEAD = 'To call a tool, write <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\nTools:'
# Around a result in the turn of the user, for templates that have no turn for it.
_RESULT = "<tool_response>\n{}\n</tool_response>"

# The signature of a tool as a Jinja macro, which gives the same text as `signature`.
MACRO = """{%- macro signature(schema) -%}
{%- if schema is not mapping -%}{{- 'any' -}}
{%- elif 'enum' in schema -%}
{%- for value in schema['enum'] -%}{{- (' | ' if not loop.first else '') + (value | tojson) -}}{%- endfor -%}
{%- elif 'const' in schema -%}{{- schema['const'] | tojson -}}
{%- elif 'anyOf' in schema or 'oneOf' in schema -%}
{%- for choice in (schema['anyOf'] if 'anyOf' in schema else schema['oneOf']) -%}
{{- (' | ' if not loop.first else '') + signature(choice) -}}{%- endfor -%}
{%- elif 'type' not in schema -%}{{- 'any' -}}
{%- elif schema['type'] is not string -%}{{- schema['type'] | join(' | ') -}}
{%- elif schema['type'] == 'array' and 'items' in schema -%}{{- '[' + signature(schema['items']) + ', ...]' -}}
{%- elif schema['type'] == 'object' and 'properties' in schema -%}
{{- '{' -}}
{%- for name in schema['properties'] -%}
{%- set inner = schema['properties'][name] -%}
{{- (', ' if not loop.first else '') + name -}}
{{- ('' if 'required' in schema and name in schema['required'] else '?') + ': ' + signature(inner) -}}
{%- if inner is mapping and 'description' in inner and inner['description'] -%}
{{- ' (' + (inner['description'] | trim) + ')' -}}{%- endif -%}
{%- endfor -%}
{{- '}' -}}
{%- else -%}
{{- schema['type'] -}}
{%- if 'minimum' in schema or 'maximum' in schema -%}
{{- ' ' + ((schema['minimum'] | tojson) if 'minimum' in schema else '') + '..' -}}
{{- (schema['maximum'] | tojson) if 'maximum' in schema else '' -}}
{%- endif -%}
{%- endif -%}
{%- endmacro -%}""".replace("\n", "")


def signature(schema: Any) -> str:
    """Returns a JSON schema in short: `{room: "kitchen" | "hall", level?: integer 0..100 (in percent)}`."""
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema:
        return " | ".join(map(_json, schema["enum"]))
    if "const" in schema:
        return _json(schema["const"])
    if "anyOf" in schema or "oneOf" in schema:
        return " | ".join(map(signature, schema["anyOf"] if "anyOf" in schema else schema["oneOf"]))
    kind = schema.get("type", "any")
    if not isinstance(kind, str):
        return " | ".join(map(str, kind))
    if kind == "array" and "items" in schema:
        return f"[{signature(schema['items'])}, ...]"
    if kind == "object" and "properties" in schema:
        return f"{{{', '.join(_field(schema, name) for name in schema['properties'])}}}"
    if "minimum" in schema or "maximum" in schema:
        least, most = (_json(schema[name]) if name in schema else "" for name in ("minimum", "maximum"))
        return f"{kind} {least}..{most}"
    return kind


def listed(tools: Sequence[Tool]) -> str:
    """Returns the text that declares tools."""
    lines = [
        f"{tool.name}{signature(tool.parameters)}{': ' if tool.description.strip() else ''}{tool.description.strip()}"
        for tool in tools
    ]
    return "\n".join([HEAD, *lines])


def with_tools(messages: "Sequence[Message]", tools: Sequence[Tool]) -> "list[Message]":
    """Returns a conversation in which the system message declares the tools, and replies spell their calls as text."""
    found: list[Message] = []
    for message in messages:
        content, calls = message["content"], message.get("calls", ())
        found.append({"role": message["role"], "content": with_calls(content, calls) if calls else content})
    if not tools:
        return found
    system = found.pop(0)["content"].strip() if found and found[0]["role"] == "system" else ""
    declared = listed(tools)
    return [{"role": "system", "content": f"{system}\n\n{declared}" if system else declared}, *found]


def in_two_roles(messages: "Sequence[Message]", *, system: bool) -> "list[Message]":
    """Returns a conversation without the role "tool", in which user and assistant take turns.

    Args:
        messages: The conversation, with calls as text.
        system: Whether to keep the system message; otherwise it begins the first message of the user.
    """
    found: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", _RESULT.format(content.strip())
        elif role == "system" and not system:
            role = "user"
        if found and found[-1]["role"] == role and role != "assistant":
            between = "\n" if message["role"] == "tool" else "\n\n"
            found[-1] = {"role": role, "content": f"{found[-1]['content'].strip()}{between}{content.strip()}"}
        else:
            found.append({"role": role, "content": content})
    return found


def _field(schema: Mapping[str, Any], name: str) -> str:
    inner = schema["properties"][name]
    about = inner.get("description") if isinstance(inner, Mapping) else None
    mark = "" if name in schema.get("required", ()) else "?"
    return f"{name}{mark}: {signature(inner)}{f' ({about.strip()})' if about else ''}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
