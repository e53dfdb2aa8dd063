"""The request objects: OpenAI's fields and slm's own.

Each object has three lists. Understood fields are pydantic's. Fields that cannot change the completion are accepted, and
named in a debug line of the log. Fields that would change it are rejected with the reason, unless their value is neutral.
`null` always means that a field is absent.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from slm.core.tool_fields import MAX_TOOLS

MOST_CHOICES = 16
MOST_STOPS = 16
# A stop text longer than most completions never matches.
LONGEST_STOP = 1024
MOST_BIASES = 1024
MOST_MESSAGES = 4096
# Calls of one message.
MOST_CALLS = 128
MOST_PARTS = 1024
# The longest context of any Gemma 3.
MOST_IDS = 1 << 17
# The most characters of an unknown field's name that a message quotes.
_QUOTED = 100

log = logging.getLogger("slm.serve")


@dataclass(frozen=True)
class Unsupported:
    """A field that would change the completion.

    Attributes:
        why: The reason for rejection.
        neutral: Values without an effect, which are accepted.
    """

    why: str
    neutral: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Returns whether a value has no effect."""
        return any(type(value) is type(each) and value == each for each in self.neutral)


def wrong(why: str, field: str | None = None, kind: str = "unsupported") -> PydanticCustomError:
    """Returns the error for a field of the current object; `slm.serve.errors` adds the field's name to the path."""
    return PydanticCustomError(kind, "{why}", {"why": why, "field": field})


def _quoted(name: str) -> str:
    """Returns a field's name, truncated and printable for a message."""
    return name[:_QUOTED].encode(errors="replace").decode()


def _whole(text: str) -> str:
    """Rejects unpaired surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has an unpaired surrogate") from None
    return text


def _integral(value: Any) -> Any:
    """Accepts 16.0 as 16: JSON has one type of number, and some clients write all numbers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_ids(value: Any) -> Any:
    """Accepts token ids that are written as floats."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_integral(each) for each in value]
    return value


def _biases(value: Any) -> Any:
    """Checks a bias by token, up to the first invalid one; null means no bias."""
    if not isinstance(value, dict):
        return value
    value = {token: bias for token, bias in value.items() if bias is not None}
    if len(value) > MOST_BIASES:
        raise wrong(f"at most {MOST_BIASES:,} tokens can have a bias, not {len(value):,}")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            raise wrong("the name must be a token id", _quoted(token))
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("the bias must be a number from -100 to 100", token)
    return value


UnicodeText = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[UnicodeText, Field(min_length=1, max_length=LONGEST_STOP)]
# Separate from the bounds of each integer: a validator around the whole field would hide them in the description.
INTEGRAL = BeforeValidator(_integral)
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[
    list[TokenId], Field(min_length=1, max_length=MOST_IDS, fail_fast=True), BeforeValidator(_integral_ids)
]
Limit = Annotated[int, Field(ge=1), INTEGRAL]
Bias = Annotated[float, Field(ge=-100, le=100)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def _listed(schema: dict[str, Any], kind: "type[_Object]") -> None:
    """Adds the fields of the other two lists, and null for absent fields, to an object's description."""
    properties = schema.setdefault("properties", {})
    schema["additionalProperties"] = {"type": "null"}
    if kind.forms:
        schema["anyOf"] = list(kind.forms)
    for name in sorted(kind.harmless):
        properties[name] = {"description": "Accepted and ignored: it does not change the answer."}
    for name, field in kind.unsupported.items():
        properties[name] = {"description": f"Not supported: {field.why}.", "enum": [*field.neutral, None]}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_listed)

    harmless: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    # JSON schemas, at least one of which must match; used only in the description.
    forms: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _sorted_out(cls, data: Any) -> Any:
        """Returns the understood fields. Rejects the first unknown or unsupported one."""
        if not isinstance(data, dict):
            return data
        understood, ignored = {}, []
        for name, value in data.items():
            if value is None:
                continue
            if name in _names(cls):
                understood[name] = value
            elif name in cls.harmless:
                ignored.append(name)
            elif name not in cls.unsupported:
                raise wrong(_unknown(name, cls), _quoted(name))
            elif not cls.unsupported[name].accepts(value):
                raise wrong(cls.unsupported[name].why, name)
        if ignored:
            log.debug(json.dumps({"object": cls.__name__, "ignored": ignored}))
        return understood


