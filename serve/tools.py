"""The tools of a chat request: which the model may call, and how its reply is read."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slm.core.call_stream import CallPart, CallStream
from slm.core.chat import Message, tool_form
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.tool_fields import called, declared, matched
from slm.core.tool_templates import ToolForm
from slm.core.tools import Tool, ordered
from slm.runtime.call_grammar import Replies
from slm.serve.errors import Refused, said
from slm.serve.messages import ChatMessage, NamedTool, SomeTools
from slm.serve.requests import ChatRequest


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        declared: The tools that the prompt declares.
        replies: What a reply may be.
        form: How the model writes tools.
        shown: Special tokens whose text is part of the reply: the marks of calls.
    """

    declared: tuple[Tool, ...]
    replies: Replies
    form: ToolForm
    shown: frozenset[int]

    @cached_property
    def _by_name(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in self.declared}

    def stream(self) -> CallStream:
        """Returns a reader of one reply."""
        return CallStream(self.form.style, self._by_name)


def declared_tools(request: ChatRequest) -> tuple[Tool, ...]:
    """Returns the tools that the prompt declares: none if the model must not call any.

    Raises:
        Refused: If a declaration is invalid, or tool_choice does not fit the tools.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise Refused(400, "tool_choice requires tools", param="tool_choice")
        return ()
    try:
        tools = declared([tool.model_dump(exclude_none=True) for tool in request.tools])
    except SlmError as error:
        raise Refused(400, f"tools: {said(error)}", param="tools") from None
    names = {tool.name for tool in tools}
    unknown = next((name for name in _chosen(choice) if name not in names), None)
    if unknown is not None:
        raise Refused(400, f"tool_choice names {unknown[:100]!r}, which is not in tools", param="tool_choice")
    return () if choice == "none" else tools


def messages_of(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
    """Returns the messages of a request, with the arguments of calls in the order of their declarations, as in training.

    Raises:
        Refused: If a call is invalid, or calls and results do not match.
    """
    known = {tool.name: tool for tool in tools}
    try:
        return matched([_message(each, number, known) for number, each in enumerate(messages, 1)])
    except SlmError as error:
        raise Refused(400, f"messages: {said(error)}", param="messages") from None


def tool_use(request: ChatRequest, tools: tuple[Tool, ...], tokenizer: Tokenizer) -> ToolUse | None:
    """Returns how a request uses tools; None if it declares none. A model's template may take seconds.

    Raises:
        SlmError: If the model's own template exceeds a limit of time or memory.
    """
    if not tools:
        return None
    choice, form = request.tool_choice, tool_form(tokenizer)
    chosen = set(_chosen(choice))
    required = choice == "required" or isinstance(choice, NamedTool)
    if isinstance(choice, SomeTools):
        required = choice.allowed_tools.mode == "required"
    asked = request.response_format
    answer: dict[str, Any] | None = None
    if asked is not None and asked.type != "text" and not required:
        answer = (asked.json_schema.schema_ if asked.json_schema else None) or {"type": "object"}
    replies = Replies(
        tools=[tool for tool in tools if not chosen or tool.name in chosen],
        style=form.style,
        choice="required" if required else "auto",
        parallel=request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        lenient={tool.function.name for tool in request.tools or () if tool.function.strict is False},
        answer=answer,
        native=form.native,
    )
    return ToolUse(tools, replies, form, tokenizer.ids_of(form.style.marks) & tokenizer.special_ids)


def written_call(part: CallPart, *, streamed: bool) -> dict[str, Any]:
    """Returns a call, or the next part of one, in OpenAI's format."""
    function = {"arguments": part.arguments}
    if not part.name:
        return {"index": part.index, "function": function}
    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": part.name, **function}}
    return {"index": part.index, **call} if streamed else call


def _chosen(choice: Any) -> list[str]:
    """Returns the names of the tools to which a choice restricts the model; empty for all."""
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    return [each.function.name for each in choice.allowed_tools.tools] if isinstance(choice, SomeTools) else []


def _message(message: ChatMessage, number: int, known: Mapping[str, Tool]) -> Message:
    found: Message = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        try:
            calls = called([call.model_dump() for call in message.tool_calls])
        except SlmError as error:
            raise SlmError(f"message {number}: {error.message}", error.hint) from None
        found["calls"] = [ordered(call, known.get(call.name)) for call in calls]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found
