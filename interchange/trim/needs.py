"""Which tokens must stay so that a tokenizer splits a text as before.

BPE merges the pair of the lowest rank until no pair has a merge. If every merge that occurs in a text stays, the text is merged
as before: at each step the merge of the lowest rank is still there, and no merge was added. No merge inside a token crosses the
token's ends, so the merges of a token are those of its spelling. A token therefore needs every token that is made while its
spelling is merged.

Unigram takes the path of the best score, and WordPiece the longest match. A token that is not in the result can leave without
changing it, so tokens need nothing but themselves.
"""

import heapq
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from slm.core.errors import SlmError

_SHIFT = 32
_HINT = "slm trim supports BPE without prefixes and suffixes of words, Unigram, WordPiece and WordLevel"


def byte_token(byte: int) -> str:
    """Returns the spelling of the token of a byte in a vocabulary with byte fallback."""
    return f"<0x{byte:02X}>"


class Needs:
    """The tokens of a model and what each of them needs.

    Attributes:
        kind: The type of the model: "BPE", "Unigram", "WordPiece" or "WordLevel".
        ids: The id of each token.
        byte_fallback: Whether characters without a token become tokens of their bytes.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Reads the model of a `tokenizer.json`.

        Raises:
            SlmError: If tokens cannot leave this kind of model without other effects.
        """
        self.kind = str(model["type"])
        affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if self.kind not in ("BPE", "Unigram", "WordPiece", "WordLevel") or (self.kind == "BPE" and affixes):
            what = f"a BPE with {affixes[0]}" if affixes else f"the model {self.kind}"
            raise SlmError(f"cannot trim this tokenizer: {what} is not supported", _HINT)
        vocabulary = model["vocab"]
        self.ids: dict[str, int] = (
            {token: i for i, (token, _) in enumerate(vocabulary)} if self.kind == "Unigram" else dict(vocabulary)
        )
        self.byte_fallback = bool(model.get("byte_fallback")) and all(
            byte_token(byte) in self.ids for byte in range(256)
        )
        self._model = model

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The spelling of each id."""
        return {i: token for token, i in self.ids.items()}

    @cached_property
    def basic(self) -> frozenset[int]:
        """The tokens that always stay: bytes, characters, the unknown token, and the worst score of a Unigram model.

        Without byte fallback every character stays, because its text would become the unknown token. With byte fallback those
        of ASCII stay. The worst score of a Unigram model is the reference for the score of unknown characters.
        """
        model = self._model
        unknown = model.get("unk_token")
        found = {self.ids[unknown]} if isinstance(unknown, str) and unknown in self.ids else set()
        if isinstance(model.get("unk_id"), int):
            found.add(model["unk_id"])
        if self.byte_fallback:
            found |= {self.ids[byte_token(byte)] for byte in range(256)}
        prefix = str(model.get("continuing_subword_prefix") or "")
        for token, i in self.ids.items():
            bare = token.removeprefix(prefix) if prefix and token != prefix else token
            if len(bare) == 1 and (not self.byte_fallback or bare.isascii() or bare == "▁"):
                found.add(i)
        if self.kind == "Unigram":
            found.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
        return frozenset(found)

    @cached_property
    def _merges(self) -> dict[int, tuple[int, int]]:
        """The rank and product of each pair of ids."""
        merges: dict[int, tuple[int, int]] = {}
        for rank, merge in enumerate(self._model["merges"]):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            pair = self.ids[left] << _SHIFT | self.ids[right]
            merges.setdefault(pair, (rank, self.ids[left + right]))
        return merges

    def of(self, token: int) -> frozenset[int]:
        """Returns the tokens that a token needs, itself included."""
        if self.kind != "BPE" or token not in self.tokens:
            return frozenset((token,))
        made, result = self._merged(self.tokens[token])
        # A token that merges do not make is found as a whole: an added token, or a word with `ignore_merges`.
        return frozenset(made) if result == [token] else frozenset((token,))

    def is_made(self, token: int) -> bool:
        """Returns whether the tokenizer makes this token of text, other than as an added token."""
        if self.kind != "BPE":
            return True
        return self._merged(self.tokens[token])[1] == [token]

    def _merged(self, text: str) -> tuple[set[int], list[int]]:
        """Returns all tokens that exist while a text is merged, and those at the end."""
        symbols: list[int] = []
        for character in text:
            if character in self.ids:
                symbols.append(self.ids[character])
            elif self.byte_fallback:
                symbols += [self.ids[byte_token(byte)] for byte in character.encode("utf-8", "surrogatepass")]
            else:
                return set(), []
        made, merges = set(symbols), self._merges
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        gone = [False] * len(symbols)
        queue: list[tuple[int, int, int]] = []

        def look(at: int) -> None:
            if at >= 0 and after[at] >= 0:
                found = merges.get(symbols[at] << _SHIFT | symbols[after[at]])
                if found is not None:
                    heapq.heappush(queue, (found[0], at, found[1]))

        for at in range(len(symbols)):
            look(at)
        while queue:
            rank, at, product = heapq.heappop(queue)
            if gone[at] or after[at] < 0:
                continue
            right = after[at]
            if merges.get(symbols[at] << _SHIFT | symbols[right]) != (rank, product):
                continue  # one of the two was merged with another in the meantime
            symbols[at], gone[right], after[at] = product, True, after[right]
            if after[at] >= 0:
                before[after[at]] = at
            made.add(product)
            look(before[at])
            look(at)
        return made, [symbol for symbol, left in zip(symbols, gone, strict=True) if not left]
