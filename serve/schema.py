"""What is asked over HTTP: OpenAI's fields, and some of ours beside them. What is not known, or not done here, is refused."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_STOPS = 16


def _whole(text: str) -> str:
    """JSON can spell halves of characters (a surrogate alone), of which no UTF-8 can be made."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a character, a surrogate without the other one") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Text in a message of several parts."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        """All parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(_Strict):
    """A schema and its name."""

    name: Text
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _named(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


class StreamOptions(_Strict):
    """What a stream has besides its pieces."""

    include_usage: bool = False


class Request(_Strict):
    """What chats and completions have in common; fields of ours begin at top_k."""

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Digits, Bias] | None = None
    user: Text | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _possible(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(Request):
    """A conversation to answer."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        return self


class CompletionRequest(Request):
    """A text to continue, or several."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
