"""The requests for chats and completions: OpenAI's fields and slm's own.

`slm.serve.fields` has the rules of all objects, `slm.serve.messages` the messages and the tools.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from slm.core.tool_fields import MAX_TOOLS
from slm.serve.fields import (
    INTEGRAL,
    MOST_BIASES,
    ApiObject,
    Bias,
    Digits,
    Limit,
    StopText,
    TokenIds,
    UnicodeText,
    Unsupported,
    biases,
    wrong,
)
from slm.serve.messages import FUNCTIONS, MOST_PARTS, TEXT_ONLY, ChatMessage, FunctionTool, ToolChoice

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_MESSAGES = 4096


class JsonSchema(ApiObject):
    """A schema and its name."""

    name: UnicodeText
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="If absent, any JSON object.")
    description: UnicodeText | None = Field(None, description="The model does not see it.")
    strict: bool | None = Field(None, description="Completions follow the schema in either case.")


class ResponseFormat(ApiObject):
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


class StreamOptions(ApiObject):
    """Additional events of a stream."""

    harmless = frozenset({"include_obfuscation"})
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "continuous_usage_stats": Unsupported("usage is sent once, at the end", (False,)),
    }

    include_usage: bool | None = Field(None, description="Send a last event with the token usage.")


class ApiRequest(ApiObject):
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
    logit_bias: Annotated[dict[Digits, Bias | None] | None, BeforeValidator(biases)] = Field(
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
        "functions": Unsupported(FUNCTIONS, ([],)),
        "function_call": Unsupported(FUNCTIONS, ("none", "auto")),
        "modalities": Unsupported(TEXT_ONLY, (["text"],)),
        "audio": Unsupported(TEXT_ONLY),
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
