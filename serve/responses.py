"""The responses in the OpenAPI description: OpenAI's objects, with the fields that this server fills in.

Responses are built as plain dictionaries (`slm.serve.formatting`), which is faster; tests validate them against these classes.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Reply):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(_Reply):
    """OpenAI's envelope of an error."""

    error: Problem


class Status(_Reply):
    """The state of the server, for probes."""

    status: str


class Card(_Reply):
    """A model or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None


class Cards(_Reply):
    """All models and adapters."""

    object: Literal["list"]
    data: list[Card]


class PromptDetails(_Reply):
    """How many prompt tokens were reused."""

    cached_tokens: int


class Usage(_Reply):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


Finish = Literal["stop", "length", "tool_calls"]


class LikelyToken(_Reply):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """The chosen token, with the most likely tokens."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Reply):
    """The log-probabilities of a message's tokens."""

    content: list[ChosenToken] | None
    refusal: None = None


class CalledFunction(_Reply):
    """The function of a call."""

    name: str
    arguments: str


class AnswerCall(_Reply):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(_Reply):
    """The generated message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(_Reply):
    """One of the completions."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(_Reply):
    """Completions of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(_Reply):
    """The log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Reply):
    """One of the completions."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextCompletion(_Reply):
    """Completions of prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


_WHY = {
    400: "a field is invalid or not supported",
    401: "the API key is missing or wrong",
    403: "the origin of the web page is not allowed (--cors-origin)",
    404: "the model does not exist",
    408: "the body was not received in time",
    413: "the body is too large",
    415: "the body is compressed, which is not supported",
    421: "the Host name is not allowed (--allow-host)",
    431: "the headers are too large",
    429: "all slots and the queue are full; retry after the seconds in Retry-After",
    500: "internal server error",
    503: "the server is shutting down, its engine has ended, or no token was generated in time",
}
# Statuses that any request may receive before its body is read.
TURNED_AWAY = (403, 421, 431)


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the description of error responses."""
    return {status: {"model": ErrorReply, "description": _WHY[status]} for status in statuses}


def answered_or_refused() -> dict[int | str, dict[str, Any]]:
    """Returns the description of the responses to a completion request, besides the whole response."""
    events: dict[str, Any] = {"text/event-stream": {}}
    return {
        200: {"description": "the completions, or events that end with [DONE]", "content": events},
        **refused(400, 401, *TURNED_AWAY, 404, 408, 413, 415, 429, 500, 503),
    }
