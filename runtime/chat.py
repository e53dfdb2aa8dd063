"""A conversation with a model: what was said is asked anew with every turn, in the turns that the model was trained on."""

from collections.abc import Iterator
from typing import Any

from slm.core.chat import Message, chat_ids, foreign_template
from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TURN
from slm.runtime.model import Model
from slm.runtime.prefix import PrefixCache, PrefixDecoder
from slm.runtime.speculative import SpeculativeDecoder
from slm.runtime.streaming import Piece

# Snapshots of what was read: a turn asked again is not read again.
_SNAPSHOT_BYTES = 64 << 20
# Of the context, what is kept free for the answer when more is allowed than that.
_LEAST_ROOM = 4


class Chat:
    """A model and what was said.

    Attributes:
        messages: What was said, oldest first, what the system says among it.
        forgotten: Exchanges at the beginning that no longer fit into the context, since the start or the last reset.
    """

    def __init__(self, model: Model, system: str = "", *, draft_tokens: int | None = None) -> None:
        """Begins a conversation.

        Args:
            model: Answers; its decoder keeps what it read from one turn to the next from now on.
            system: What the model is told before anything else; nothing when empty.
            draft_tokens: Read up to this many tokens ahead where the text repeats; None never does.

        Raises:
            SlmError: When the model knows no turns.
        """
        self._model = model
        self._asked = 0
        prefix = PrefixDecoder(model.decoder, PrefixCache(_SNAPSHOT_BYTES))
        model.decoder = prefix if draft_tokens is None else SpeculativeDecoder(prefix, draft_tokens)
        end_of_turn = model.tokenizer.token_id(END_OF_TURN)
        if end_of_turn is not None and end_of_turn not in model.stop_token_ids:
            model.stop_token_ids = (*model.stop_token_ids, end_of_turn)
        if foreign_template(model.tokenizer) is None:
            chat_ids(model.tokenizer, [])  # which says so when there are no turns
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets what was said; what the system says stays unless something else is given, even nothing."""
        if system is None:
            system = self.system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
        self.forgotten = 0

    @property
    def system(self) -> str:
        """What the model is told before anything else."""
        messages = getattr(self, "messages", [])
        return messages[0]["content"] if messages and messages[0]["role"] == "system" else ""

    def ask(self, request: str, *, seed: int = 0, max_new_tokens: int = 256, **options: Any) -> Iterator[Piece]:
        """Returns the answer piece by piece; it joins the conversation when the iterator ends or is closed.

        Where the context is too short for all that was said and an answer, the oldest exchanges are forgotten.

        Args:
            request: What the user says.
            seed: Of the conversation: every answer draws anew.
            max_new_tokens: Of the answer, at most.
            **options: As for `Model.pieces`.

        Raises:
            SlmError: When the request is empty or too long, or an option will not do; it is as if nothing was said.
        """
        if not request.strip():
            raise SlmError("nothing is asked", "type something")
        before = list(self.messages)
        self.messages.append({"role": "user", "content": request})
        try:
            ids = self._ids(max_new_tokens)
            pieces = self._model.pieces(ids, max_new_tokens=max_new_tokens, seed=seed + self._asked, **options)
        except BaseException:
            self.messages = before
            raise
        self._asked += 1
        return self._told(pieces)

    def retry(self, **options: Any) -> Iterator[Piece]:
        """Returns another answer to what was asked last, in place of the one before; see `ask`.

        Raises:
            SlmError: When nothing was asked yet.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SlmError("nothing was asked yet", "type something")
        before = list(self.messages)
        del self.messages[-1]
        request = self.messages.pop()["content"]
        try:
            return self.ask(request, **options)
        except BaseException:
            self.messages = before
            raise

    def _told(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        said = []
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                del self.messages[-1]  # a question that nobody answered: turns alternate

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
