"""Rows as token ids, with the spans that count in the loss.

Every row begins with the tokens that the tokenizer puts before a prompt, so that the model sees the same ids as in inference.
Text of rows is encoded literally: "<end_of_turn>" in a row is plain characters, and only the template makes turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slm.core.chat import Dialogue, call_ends, dialogues
from slm.core.errors import SlmError
from slm.core.text.cuts import PieceEncoder
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Tokenizer
from slm.finetune.rows import ChatRow, CompletionRow, PreferenceRow, Row, TextRow

TURN_TOKENS = (START_OF_TURN, END_OF_TURN)

# A preview shows this many tokens at each end of a part, and this many parts.
_SHOWN = 24
_PARTS_SHOWN = 8


@dataclass(frozen=True)
class Example:
    """A row in tokens.

    Attributes:
        ids: The token ids.
        spans: Half-open ranges of tokens that count in the loss, in order and not adjacent. The first begins at 1 or later,
            because nothing predicts the first token.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def ending(cls, ids: Sequence[int], start: int) -> "Example":
        """Returns an example whose loss covers all tokens from a position on."""
        return cls(tuple(ids), ((start, len(ids)),))

    @property
    def start(self) -> int:
        """The first position that counts in the loss."""
        return self.spans[0][0]

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(end - start for start, end in self.spans)

    def targets(self, token: int) -> bool:
        """Returns whether a token id is among those that count in the loss."""
        return any(token in self.ids[start:end] for start, end in self.spans)

    def cut(self, length: int) -> "Example":
        """Returns the first tokens, of which possibly none counts in the loss."""
        spans = ((start, min(end, length)) for start, end in self.spans if start < length)
        return Example(self.ids[:length], tuple(spans))


@dataclass(frozen=True)
class Examples:
    """Examples cut to a maximum length.

    Attributes:
        kept: The examples, in the order of the rows.
        truncated: Number of examples that lost their end, including end-of-text.
        skipped: Number of rows whose prompt left no room for an answer.
    """

    kept: tuple[Example, ...]
    truncated: int
    skipped: int

    @property
    def trained(self) -> int:
        """Number of tokens per epoch that count in the loss."""
        return sum(example.trained for example in self.kept)


class _Stops(Protocol):
    """A model or its configuration, of which the tokens that end a text are needed."""

    @property
    def stop_token_ids(self) -> Sequence[int]:
        """The tokens that end a text."""


