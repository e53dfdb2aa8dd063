"""Rows as token ids, divided into the parts that are only read and the parts that are learned.

What the tokenizer puts before a prompt begins every row, so that the model sees the same ids here as when it answers.
What a row says is encoded literally: "<end_of_turn>" typed in a row is only characters, and turns come from the template
alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slm.core.chat import Dialogue, dialogues
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.text.cuts import PieceEncoder
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Tokenizer
from slm.finetune.rows import ChatRow, CompletionRow, Row, TextRow

TURN_TOKENS = (START_OF_TURN, END_OF_TURN)

# Tokens of a part that are shown on either side of the middle that is left out, and parts that are shown.
_SHOWN = 24
_PARTS_SHOWN = 8


@dataclass(frozen=True)
class Example:
    """A row in tokens.

    Attributes:
        ids: All of them.
        spans: From where to where (half-open) they are learned, in order and apart; what stands outside is read. The
            first begins at 1 or later: what begins a text has nothing that predicts it.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def ending(cls, ids: Sequence[int], start: int) -> "Example":
        """Returns a row that is learned from a token on to its end."""
        return cls(tuple(ids), ((start, len(ids)),))

    @property
    def start(self) -> int:
        """The first token that is learned."""
        return self.spans[0][0]

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return sum(end - start for start, end in self.spans)

    def targets(self, token: int) -> bool:
        """Says whether a token is among those that are learned."""
        return any(token in self.ids[start:end] for start, end in self.spans)

    def cut(self, length: int) -> "Example":
        """Returns its beginning, of which perhaps nothing is learned."""
        spans = ((start, min(end, length)) for start, end in self.spans if start < length)
        return Example(self.ids[:length], tuple(spans))


@dataclass(frozen=True)
class Examples:
    """The rows that are left after cutting.

    Attributes:
        kept: In the order of the rows.
        truncated: How many of them lost their end, end-of-text included.
        skipped: How many rows had a prompt so long that nothing to learn was left.
    """

    kept: tuple[Example, ...]
    truncated: int
    skipped: int

    @property
    def trained(self) -> int:
        """Number of tokens that are learned in one epoch."""
        return sum(example.trained for example in self.kept)


class Renderer:
    """Turns rows into ids for one model.

    Raises:
        SlmError: When the model has no token that ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.tokenizer = tokenizer
        self._before = list(tokenizer.prefix_ids)
        end_of_turn = tokenizer.token_id(END_OF_TURN)
        # Gemma lists the end of a turn among its stop tokens; the end of a text is the other one.
        ends = [token for token in config.stop_token_ids if token != end_of_turn]
        end = ends[0] if ends else tokenizer.token_id(END_OF_TEXT)
        if end is None:
            raise SlmError("the base has no token that ends a text", f"its tokenizer needs {END_OF_TEXT}")
        self.end_of_text: int = end
        self._ends = {end, *config.stop_token_ids} | ({end_of_turn} if end_of_turn is not None else set())

        self._besides = tokenizer.lengthy(self._ends) - tokenizer.control_ids

    def turn_token_ids(self) -> list[int]:
        """Returns the ids of the tokens that begin and end a turn, those that the tokenizer has."""
        ids = (self.tokenizer.token_id(token) for token in TURN_TOKENS)
        return [token_id for token_id in ids if token_id is not None]

    def example(self, row: Row) -> Example:
        """Returns a row in full length.

        Raises:
            SlmError: When the model knows no turns, or its own template refuses the conversation.
        """
        (example,) = self._full([row])
        if isinstance(example, SlmError):
            raise example
        return example

    def examples(self, rows: Sequence[Row], max_length: int, bad: list[SlmError] | None = None) -> Examples:
        """Returns the rows cut to `max_length` tokens; a row of which nothing to learn is left is skipped.

        Args:
            rows: What was read.
            max_length: Tokens of the longest.
            bad: Takes what the model's own chat template says of conversations that it refuses, which are then left
                out; None makes the first of them an error.

        Raises:
            SlmError: See `bad`; it names the row.
        """
        kept, truncated, skipped = [], 0, 0
        for row, full in zip(rows, self._full(rows), strict=True):
            if isinstance(full, SlmError):
                error = SlmError(f"{row.place}: {full.message}", full.hint)
                if bad is None:
                    raise error
                bad.append(error)
                continue
            cut = full.cut(max_length)
            if not cut.trained:
                skipped += 1
                continue
            truncated += len(cut.ids) < len(full.ids)
            kept.append(cut)
        return Examples(tuple(kept), truncated, skipped)

    def _full(self, rows: Sequence[Row]) -> Iterator[Example | SlmError]:
        literal = PieceEncoder(self.tokenizer, self._besides).encode
        conversations = [row.messages for row in rows if isinstance(row, ChatRow)]
        in_turns = dialogues(self.tokenizer, conversations, self._ends)
        for row in rows:
            match row:
                case ChatRow():
                    dialogue = next(in_turns)
                    yield dialogue if isinstance(dialogue, SlmError) else self._answered(dialogue, _learned(row))
                case CompletionRow():
                    read = self._before + literal(row.prompt)
                    yield self._ended(read, literal(row.completion))
                case TextRow():
                    yield self._ended(self._before, literal(row.text))

    def _ended(self, read: list[int], learned: list[int]) -> Example:
        # Without anything before it the first token of all cannot be predicted.
        return Example.ending((*read, *learned, self.end_of_text), max(1, len(read)))

    def _answered(self, dialogue: Dialogue, learned: Sequence[bool]) -> Example:
        """Returns a conversation; the end of the last answer is followed by the end of the text, learned too.

        Args:
            dialogue: Up to its last answer, which is learned.
            learned: Of each answer, whether it is.
        """
        answers = [span for span, learn in zip(dialogue.answers, learned, strict=True) if learn]
        if dialogue.ids[-1] == self.end_of_text:
            return Example(dialogue.ids, tuple(answers))
        *answers, (start, end) = answers
        return Example((*dialogue.ids, self.end_of_text), (*answers, (start, end + 1)))

    def preview(self, example: Example) -> list[tuple[bool, str]]:
        """Returns the parts of an example: whether each is learned, and its tokens, for a person to check."""
        parts, place = [], 0
        for start, end in example.spans:
            if start > place:
                parts.append((False, self._spelt(example.ids[place:start])))
            parts.append((True, self._spelt(example.ids[start:end])))
            place = end
        if len(parts) > _PARTS_SHOWN:
            half = _PARTS_SHOWN // 2
            left_out = (False, f"({len(parts) - 2 * half} more parts)")
            parts = [*parts[:half], left_out, *parts[-half:]]
        return parts

    def _spelt(self, ids: Sequence[int]) -> str:
        texts = [repr(self.tokenizer.backend.decode([token], skip_special_tokens=False))[1:-1] for token in ids]
        if len(texts) > 2 * _SHOWN:
            texts = [*texts[:_SHOWN], f"({len(texts) - 2 * _SHOWN} more)", *texts[-_SHOWN:]]
        return "|".join(texts)


def _learned(row: ChatRow) -> list[bool]:
    """Returns of each of a conversation's answers whether it is learned."""
    return [
        number not in row.only_read for number, message in enumerate(row.messages) if message["role"] == "assistant"
    ]