def _names(kind: type[BaseModel]) -> frozenset[str]:
    """Returns the names of the fields that an object understands, as spelled in JSON."""
    found = _NAMES.get(kind)
    if found is None:
        found = frozenset(field.alias or name for name, field in kind.model_fields.items())
        _NAMES[kind] = found
    return found


def _unknown(name: str, kind: "type[_Object]") -> str:
    meant = get_close_matches(name[:_QUOTED], [*_names(kind), *kind.harmless], 1, 0.8)
    return f"unknown field; did you mean {meant[0]}?" if meant else "unknown field"


_NAMES: dict[type[BaseModel], frozenset[str]] = {}

_TEXT_ONLY = "only text is supported"
_FUNCTIONS = "the old form of tools is not supported; use tools, tool_choice and tool_calls"


class Part(_Object):
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
            raise wrong(_TEXT_ONLY, "type")
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


class CalledFunction(_Object):
    """The function of a call."""

    name: UnicodeText
    arguments: UnicodeText | dict[str, Any] = Field(description="A JSON object as text; an object is accepted too.")


class ToolCall(_Object):
    """A call in an assistant message."""

    harmless = frozenset({"index", "extra_content"})

    id: UnicodeText
    type: Literal["function"] | None = None
    function: CalledFunction


class Function(_Object):
    """The declaration of a function."""

    name: UnicodeText
    description: UnicodeText | None = None
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of its arguments; none if absent.")
    strict: bool | None = Field(
        None, description="Calls follow the schema in either case; false ignores keywords that are not supported."
    )


class FunctionTool(_Object):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "function":
            raise wrong("only functions are supported", "type")
        return data


class FunctionName(_Object):
    """The name of a function."""

    name: UnicodeText


class NamedTool(_Object):
    """The tool that the completion must call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Object):
    """A choice among some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class SomeTools(_Object):
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


