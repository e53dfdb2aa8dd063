"""Drafts from the text itself: where it repeats, several tokens are read in one step and kept as far as they come true.

Speculative decoding (arXiv:2211.17192) with what followed the same words before as the draft (prompt lookup,
arXiv:2304.04487). Nothing is accepted on trust: each token is chosen from the model's own logits, and what was read ahead of a
token that then is not chosen is forgotten. A step of several tokens adds its sums in another order than single steps do:

- float32: logits differ by 1e-5 of their standard deviation, as they do between prompts read in other portions;
- INT8 weights in blocks of at most 64 with INT8 caches: not at all (`OnnxDecoder.steps_alike` says when);
- INT8 otherwise: rounding of activations makes more of it, up to a few tenths of the standard deviation, so that of two
  tokens almost as likely the other may be chosen. Such a text is neither better nor worse, but it is not the same text.

Dimensions: T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError
from slm.runtime.backend import Decoder, DecoderAround, TextSnapshot
from slm.runtime.decoder import OnnxDecoder

Array = NDArray[Any]
_Tokens = TypeVar("_Tokens")

# A longer match says little more than that the text repeats.
_LONGEST_MATCH = 8

# What a step of n tokens costs, in steps of one: measured 1.3, 1.5, 1.9 and 2.7 for 2, 4, 8 and 16 tokens of the INT8
# model of 270M parameters.
_STEP_COST, _TOKEN_COST = 1.2, 0.1

# How soon the estimate of how often drafts come true follows the text, and what a draft must promise: estimates that happen to
# be high are acted on and low ones are not. Counted over stories, source code, JSON and noise: no text loses 1 %.
_FOLLOW, _WORTH = 0.05, 1.1


class Lookup:
    """A text, and what followed its last words where they stood before."""

    def __init__(self, longest: int) -> None:
        self._ids: NDArray[np.int32] = np.empty(longest, np.int32)
        self.length = 0

    @property
    def ids(self) -> NDArray[np.int32]:
        """The tokens so far."""
        return self._ids[: self.length]

    def extend(self, ids: Sequence[int] | NDArray[np.int32]) -> None:
        """Appends tokens."""
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)

    def rewind(self, length: int) -> None:
        """Forgets all but the first tokens."""
        self.length = length

    def draft(self, count: int) -> tuple[list[int], int]:
        """Returns what may follow, and how many of the last tokens stood before it the last time.

        Of the places that end as the text does, it is the one with the longest match, and of these the most recent. A text
        that repeats at a distance shorter than the draft goes on repeating.
        """
        ids = self.ids
        found, matched = np.empty(0, np.int64), 0
        ends = np.flatnonzero(ids[:-1] == ids[-1]) if ids.size else found
        while ends.size:
            found, matched = ends, matched + 1
            if matched == _LONGEST_MATCH:
                break
            ends = ends[ends >= matched]
            ends = ends[ids[ends - matched] == ids[-1 - matched]]
        if not matched:
            return [], 0
        follows = ids[int(found[-1]) + 1 :]
        return follows[np.arange(count) % follows.size].tolist(), matched


class Trust:
    """How often drafts have come true lately, by how long a match they rest on, and how long a draft pays accordingly."""

    def __init__(self) -> None:
        # The longer the match the likelier; after a single token it is barely worth a try.
        self._share = [matched / (matched + 2) for matched in range(_LONGEST_MATCH + 1)]

    def learn(self, matched: int, true: bool) -> None:
        """Counts one drafted token, whether it was read ahead or only thought of."""
        self._share[matched] += _FOLLOW * (true - self._share[matched])

    def length(self, matched: int, longest: int) -> int:
        """Returns the length of draft that gives most tokens for its cost; 0 when single steps give about as many."""
        share, best, best_rate = self._share[matched], 0, _WORTH
        expected, chance = 1.0, 1.0  # tokens that a step yields; chance that the whole draft comes true
        for count in range(1, longest + 1):
            chance *= share
            expected += chance
            rate = expected / (_STEP_COST + _TOKEN_COST * count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


class SpeculativeDecoder(DecoderAround):
    """A decoder that reads ahead where the text repeats; for whoever uses it, it is one like any other.

    Attributes:
        decoder: The one that computes.
        draft_tokens: The longest draft.
        drafted: Tokens read ahead so far.
        accepted: Those that came true.
        steps: Steps that single tokens took, with and without drafts.
    """

    def __init__(self, decoder: Decoder, draft_tokens: int) -> None:
        if draft_tokens < 1:
            raise SlmError(f"draft_tokens is {draft_tokens}; it must be 1 or more")
        super().__init__(decoder)
        self.draft_tokens = draft_tokens
        self.drafted = self.accepted = self.steps = 0
        self._trust = Trust()
        self._text = Lookup(decoder.context)
        self._guess: list[int] = []  # what may follow the text; the first of it may have been read ahead
        self._matched = 0
        self._ahead: list[Array] = []  # logits after each token that was

    @property
    def length(self) -> int:
        """Tokens read since the start, those read ahead left out."""
        return self._text.length

    @property
    def description(self) -> str:
        """What runs where, in a few words."""
        return f"{self.decoder.description}, drafts of up to {self.draft_tokens}"

    @property
    def caveat(self) -> str | None:
        """What to know before drafts are used with this model: None when they leave its text as it is."""
        inner = self.decoder
        if not isinstance(inner, OnnxDecoder) or inner.bundle.manifest.quantization is None or inner.steps_alike:
            return None
        heads = inner.bundle.config.num_attention_heads
        return (
            "with this bundle drafts may choose the other of two tokens almost as likely; not with one from "
            f"slm quantize --int8 --block-size 64 --kv-cache int8 on at most {heads} threads"
        )

    def reset(self) -> None:
        """Forgets everything read."""
        self.decoder.reset()
        self._text.rewind(0)
        self._trust = Trust()  # so that the same prompt gets the same drafts
        self._forget()

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the one that follows."""
        if len(ids) != 1:
            self._settle()
            return self._guarded(self._read, ids)
        (token,) = ids
        true = self._guess[:1] == [token]
        if self._guess:
            self._trust.learn(self._matched, true)
        if not (true and self._ahead):
            self._settle()
            return self._guarded(self._step, token)
        self._text.extend(ids)
        self._guess = self._guess[1:]
        self._ahead, logits = self._ahead[1:], self._ahead[0]
        self.accepted += 1
        return logits

    def _step(self, token: int) -> Array:
        """Reads a token, and ahead of it what may follow, as far as that pays."""
        room = min(self.draft_tokens, self.decoder.revocable - 1)
        if self.length < self.context:  # or the decoder says why not
            self._text.extend([token])
        self._guess, self._matched = self._text.draft(max(1, room))
        count = self._trust.length(self._matched, room) if self._matched else 0
        self.steps += 1
        if not count:
            return self.decoder.read([token])
        self.drafted += count
        logits, *self._ahead = self.decoder.read_each([token, *self._guess[:count]])
        return logits

    def _read(self, ids: Sequence[int]) -> Array:
        logits = self.decoder.read(ids)
        self._text.extend(ids)
        return logits

    def _settle(self) -> None:
        """Forgets what was read ahead."""
        if self._ahead:
            self.decoder.rewind(self.length)
        self._forget()

    def _forget(self) -> None:
        self._guess, self._matched, self._ahead = [], 0, []

    def _guarded(self, read: Callable[[_Tokens], Array], tokens: _Tokens) -> Array:
        """Reads; when it fails, the text is again what the decoder holds: as before, or nothing after a step cut off."""
        before = self.length
        try:
            return read(tokens)
        except BaseException:
            self._text.rewind(before)
            if self.decoder.length != before:
                self.reset()
            self._forget()
            raise

    @property
    def revocable(self) -> int:
        """How many tokens `read_each` may read next so that any number of them can be forgotten again."""
        self._settle()
        return self.decoder.revocable

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) for what follows each of them."""
        self._settle()
        logits = self.decoder.read_each(ids)
        self._text.extend(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens read; see `Decoder.rewind`."""
        self._settle()
        self.decoder.rewind(length)
        self._text.rewind(length)

    def snapshot(self) -> TextSnapshot:
        """Returns a copy of what was read."""
        self._settle()
        return TextSnapshot(self.decoder.snapshot(), self._text.ids.copy())

    def restore(self, snapshot: Any) -> None:
        """Goes back to a snapshot; see `Decoder.restore`."""
        if not isinstance(snapshot, TextSnapshot):
            raise SlmError("the snapshot is not of this decoder", "read the text with this one")
        self.decoder.restore(snapshot.inner)
        self._text.rewind(0)
        self._text.extend(snapshot.ids)
        self._forget()
