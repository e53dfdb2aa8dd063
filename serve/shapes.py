"""How answers are put into OpenAI's JSON."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from slm.runtime.model import Model
from slm.runtime.streaming import Piece
from slm.serve.engine import Done, Reason
from slm.serve.service import Service

# OpenAI's words for how a text ended.
FINISH: Mapping[Reason, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "deadline": "length",
}


class Chat:
    """How chats are put into JSON."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Returns a choice's text."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> dict[str, Any] | None:
        """Returns what a stream's choice begins with, where it does."""
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str | None) -> dict[str, Any]:
        """Returns a stream's piece; None is that of the end."""
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, model: Model, pieces: Sequence[Piece], start: int = 0) -> tuple[dict[str, Any], int]:
        """Returns how likely the tokens were, which begin after so many characters, and after how many they end."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = model.tokenizer.text_of(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        known = [piece for piece in pieces if piece.token is not None]
        content = [
            entry(piece.token or 0, piece.logprob) | {"top_logprobs": [entry(*likely) for likely in piece.top]}
            for piece in known
        ]
        return {"content": content, "refusal": None}, 0


class Completion:
    """How completions are put into JSON."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Returns a choice's text."""
        return {"text": text}

    def opening(self) -> dict[str, Any] | None:
        """Returns what a stream's choice begins with, where it does."""
        return None

    def part(self, text: str | None) -> dict[str, Any]:
        """Returns a stream's piece; None is that of the end."""
        return {"text": text or ""}

    def logprobs(self, model: Model, pieces: Sequence[Piece], start: int = 0) -> tuple[dict[str, Any], int]:
        """Returns how likely the tokens were, which begin after so many characters, and after how many they end."""
        known = [piece for piece in pieces if piece.token is not None]
        texts = [model.tokenizer.text_of(piece.token or 0) for piece in known]
        offsets = list(accumulate(map(len, texts), initial=start))
        told = {
            "tokens": texts,
            "token_logprobs": [piece.logprob for piece in known],
            "top_logprobs": [
                {model.tokenizer.text_of(token): value for token, value in piece.top} if piece.top else None
                for piece in known
            ],
            "text_offset": offsets[:-1],
        }
        return told, offsets[-1]


Shape = Chat | Completion


def card(service: Service, name: str) -> dict[str, Any]:
    """Returns what `/v1/models` says of a model or adapter."""
    card = {"id": name, "object": "model", "created": service.started, "owned_by": "slm"}
    return card if name == service.name else card | {"parent": service.name}


def usage_of(prompts: Sequence[Sequence[int]], done: Sequence[Done]) -> dict[str, Any]:
    """Returns the tokens read and written."""
    read, written = sum(map(len, prompts)), sum(each.new_tokens for each in done)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in done)},
    }
