"""The messages of a chat, their parts and calls, and the tools of a request: OpenAI's fields."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slm.core.tool_fields import MAX_TOOLS
from slm.serve.fields import ApiObject, UnicodeText, Unsupported, wrong

# Calls of one message.
MOST_CALLS = 128
MOST_PARTS = 1024

# Reasons for rejection.
TEXT_ONLY = "only text is supported"
FUNCTIONS = "the old form of tools is not supported; use tools, tool_choice and tool_calls"


class Part(ApiObject):
    """A text part of a message."""

    harmless = frozenset({"annotations", "cache_control", "prompt_cache_breakpoint"})
    forms = tuple(
        {"properties": {"type": {"const": kind}, kind: {"type": "string"}}, "required": ["type", kind]}
        for kind in ("text", "refusal")
    )

    type: Literal["text", "refusal"]
    text: UnicodeText | None = None
    refusal: UnicodeText | None = Field(None, description="Text of a refusal part of an earlier message.")

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in ("image_url", "input_audio", "file", "video_url", "audio_url", "image"):
            raise wrong(TEXT_ONLY, "type")
        return data

    @model_validator(mode="after")
    def _has_text(self) -> "Part":
        if getattr(self, self.type) is None:
            raise wrong("Field required", self.type, "missing_text")
        return self

    @property
    def content(self) -> str:
        """Its text."""
        return (self.text if self.type == "text" else self.refusal) or ""


def _kind_of_content(value: Any) -> str | None:
    return "[text]" if isinstance(value, str) else "[parts]" if isinstance(value, list) else None


Content = Annotated[
    Annotated[UnicodeText, Tag("[text]")]
    | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag("[parts]")],
    Discriminator(
        _kind_of_content, custom_error_type="content_type", custom_error_message="must be a text or a list of parts"
    ),
]


class CalledFunction(ApiObject):
    """The function of a call."""

    name: UnicodeText
    arguments: UnicodeText | dict[str, Any] = Field(description="A JSON object as text; an object is accepted too.")


class ToolCall(ApiObject):
    """A call in an assistant message."""

    harmless = frozenset({"index", "extra_content"})

    id: UnicodeText
    type: Literal["function"] | None = None
    function: CalledFunction


class Function(ApiObject):
    """The declaration of a function."""

    name: UnicodeText
    description: UnicodeText | None = None
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of its arguments; none if absent.")
    strict: bool | None = Field(
        None, description="Calls follow the schema in either case; false ignores keywords that are not supported."
    )


class FunctionTool(ApiObject):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "function":
            raise wrong("only functions are supported", "type")
        return data


class FunctionName(ApiObject):
    """The name of a function."""

    name: UnicodeText


class NamedTool(ApiObject):
    """The tool that the completion must call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(ApiObject):
    """A choice among some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class SomeTools(ApiObject):
    """The tools that the completion may call."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "[word]"
    kind = value.get("type") if isinstance(value, dict) else None
    return {"function": "[named]", "allowed_tools": "[some]"}.get(kind) if isinstance(kind, str) else None


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("[word]")]
    | Annotated[NamedTool, Tag("[named]")]
    | Annotated[SomeTools, Tag("[some]")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice_type",
        custom_error_message="must be auto, none, required, a function or allowed_tools",
    ),
]


class ChatMessage(ApiObject):
    """A message of a conversation. Accepts the fields that the official clients add to a returned message."""

    harmless = frozenset(
        {"annotations", "id", "name", "parsed", "reasoning", "reasoning_content", "reasoning_details"}
        | {"provider_specific_fields", "thinking_blocks", "weight", "created", "status", "cache_control"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "function_call": Unsupported(FUNCTIONS),
        "audio": Unsupported(TEXT_ONLY),
        "images": Unsupported(TEXT_ONLY, ([],)),
        "prefix": Unsupported("continuing a message is not supported", (False,)),
    }
    forms = (
        {"properties": {"role": {"const": "assistant"}}},
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="Required, except in an assistant message without text.")
    refusal: UnicodeText | None = Field(None, description="Text of an assistant message without content.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = Field(
        None, description="Calls of an assistant message."
    )
    tool_call_id: UnicodeText | None = Field(None, description="The id of the call whose result a tool message has.")

    @model_validator(mode="before")
    @classmethod
    def _no_functions(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "function":
            raise wrong(FUNCTIONS, "role")
        return data

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise wrong("Field required", "content", "missing_text")
        if self.tool_calls and self.role != "assistant":
            raise wrong("only a message of the role assistant has calls", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise wrong("only a message of the role tool has the result of a call", "tool_call_id")
        if self.tool_call_id is None and self.role == "tool":
            raise wrong("Field required", "tool_call_id", "missing_text")
        return self

    @property
    def text(self) -> str:
        """The text of all parts, or the refusal if there is no content."""
        if isinstance(self.content, list):
            return "".join(part.content for part in self.content)
        return self.content or self.refusal or ""
