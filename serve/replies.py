"""What the OpenAPI description says is answered: OpenAI's objects, as far as they are filled in here.

Answers are put together as plain dictionaries (`slm.serve.shapes`), which is quicker; tests hold them against these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Reply):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(_Reply):
    """OpenAI's envelope around every refusal."""

    error: Problem


class Status(_Reply):
    """For probes."""

    status: str


class Card(_Reply):
    """A model or an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None


class Cards(_Reply):
    """All of them."""

    object: Literal["list"]
    data: list[Card]


class PromptDetails(_Reply):
    """How much of the prompt was known."""

    cached_tokens: int


class Usage(_Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


Finish = Literal["stop", "length"]


class LikelyToken(_Reply):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """The one that was chosen, beside the likeliest."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Reply):
    """How likely the tokens of a message were."""

    content: list[ChosenToken] | None
    refusal: None = None


class ChatAnswer(_Reply):
    """What was said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(_Reply):
    """One of the answers."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(_Reply):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(_Reply):
    """How likely the tokens of a text were."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Reply):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextCompletion(_Reply):
    """Texts that continue prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


_WHY = {
    400: "a field is invalid or not supported",
    401: "the API key is missing or wrong",
    403: "a web page of another origin asks, which --cors-origin does not allow",
    404: "the model does not exist",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is compressed",
    421: "the server does not answer to the Host name",
    431: "the headers are too large",
    429: "all slots and the queue are taken; Retry-After says when to ask again",
    500: "a defect",
    503: "the server is shutting down, its engine has ended, or nothing was answered in time",
}
# What any request may be answered before it is looked at.
TURNED_AWAY = (403, 421, 431)


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the description of responses that refuse."""
    return {status: {"model": ErrorReply, "description": _WHY[status]} for status in statuses}


def answered_or_refused() -> dict[int | str, dict[str, Any]]:
    """Returns the description of what may come of a request for answers, besides the whole answer."""
    events: dict[str, Any] = {"text/event-stream": {}}
    return {
        200: {"description": "the answers, or events that end with [DONE]", "content": events},
        **refused(400, 401, *TURNED_AWAY, 404, 408, 413, 415, 429, 500, 503),
    }