class Renderer:
    """Converts rows to token ids for a model.

    Attributes:
        tokenizer: The model's tokenizer.
        end_of_text: The token that ends a text.
        ends: All tokens that end an answer.

    Raises:
        SlmError: When the model has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, config: _Stops) -> None:
        self.tokenizer = tokenizer
        self._before = list(tokenizer.prefix_ids)
        end_of_turn = tokenizer.token_id(END_OF_TURN)
        # Gemma lists the end of a turn among its stop tokens; end-of-text is the other one.
        ends = [token for token in config.stop_token_ids if token != end_of_turn]
        end = ends[0] if ends else tokenizer.token_id(END_OF_TEXT)
        if end is None:
            raise SlmError("the base has no token that ends a text", f"its tokenizer needs {END_OF_TEXT}")
        self.end_of_text: int = end
        turn_ends = {end, *config.stop_token_ids} | ({end_of_turn} if end_of_turn is not None else set())
        self.ends = frozenset(turn_ends | call_ends(tokenizer))
        self._besides = tokenizer.lengthy(self.ends) - tokenizer.control_ids

    def turn_token_ids(self) -> list[int]:
        """Returns the ids of the tokens that begin and end a turn, as far as the tokenizer has them."""
        ids = (self.tokenizer.token_id(token) for token in TURN_TOKENS)
        return [token_id for token_id in ids if token_id is not None]

    def example(self, row: Row) -> Example:
        """Returns the uncut example of a row.

        Raises:
            SlmError: When the model has no turn tokens, or its chat template rejects the conversation.
        """
        (example,) = self.uncut([row])
        if isinstance(example, SlmError):
            raise example
        return example

    def examples(self, rows: Sequence[Row], max_length: int, bad: list[SlmError] | None = None) -> Examples:
        """Returns examples cut to `max_length` tokens; skips rows of which no label is left.

        Args:
            rows: The rows.
            max_length: Maximum number of tokens.
            bad: Receives the errors of conversations that the chat template rejects, which are then left out; None raises
                the first one.

        Raises:
            SlmError: See `bad`; the message names the row.
        """
        found = [(full, full.cut(max_length)) for full in self._rendered(rows, bad) if full is not None]
        kept = [(full, cut) for full, cut in found if cut.trained]
        truncated = sum(len(cut.ids) < len(full.ids) for full, cut in kept)
        return Examples(tuple(cut for _, cut in kept), truncated, len(found) - len(kept))

    def pairs(
        self, rows: Sequence[PreferenceRow], max_length: int, bad: list[SlmError] | None = None
    ) -> tuple[Examples, tuple[tuple[Example, Example], ...]]:
        """Returns the preferred answers as examples, and each with the rejected answer; see `examples`.

        A pair is left out if one of the two cannot be rendered, or is cut before its answer.
        """
        chosen = self._rendered([row.chosen for row in rows], bad)
        left = [(row, example) for row, example in zip(rows, chosen, strict=True) if example is not None]
        rejected = self._rendered([row.rejected for row, _ in left], bad)
        found = [(a, b) for (_, a), b in zip(left, rejected, strict=True) if b is not None]
        cut = [(a.cut(max_length), b.cut(max_length)) for a, b in found]
        kept = tuple(pair for pair in cut if pair[0].trained and pair[1].trained)
        whole = sum(len(a.ids) <= max_length and len(b.ids) <= max_length for a, b in found)
        return Examples(tuple(a for a, _ in kept), len(cut) - whole, len(cut) - len(kept)), kept

    def _rendered(self, rows: Sequence[Row], bad: list[SlmError] | None) -> list[Example | None]:
        """Returns the uncut example of each row, or None for a conversation that the template rejects; see `examples`."""
        found: list[Example | None] = []
        for row, full in zip(rows, self.uncut(rows), strict=True):
            if isinstance(full, SlmError):
                error = SlmError(f"{row.place}: {full.message}", full.hint)
                if bad is None:
                    raise error
                bad.append(error)
                found.append(None)
            else:
                found.append(full)
        return found

    def uncut(self, rows: Sequence[Row]) -> Iterator[Example | SlmError]:
        """Yields the uncut example of each row, or an error without a place if its chat template rejects the conversation.

        Raises:
            SlmError: When the model has no turn tokens.
        """
        literal = PieceEncoder(self.tokenizer, self._besides).encode
        chats = [row for row in rows if isinstance(row, ChatRow)]
        declared = [row.tools for row in chats]
        in_turns = dialogues(self.tokenizer, [row.messages for row in chats], self.ends, declared)
        for row in rows:
            match row:
                case ChatRow():
                    dialogue = next(in_turns)
                    if isinstance(dialogue, SlmError):
                        yield dialogue
                    else:
                        yield self._complete(self._answered(dialogue, _learned(row)), row.unended)
                case CompletionRow():
                    read = self._before + literal(row.prompt)
                    yield self._complete(self._ended(read, literal(row.completion)), row.unended)
                case TextRow():
                    yield self._ended(self._before, literal(row.text))
                case PreferenceRow():
                    raise AssertionError("pairs are rendered answer by answer")

    def _complete(self, example: Example, unended: bool) -> Example:
        """Returns an example, without the tokens that end its last answer if that answer was cut."""
        length = len(example.ids)
        while unended and length > example.spans[-1][0] and example.ids[length - 1] in self.ends:
            length -= 1
        return example.cut(length)

    def _ended(self, read: list[int], learned: list[int]) -> Example:
        # The first token cannot be predicted, because nothing precedes it.
        return Example.ending((*read, *learned, self.end_of_text), max(1, len(read)))

    def _answered(self, dialogue: Dialogue, learned: Sequence[bool]) -> Example:
        """Returns the example of a conversation, which ends with end-of-text; that token counts in the loss too.

        Args:
            dialogue: The conversation up to its last answer, which counts in the loss.
            learned: Whether each answer counts in the loss.
        """
        answers = [span for span, learn in zip(dialogue.answers, learned, strict=True) if learn]
        if dialogue.ids[-1] == self.end_of_text:
            return Example(dialogue.ids, tuple(answers))
        *answers, (start, end) = answers
        return Example((*dialogue.ids, self.end_of_text), (*answers, (start, end + 1)))

    def preview(self, example: Example) -> list[tuple[bool, str]]:
        """Returns a readable preview of an example: its parts, and whether each counts in the loss."""
        parts, place = [], 0
        for start, end in example.spans:
            if start > place:
                parts.append((False, self.spelt(example.ids[place:start])))
            parts.append((True, self.spelt(example.ids[start:end])))
            place = end
        if len(parts) > _PARTS_SHOWN:
            half = _PARTS_SHOWN // 2
            left_out = (False, f"({len(parts) - 2 * half} more parts)")
            parts = [*parts[:half], left_out, *parts[-half:]]
        return parts

    def spelt(self, ids: Sequence[int]) -> str:
        """Returns the tokens' texts, separated by bars; of many tokens only the first and the last."""
        texts = [repr(self.tokenizer.backend.decode([token], skip_special_tokens=False))[1:-1] for token in ids]
        if len(texts) > 2 * _SHOWN:
            texts = [*texts[:_SHOWN], f"({len(texts) - 2 * _SHOWN} more)", *texts[-_SHOWN:]]
        return "|".join(texts)


def _learned(row: ChatRow) -> list[bool]:
    """Returns whether each answer of a conversation counts in the loss."""
    return [
        number not in row.only_read for number, message in enumerate(row.messages) if message["role"] == "assistant"
    ]