class ChatMessage(_Object):
    """A message of a conversation. Accepts the fields that the official clients add to a returned message."""

    harmless = frozenset(
        {"annotations", "id", "name", "parsed", "reasoning", "reasoning_content", "reasoning_details"}
        | {"provider_specific_fields", "thinking_blocks", "weight", "created", "status", "cache_control"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "function_call": Unsupported(_FUNCTIONS),
        "audio": Unsupported(_TEXT_ONLY),
        "images": Unsupported(_TEXT_ONLY, ([],)),
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
            raise wrong(_FUNCTIONS, "role")
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


class JsonSchema(_Object):
    """A schema and its name."""

    name: UnicodeText
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="If absent, any JSON object.")
    description: UnicodeText | None = Field(None, description="The model does not see it.")
    strict: bool | None = Field(None, description="Completions follow the schema in either case.")


class ResponseFormat(_Object):
    """The format that the completion must follow."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "schema": Unsupported("put the schema into json_schema, with type json_schema"),
    }
    forms = (
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
        {
            "properties": {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}},
            "required": ["json_schema"],
        },
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _named(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema requires type json_schema")
        return self


class StreamOptions(_Object):
    """Additional events of a stream."""

    harmless = frozenset({"include_obfuscation"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "continuous_usage_stats": Unsupported("usage is sent once, at the end", (False,)),
    }

    include_usage: bool | None = Field(None, description="Send a last event with the token usage.")


class ApiRequest(_Object):
    """The common fields of chats and completions; slm's own fields start at top_k."""

    harmless = frozenset(
        {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
        | {"prompt_cache_options", "store", "cache_prompt", "priority", "request_id", "spaces_between_special_tokens"}
    )
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "skip_special_tokens": Unsupported("completions never contain special tokens", (True,)),
        "include_stop_str_in_output": Unsupported("completions never contain the stop text", (False,)),
        "use_beam_search": Unsupported("beam search is not supported", (False,)),
        "length_penalty": Unsupported("beam search is not supported", (1, 1.0)),
        "min_tokens": Unsupported("a minimum length is not supported; use ignore_eos", (0,)),
        "repeat_penalty": Unsupported("use repetition_penalty", (1, 1.0)),
        "stop_token_ids": Unsupported("use stop with the spelling of the special token", ([],)),
        "guided_json": Unsupported("use a schema in response_format"),
        "guided_regex": Unsupported("use a schema with a pattern in response_format"),
        "guided_choice": Unsupported("use a schema with an enum in response_format"),
        "guided_grammar": Unsupported("grammars are not supported"),
        "grammar": Unsupported("grammars are not supported", ("",)),
    }

    model: UnicodeText | None = Field(None, description="Optional if there is only one.")
    stream: bool | None = Field(None, description="Stream the completion as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), INTEGRAL] | None = Field(
        None, description="Completions per prompt."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None = Field(
        None, description="Texts that end the completion; they may contain special tokens."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), INTEGRAL] | None = Field(
        None, description="The same seed gives the same completion."
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0 keeps only the most likely token.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[Digits, Bias | None] | None, BeforeValidator(_biases)] = Field(
        None, description="Added to the logits of tokens, by id.", json_schema_extra={"maxProperties": MOST_BIASES}
    )
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), INTEGRAL] | None = Field(
        None, description="Keep the K most likely tokens; 0 and -1 keep all."
    )
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = Field(None, description="Continue after end-of-text tokens.")

    @model_validator(mode="after")
    def _possible(self) -> "ApiRequest":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options requires stream")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the completion."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(ApiRequest):
    """A conversation to continue with a message."""

    harmless = ApiRequest.harmless | {
        "prediction",
        "reasoning_effort",
        "verbosity",
        "moderation",
    }
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **ApiRequest.unsupported,
        "functions": Unsupported(_FUNCTIONS, ([],)),
        "function_call": Unsupported(_FUNCTIONS, ("none", "auto")),
        "modalities": Unsupported(_TEXT_ONLY, (["text"],)),
        "audio": Unsupported(_TEXT_ONLY),
        "web_search_options": Unsupported("web search is not supported"),
        "add_generation_prompt": Unsupported("the model's turn always follows the messages", (True,)),
        "continue_final_message": Unsupported("continuing a message is not supported", (False,)),
        "chat_template": Unsupported("chats use the model's own template"),
        "chat_template_kwargs": Unsupported("chats use the model's own template", ({},)),
        "best_of": Unsupported("not supported", (1,)),
        "documents": Unsupported("documents are not supported", ([],)),
        "echo": Unsupported("not supported", (False,)),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_tokens: Limit | None = Field(None, description="The most new tokens, up to the server's limit.")
    max_completion_tokens: Limit | None = Field(None, description="OpenAI's current name of max_tokens.")
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the completion may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="auto if absent; requires tools, unless none or auto.")
    parallel_tool_calls: bool | None = Field(None, description="Whether there may be several calls; true if absent.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs")
        return self


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "[text]"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return {str: "[texts]", int: "[ids]", float: "[ids]", list: "[lists]"}.get(type(first))


Prompt = Annotated[
    Annotated[UnicodeText, Tag("[text]")]
    | Annotated[list[UnicodeText], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag("[texts]")]
    | Annotated[TokenIds, Tag("[ids]")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag("[lists]")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


class CompletionRequest(ApiRequest):
    """One or several prompts to complete."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **ApiRequest.unsupported,
        "suffix": Unsupported("inserting text is not supported", ("",)),
        "echo": Unsupported("not supported", (False,)),
        "prompt_logprobs": Unsupported("logprobs of prompt tokens are not supported"),
    }

    prompt: Prompt
    max_tokens: Limit | None = Field(None, description="The most new tokens, up to the server's limit.")
    logprobs: Annotated[int, Field(ge=0, le=20), INTEGRAL] | None = None
    best_of: Annotated[Annotated[int, INTEGRAL] | None, WithJsonSchema({"enum": [1, None], "title": "Best Of"})] = (
        Field(None, description="Not supported: 1, or the same as n.")
    )

    @model_validator(mode="after")
    def _best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, 1, self.n):
            raise wrong("not supported unless it is 1 or equals n", "best_of")
        return self
