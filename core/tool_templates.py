"""How a model's own chat template writes tools: found out by rendering a short conversation.

A template knows tools if it writes their declarations, a call in a format of `slm.core.tools`, and the result. Any other
template gets tools as plain text (`slm.core.tool_text`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from slm.core.tool_text import in_two_roles, with_tools
from slm.core.tools import JSON_STYLE, STYLES, Call, Style, Tool, parsed_calls

if TYPE_CHECKING:
    from slm.core.chat import Message

_TOOL = Tool(
    "probe_tool",
    "Probes it.",
    {
        "type": "object",
        "properties": {"probe_key": {"type": "string", "description": "A key."}},
        "required": ["probe_key"],
    },
)
_CALL = Call("probe_tool", {"probe_key": "probe value"})
_RESULT = {"probe_result": "probe answer"}


@dataclass(frozen=True)
class ToolForm:
    """How tools are written for a model.

    Attributes:
        style: The format of calls in replies.
        native: Whether the model's own template writes tools; otherwise they are plain text.
        objects: Whether the template writes a result that is an object in the format of calls.
        system: Whether the template accepts a system message.
    """

    style: Style = JSON_STYLE
    native: bool = False
    objects: bool = False
    system: bool = True


@lru_cache(32)
def form_of(template: str, tokens: tuple[tuple[str, str], ...]) -> ToolForm:
    """Returns how tools are written with a template from another source.

    Args:
        template: The template.
        tokens: Special tokens by the names that templates use.

    Raises:
        SlmError: If the template exceeds a limit of time or memory.
    """
    from slm.core.template import render_all

    user: dict[str, Any] = {"role": "user", "content": "Go."}
    calls = {"role": "assistant", "content": "", "tool_calls": [_openai(_CALL, 0)]}
    done = {"role": "assistant", "content": "Done."}
    tools = [_TOOL.declaration]

    def result(content: Any) -> dict[str, Any]:
        return {"role": "tool", "name": _TOOL.name, "tool_call_id": _id(0), "content": content}

    texts = render_all(
        template,
        [
            ([user], True, tools),
            ([user, calls, result("probe answer"), done], False, tools),
            ([user, calls, result(_RESULT), done], False, tools),
            ([{"role": "system", "content": "probe system"}, user], True, None),
        ],
        dict(tokens),
    )
    declared, whole, objects, system = (text if isinstance(text, str) else "" for text in texts)
    style = next((style for style in STYLES if parsed_calls(whole, style)[1] == [_CALL]), None)
    native = style is not None and "probe_key" in declared and _TOOL.name in declared and "probe answer" in whole
    if style is None or not native:
        return ToolForm(system="probe system" in system)
    spelled = "" if style.quote is None else f"{{probe_result:{style.quote}probe answer{style.quote}}}"
    return ToolForm(style, native=True, objects=bool(spelled) and spelled in objects)


def for_template(
    form: ToolForm, messages: "Sequence[Message]", tools: Sequence[Tool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Returns the messages and the declarations that a template from another source renders."""
    if not form.native:
        plain = in_two_roles(with_tools(messages, tools), system=form.system)
        return [dict(message) for message in plain], None
    found: list[dict[str, Any]] = []
    number = 0  # of the call; a result answers the first call without one
    answered = 0
    names: list[str] = []
    for message in messages:
        rendered: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if calls := message.get("calls", ()):
            rendered["tool_calls"] = [_openai(call, number + place) for place, call in enumerate(calls)]
            answered, number = number, number + len(calls)
            names += [call.name for call in calls]
        if message["role"] == "tool":
            content = _object(message["content"]) if form.objects else None
            name = message.get("name") or (names[answered] if answered < len(names) else "tool")
            rendered |= {"name": name, "tool_call_id": _id(answered)}
            rendered["content"] = message["content"] if content is None else content
            answered += 1
        found.append(rendered)
    return found, [tool.declaration for tool in tools] or None


def _openai(call: Call, number: int) -> dict[str, Any]:
    return {"id": _id(number), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _id(number: int) -> str:
    """Returns the id of a call: nine letters and digits, as Mistral's templates demand."""
    return f"call{number:05d}"


def _object(text: str) -> Mapping[str, Any] | None:
    """Returns the JSON object that a result spells; None for any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found else None
