"""Encoding of long texts in pieces, with the ids of the whole text."""

import json
import re
from collections.abc import Iterator

from slm.core.tokenizer import Tokenizer

# Longer texts are encoded in pieces of this many characters: the tokenizers library needs up to 130 bytes per character.
_PIECE_CHARACTERS = 256 << 10

# GPT-2's pattern (Radford et al. 2019), as built into the tokenizers library, and in tiktoken's spelling.
_GPT2_PATTERNS = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
)
# A place where that pattern always cuts: before white space that follows something else.
CUT = re.compile(r"(?<=\S)[ \t\n\r]")


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer always cuts before white space that follows something else."""
    rules = json.loads(tokenizer.backend.to_str())
    splitter = rules["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *before, last = steps
    by_pattern = [step.get("pattern") for step in before]
    ours = [{"Regex": pattern} for pattern in _GPT2_PATTERNS]
    return (
        rules["model"]["type"] == "BPE"
        and not rules["model"].get("dropout")
        and rules["normalizer"] is None
        and all(
            token["special"] for token in rules["added_tokens"]
        )  # other added tokens are matched before anything is cut
        and last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and (last["use_regex"] or bool(before))
        and all(step.get("type") == "Split" and step["behavior"] == "Isolated" for step in before)
        and all(pattern in ours for pattern in by_pattern)
    )


def pieces(document: str, characters: int | None = None) -> Iterator[str]:
    """Cuts a long text at the first possible place after each `characters` characters.

    For a tokenizer that satisfies `cuts_at_spaces`, the pieces have the ids of the text.
    """
    start, characters = 0, characters or _PIECE_CHARACTERS
    while len(document) - start > characters:
        cut = CUT.search(document, start + characters)
        if cut is None:
            break
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]


class PieceEncoder:
    """Encodes texts literally, special tokens as plain characters, in memory that does not grow with their length.

    Args:
        tokenizer: The tokenizer; if it does not cut at spaces, texts are encoded whole.
        besides: Further control tokens that `encode` must not produce.
    """

    def __init__(self, tokenizer: Tokenizer, besides: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._besides = tokenizer, besides
        self._cuts: bool | None = None  # determined at the first long text

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, equal to those of `Tokenizer.encode_literal`."""
        if len(text) <= _PIECE_CHARACTERS:
            return self._tokenizer.encode_literal(text, self._besides)
        if self._cuts is None:
            self._cuts = cuts_at_spaces(self._tokenizer)
        parts = pieces(text) if self._cuts else (text,)
        return [token for part in parts for token in self._tokenizer.encode_literal(part, self._besides)]

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text; short ones are encoded together, on all cores."""
        if any(len(text) > _PIECE_CHARACTERS for text in texts):
            return [self.encode(text) for text in texts]
        return self._tokenizer.encode_documents(texts)
