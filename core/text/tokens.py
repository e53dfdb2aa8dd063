"""The first tokens of a text, for what measures a model on a little of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slm.core.text.cuts import PieceEncoder
from slm.core.text.documents import TEXT_COLUMN, Beginning, read_parts, text_files
from slm.core.text.streams import DOCUMENT_BYTES
from slm.core.tokenizer import Tokenizer

# No more of a document is encoded: far more characters than a token stands for on average.
_CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True)
class TextSource:
    """Text to read tokens from.

    Attributes:
        path: A file or directory; see `slm.core.text.files`.
        column: What the text is called in rows.
        limit: Bytes of UTF-8 that a row may have.
    """

    path: Path
    column: str = TEXT_COLUMN
    limit: int = DOCUMENT_BYTES

    def first_tokens(self, tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
        """Yields the ids of documents, one after the other, until there are enough; the last may have more.

        Args:
            tokenizer: Special tokens spelt in the text are only characters to it.
            tokens: How many are enough.

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
