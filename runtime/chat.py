"""A conversation with a model. Every request contains the whole conversation, in the turn format of the model's template."""

from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Unpack, cast

from slm.core.arguments import check_type
from slm.core.chat import Message, chat_ids, foreign_template
from slm.core.errors import ArgumentError, SlmError
from slm.core.tokenizer import END_OF_TURN
from slm.runtime.generation import Piece
from slm.runtime.model import Model
from slm.runtime.options import MAX_NEW_TOKENS, GenerationOptions, check_options
from slm.runtime.prefix import PrefixCache, PrefixDecoder
from slm.runtime.sampling import Sampling
from slm.runtime.speculative import SpeculativeDecoder
from slm.runtime.streaming import Stream, texts

# Memory for snapshots of prompts, so that retrying a turn does not read the prompt again.
_SNAPSHOT_BYTES = 64 << 20
# A quarter of the context is kept free for the completion, if `max_new_tokens` is that large.
_LEAST_ROOM = 4


class Chat:
    """A conversation with a model; `Model.chat` returns one.

        chat = model.chat(system="Be brief.")
        print(chat.ask("Name a colour.", max_new_tokens=20))
        for text in chat.stream("Another?"): print(text, end="")

    Attributes:
        messages: All messages, oldest first, a system message at the beginning.
        forgotten: Exchanges dropped from the beginning because they no longer fit into the context, since the last reset.
        seed: Seed of the conversation; answer n is sampled with seed + n, counted from 0.
    """

    def __init__(
        self,
        model: Model,
        system: str = "",
        *,
        messages: Sequence[Message] = (),
        seed: int | None = None,
        draft_tokens: int | None = None,
    ) -> None:
        """Begins a conversation.

        Args:
            model: The model. From now on its decoder reuses the tokens of the previous turns.
            system: The system message; empty for none.
            messages: Earlier messages, oldest first. A system message at the beginning replaces `system`.
            seed: Seed of the conversation; None draws one.
            draft_tokens: The longest draft of prompt-lookup decoding; None disables drafts.

        Raises:
            SlmError: If the model has no turns, or the messages are not a conversation that a request can follow.
        """
        check_type("system", system, str, "a str")
        drawn = Sampling(seed=seed).seed  # `_checked` verified the role
        assert drawn is not None
        self._model = model
        self.seed = drawn
        self._asked = 0
        self._answering: Stream[Piece] | None = None
        self._cut: list[Message] = []
        self.messages: list[Message] = []
        decoder = model.decoder
        # restores the state that the decoder had before another conversation used it
        if not isinstance(decoder, PrefixDecoder):
            decoder = PrefixDecoder(decoder, PrefixCache(_SNAPSHOT_BYTES))
        model.decoder = decoder if draft_tokens is None else SpeculativeDecoder(decoder, draft_tokens)
        end_of_turn = model.tokenizer.token_id(END_OF_TURN)
        if end_of_turn is not None and end_of_turn not in model.stop_token_ids:
            model.stop_token_ids = (*model.stop_token_ids, end_of_turn)
        if foreign_template(model.tokenizer) is None:
            chat_ids(model.tokenizer, [])  # raises if the model has no turns
        before = _checked(messages)
        if before and before[0]["role"] == "system":
            system = before.pop(0)["content"]
        self.reset(system)
        self.messages += before

    def __repr__(self) -> str:
        return f"<slm.Chat of {len(self.messages)} messages with {self._model!r}>"

    def reset(self, system: str | None = None) -> None:
        """Begins a new conversation. The system message stays unless `system` is given; an empty one removes it."""
        if system is None:
            system = self.system
        self._settle()
        self.messages = [{"role": "system", "content": system}] if system.strip() else []
        self.forgotten = 0

    @property
    def system(self) -> str:
        """The system message; empty if there is none."""
        begins = self.messages[:1]
        return begins[0]["content"] if begins and begins[0]["role"] == "system" else ""

    def ask(self, request: str, **options: Unpack[GenerationOptions]) -> str:
        """Returns the answer to a request; see `pieces`."""
        check_options("ask", options)
        return "".join(piece.text for piece in self.pieces(request, **options)).strip()

    def stream(self, request: str, **options: Unpack[GenerationOptions]) -> Stream[str]:
        """Returns the answer to a request as a stream of text; see `pieces`."""
        check_options("stream", options)
        return texts(self.pieces(request, **options))

    def retry(self, **options: Unpack[GenerationOptions]) -> str:
        """Replaces the last answer with another one and returns it; see `pieces`."""
        check_options("retry", options)
        return "".join(piece.text for piece in self.retry_pieces(**options)).strip()

    def pieces(self, request: str, **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns the answer token by token. The answer joins the conversation when the iterator ends or is closed.

        Drops the oldest exchanges if the context is too short for the conversation and an answer.

        Args:
            request: The user's message.
            **options: See `slm.GenerationOptions`; a `seed` overrides the conversation's seed.

        Raises:
            SlmError: If the request is empty or too long, or an option is invalid. The conversation is unchanged then.
        """
        check_options("pieces", options)
        check_type("the request", request, str, "a str")
        if not request.strip():
            raise SlmError("the request is empty", "enter a message")
        self._settle()
        before, forgotten = list(self.messages), self.forgotten
        self.messages.append({"role": "user", "content": request})
        try:
            ids = self._ids(options.get("max_new_tokens", MAX_NEW_TOKENS))
            seed = options.get("seed")
            drawn: GenerationOptions = {**options, "seed": (self.seed if seed is None else seed) + self._asked}
            pieces = self._model.pieces(ids, **drawn)
        except BaseException:
            self.messages, self.forgotten = before, forgotten
            raise
        self._asked += 1
        self._answering = pieces.through(self._recorded(pieces))
        return self._answering

    def retry_pieces(self, **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns another answer to the last request token by token. It replaces the last answer; see `pieces`.

        Raises:
            SlmError: If there is no answer yet.
        """
        self._settle()
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SlmError("there is no request to retry", "enter a message first")
        before = list(self.messages)
        del self.messages[-1]
        request = self.messages.pop()["content"]
        try:
            return self.pieces(request, **options)
        except BaseException:
            self.messages = before
            raise

    def was_interrupted(self, message: Message) -> bool:
        """Returns whether a message of `messages` is an interrupted answer."""
        return any(message is each for each in self._cut)

    def _settle(self) -> None:
        """Ends an answer that was not read completely, and drops a request whose answer has no text."""
        if self._answering is not None:
            self._answering.close()
            self._answering = None
        if self.messages and self.messages[-1]["role"] == "user":
            del self.messages[-1]

    def _recorded(self, pieces: Stream[Piece]) -> Generator[Piece, None, None]:
        """Yields the pieces of an answer, and appends the answer to the conversation at the end."""
        said, whole = [], False
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
            whole = True
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
                self._cut += [] if whole else self.messages[-1:]
            else:
                del self.messages[-1]  # a request without an answer is dropped, because turns alternate

    def _ids(self, max_new_tokens: int) -> list[int]:
        context = self._model.decoder.context
        room = min(max_new_tokens, context // _LEAST_ROOM)
        first = 1 if self.system else 0
        while True:
            ids = chat_ids(self._model.tokenizer, self.messages, self._model.stop_token_ids)
            if len(ids) + room <= context or len(self.messages) <= first + 2:
                return ids
            del self.messages[first : first + 2]
            self.forgotten += 1


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages after checking that a request can follow them.

    Raises:
        SlmError: If they are not a conversation that ends with an answer.
    """
    check_type("messages", messages, (list, tuple), 'a list of {"role": ..., "content": ...}')
    found: list[Message] = []
    for number, each in enumerate(cast("Sequence[Any]", messages), 1):
        if not isinstance(each, Mapping) or not isinstance(each.get("content"), str):
            raise ArgumentError(f"message {number} is not an object with text as 'content'", _MESSAGE)
        if each.get("role") not in ("system", "user", "assistant"):
            raise ArgumentError(f"message {number} has the role {each.get('role')!r}", _MESSAGE)
        found.append({"role": each["role"], "content": each["content"]})
    roles = [message["role"] for message in found if message["role"] != "system"]
    if "system" in [message["role"] for message in found[1:]]:
        raise SlmError("a system message comes after the first message", "it begins a conversation")
    if any(before == after for before, after in pairwise(roles)) or (roles and roles[0] != "user"):
        raise SlmError("user and assistant do not take turns in messages", "begin with the user's")
    if roles and roles[-1] != "assistant":
        raise SlmError("messages end with the user's", "leave the last one out and ask it: chat.ask(...)")
    return found


_MESSAGE = '{"role": "user" or "assistant", "content": text}'
