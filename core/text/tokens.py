"""The first tokens of a text, for measurements on a small part of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slm.core.text.cuts import PieceEncoder
from slm.core.text.documents import TEXT_COLUMN, Beginning, read_parts, text_files
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.tokenizer import Tokenizer

# Characters per needed token that are encoded of a document: far more than a token has on average.
_CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True)
class TextSource:
    """Text to read tokens from.

    Attributes:
        path: A file or directory; see `slm.core.text.files`.
        column: Name of the field that holds the text, in rows.
        limit: Maximum UTF-8 bytes of a row.
    """

    path: Path
    column: str = TEXT_COLUMN
    limit: int = DOCUMENT_BYTES

    def first_tokens(self, tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
        """Yields the ids of documents until there are enough tokens; the last document may exceed the number.

        Args:
            tokenizer: The tokenizer; special tokens in the text are encoded as plain characters.
            tokens: Number of tokens.

        Raises:
            SlmError: When the text cannot be read.
        """
        literal = PieceEncoder(tokenizer)
        count = 0
        for document in self._beginnings(_CHARACTERS_A_TOKEN * tokens):
            ids = literal.encode(document)
            yield ids
            count += len(ids)
            if count >= tokens:
                return

    def _beginnings(self, characters: int) -> Iterator[str]:
        for file in text_files([self.path]):
            goes_on = False
            for part in read_parts(file, self.column, self.limit):
                if not goes_on:
                    yield str(part[:characters])
                goes_on = isinstance(part, Beginning)
