"""Rows as token ids, divided into the part that is only read and the part that is learned.

What the tokenizer puts before a prompt begins every row, so that the model sees the same ids here as when it answers.
What the user wrote is encoded literally: "<end_of_turn>" typed in a row is only characters, and real turns come from
the template alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slm.core.chat import instruction_request, turn_ids
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, Tokenizer
from slm.finetune.rows import CompletionRow, InstructionRow, Row, TextRow

TURN_TOKENS = (START_OF_TURN, END_OF_TURN)

# Tokens of the first row that are shown on either side of the middle that is left out.
_SHOWN = 24


@dataclass(frozen=True)
class Example:
    """A row in tokens: `ids[start:]` are learned, what stands before is read. `start` is at least 1."""

    ids: tuple[int, ...]
    start: int

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return len(self.ids) - self.start


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
        self._before = tokenizer.encode("")
        end_of_turn = tokenizer.token_id(END_OF_TURN)
        # Gemma lists the end of a turn among its stop tokens; the end of a text is the other one.
        ends = [token for token in config.stop_token_ids if token != end_of_turn]
        end = ends[0] if ends else tokenizer.token_id(END_OF_TEXT)
        if end is None:
            raise SlmError("the base has no token that ends a text", f"its tokenizer needs {END_OF_TEXT}")
        self.end_of_text: int = end

    def turn_token_ids(self) -> list[int]:
        """Returns the ids of the tokens that begin and end a turn.

        Raises:
            SlmError: When the tokenizer lacks one.
        """
        ids = {token: self.tokenizer.token_id(token) for token in TURN_TOKENS}
        for token, token_id in ids.items():
            if token_id is None:
                raise SlmError(
                    f"the base's tokenizer has no {token}", "instruction rows need it; use prompt/completion rows"
                )
        return [token_id for token_id in ids.values() if token_id is not None]

    def example(self, row: Row) -> Example:
        """Returns a row in full length."""
        literal = self.tokenizer.encode_literal
        match row:
            case InstructionRow():
                read = turn_ids(self.tokenizer, instruction_request(row.instruction, row.input))
                # The template trims what is said, so that is what the model meets in a conversation's earlier turns.
                learned = [*literal(row.output.strip()), self.turn_token_ids()[1], self.end_of_text]
            case CompletionRow():
                read = self._before + literal(row.prompt)
                learned = [*literal(row.completion), self.end_of_text]
            case TextRow():
                read = self._before
                learned = [*literal(row.text), self.end_of_text]
        # Without anything before it the first token of all cannot be predicted.
        return Example(tuple(read + learned), max(1, len(read)))

    def examples(self, rows: Sequence[Row], max_length: int) -> Examples:
        """Returns the rows cut to `max_length` tokens; a row of which nothing to learn is left is skipped."""
        full = [self.example(row) for row in rows]
        cut = [Example(example.ids[:max_length], example.start) for example in full]
        kept = tuple(example for example in cut if example.trained > 0)
        truncated = sum(len(a.ids) < len(b.ids) and a.trained > 0 for a, b in zip(cut, full, strict=True))
        return Examples(kept, truncated, skipped=len(full) - len(kept))

    def preview(self, example: Example) -> tuple[str, str]:
        """Returns the tokens that are read and those that are learned, for a person to check."""
        return self._spelt(example.ids[: example.start]), self._spelt(example.ids[example.start :])

    def _spelt(self, ids: Sequence[int]) -> str:
        texts = [repr(self.tokenizer.backend.decode([token], skip_special_tokens=False))[1:-1] for token in ids]
        if len(texts) > 2 * _SHOWN:
            texts = [*texts[:_SHOWN], f"({len(texts) - 2 * _SHOWN} more)", *texts[-_SHOWN:]]
        return "|".join(texts)
