"""Encoding at scale: a tokenizer with a cache of words.

The tokenizers library spends most of its time splitting text by GPT-2's pattern, and words repeat. Text is therefore cut at
places where the pattern always cuts, and the ids of the words between are looked up; only new words go through the library.
The pattern always cuts before a space that is followed by something else than white space, because it attaches the space to
what follows, and before white space that is preceded by something else. The ids equal those of `Tokenizer.encode_literal`.
This holds only for byte-level BPE with GPT-2's pattern, which is what slm makes; with any other tokenizer whole documents go
through the library.
"""

import re
from collections.abc import Sequence

import numpy as np

from slm.core.text.cuts import cuts_at_spaces
from slm.core.tokenizer import END_OF_TEXT, Tokenizer
from slm.train.data.tokens import dtype_name, little_endian

# Size of the cache in characters of words; with Python's objects it takes about ten times as many bytes.
_MEMORY_CHARACTERS = 4 << 20

# White space and what follows it, up to the next ASCII white space. Python's \s covers all white space of the pattern and four
# control characters more, which only make words longer here.
_WORD = re.compile(r"\s*\S+(?:[^\S \t\n\r]\s*\S*)*|\s+")
# A space followed only by white space: looking up words by the spaces between them would be wrong there.
_UNEVEN = re.compile(r" (?:\s|\Z)")


class Encoder:
    """Encodes pieces of documents into the bytes that a token file holds.

    Args:
        tokenizer: The tokenizer; special tokens spelled in a text are encoded as plain characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = little_endian(dtype_name(tokenizer))
        self._cuts = cuts_at_spaces(tokenizer)
        self._ids: dict[str, bytes] = {}  # ids of a word as it stands
        self._ids_after_space: dict[str, bytes] = {}  # ids of a word with a space before it, which the key leaves out
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Returns the ids of each text, in the stored type."""
        if not self._cuts:
            return self._encode(texts)
        if self._characters > _MEMORY_CHARACTERS:
            self._ids.clear()
            self._ids_after_space.clear()
            self._characters = 0
        encoded: list[bytes] = []
        unknown: list[int] = []
        for index, text in enumerate(texts):
            try:
                encoded.append(self._look_up(text))
            except KeyError:
                encoded.append(b"")
                unknown.append(index)
        uneven = {index for index in unknown if _UNEVEN.search(texts[index])}
        self._learn([texts[i] for i in unknown if i not in uneven], [texts[i] for i in uneven])
        for index in unknown:
            text = texts[index]
            encoded[index] = self._look_up_words(text) if index in uneven else self._look_up(text)
        return encoded

    def _look_up(self, text: str) -> bytes:
        # In an uneven text a word is empty or begins with white space. No key does, so the lookup raises a KeyError.
        first, *words = text.split(" ")
        return self._ids[first] + b"".join(map(self._ids_after_space.__getitem__, words))

    def _look_up_words(self, text: str) -> bytes:
        return b"".join(map(self._ids.__getitem__, _WORD.findall(text)))

    def _learn(self, even: Sequence[str], uneven: Sequence[str]) -> None:
        """Encodes the words that are not in the cache."""
        as_they_stand: set[str] = set()
        after_space: set[str] = set()
        for text in even:
            first, *words = text.split(" ")
            as_they_stand.add(first)
            after_space.update(words)
        for text in uneven:
            as_they_stand.update(_WORD.findall(text))
        as_they_stand.difference_update(self._ids)
        after_space.difference_update(self._ids_after_space)
        new, spaced = list(as_they_stand), list(after_space)
        ids = self._encode([*new, *(f" {word}" for word in spaced)])
        self._ids.update(zip(new, ids, strict=False))  # the first part of the ids
        self._ids_after_space.update(zip(spaced, ids[len(new) :], strict=True))
        self._characters += sum(map(len, new)) + sum(map(len, spaced))

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, dtype=self._dtype).tobytes() for ids in self._tokenizer.encode_documents(texts)]


def end_of_text(tokenizer: Tokenizer) -> bytes:
    """Returns the end-of-text token in the stored type."""
    return np.array(tokenizer.token_id(END_OF_TEXT), dtype=little_endian(dtype_name(tokenizer))).tobytes()
