"""The bytes of text that each token represents, even if a token is only part of a character."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders, pre_tokenizers

from slm.core.tokenizer import Tokenizer

# Text that tokenizers may change: case, composed and wide characters, runs of spaces, a space put in front.
_PROBE = "Once  upon\n\n a\ttime, é e\u0301 Å ﬁ ＡＢ 🦊 ４２ \u00a0 end. "
# The spelling of a single byte in a byte-fallback vocabulary.
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Returns the byte of each character of a byte-level vocabulary (the inverse of GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """The bytes that each token of a vocabulary adds to a text.

    Covers byte-level, byte-fallback and metaspace vocabularies exactly. Other decoders do not work token by token: there the
    bytes of a token are those of the text that it decodes to.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._steps = _steps_of(tokenizer)
        self._drops_space = tokenizer.backend.decoder is not None and _drops_space(tokenizer.backend.decoder)
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """Returns a token's bytes: for a special token those of its spelling, for an id without a token none."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes_of(token)
        return found

    def at(self, token: int, first: bool) -> bytes:
        """Returns a token's bytes at its position: some decoders drop the space of the first token of a text."""
        spelt = self[token]
        return spelt.removeprefix(b" ") if first and self._drops_space and not self.is_special(token) else spelt

    @cached_property
    def longest(self) -> int:
        """The most characters of a token."""
        return max(map(len, self._tokenizer.backend.get_vocab(with_added_tokens=True)))

    def is_special(self, token: int) -> bool:
        """Returns whether a token is not part of the text."""
        return token in self._special

    def _bytes_of(self, token: int) -> bytes:
        spelling = self._tokenizer.backend.id_to_token(token)
        if spelling is None:
            return b""
        if token in self._special:
            return spelling.encode()
        if self._steps is None:
            return self._tokenizer.text_of(token).encode()
        for step in self._steps:
            done = step(spelling)
            if isinstance(done, bytes):
                return done
            spelling = done
        return spelling.encode()


_known: "WeakKeyDictionary[Tokenizer, TokenBytes]" = WeakKeyDictionary()


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Returns the bytes of a tokenizer's tokens. The table is cached per tokenizer."""
    if tokenizer not in _known:
        _known[tokenizer] = TokenBytes(tokenizer)
    return _known[tokenizer]


_Step = Callable[[str], str | bytes]


def _steps_of(tokenizer: Tokenizer) -> list[_Step] | None:
    """Returns the steps that a tokenizer's decoder applies to each token; None if it does not work token by token."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return None
    steps: list[_Step] = []
    for said in _flat(json.loads(decoder.__getstate__())):
        step = _step_of(said)
        if step is None:
            return None
        steps.append(step)
    return steps


def _drops_space(decoder: Any) -> bool:
    return bool(decoder.decode(["▁x"]) == "x")


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _flat(each)
    elif decoder["type"] not in ("Fuse", "Strip"):  # these join tokens, or trim the ends of the whole text
        yield decoder


def _step_of(decoder: dict[str, Any]) -> _Step | None:
    kind = decoder["type"]
    if kind == "ByteLevel":
        return _from_byte_level
    if kind == "ByteFallback":
        return _from_byte_fallback
    if kind == "Metaspace":
        return _replacing(decoder["replacement"], " ")
    if kind == "Replace" and "String" in decoder["pattern"]:
        return _replacing(decoder["pattern"]["String"], decoder["content"])
    return None


def _from_byte_level(spelling: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in spelling)
    except KeyError:  # an added token is spelled literally
        return spelling.encode()


def _from_byte_fallback(spelling: str) -> str | bytes:
    byte = _BYTE.fullmatch(spelling)
    return spelling if byte is None else bytes([int(byte[1], 16)])


def _replacing(old: str, new: str) -> _Step:
    return lambda spelling: spelling.replace(old, new)


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """Returns the number of UTF-8 bytes of each token id, 0 for special tokens.

    Returns None if tokens have no bytes of their own. A byte-level vocabulary spells every byte of a text. Others
    (SentencePiece's, with a mark for spaces), and tokenizers that normalize text, do not preserve it.
    """
    backend = tokenizer.backend
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True).values()
    sizes = np.zeros(1 + max(vocabulary), np.int64)
    table = token_bytes(tokenizer)
    for token in vocabulary:
        sizes[token] = 0 if token in tokenizer.special_ids else len(table[token])
    return sizes if _spells(tokenizer) else None


def _spells(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokens of a test text with difficult characters spell its bytes, one after the other."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spelt = [tokenizer.backend.id_to_token(i) or "" for i in tokenizer.encode_literal(_PROBE)]
    return set("".join(spelt)) <= alphabet and decoders.ByteLevel().decode(spelt) == _PROBE
