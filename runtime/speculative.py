"""Prompt-lookup decoding: where the text repeats, several tokens are read in one step, and the correct ones are kept.

This is speculative decoding (arXiv:2211.17192) whose draft is the continuation of an earlier occurrence of the last tokens
(prompt lookup, arXiv:2304.04487). Each token is chosen from the model's own logits; if it differs from the draft, the tokens
read ahead are rewound. A step of several tokens sums in another order than single-token steps:

- float32: logits differ by 1e-5 of their standard deviation, as they do between prompts read in other portions;
- INT8 weights in blocks of at most 64 with INT8 caches: no difference (`OnnxDecoder.steps_alike` states when);
- INT8 otherwise: rounding of activations amplifies the difference to a few tenths of the standard deviation, so that the
choice
  between two almost equally likely tokens can change. The text is of equal quality, but not the same.

Dimensions: T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slm.core.contract import FEW_TOKENS
from slm.core.errors import SlmError
from slm.runtime.backend import Decoder, DecoderAround, TextSnapshot
from slm.runtime.decoder import OnnxDecoder

Array = NDArray[Any]
_Tokens = TypeVar("_Tokens")

# A longer match predicts little better than a match of this length.
_LONGEST_MATCH = 8

# The cost of a step of n tokens, in single-token steps: measured 1.3, 1.5, 1.9 and 2.7 for 2, 4, 8 and 16 tokens of the INT8
# model of 270M parameters.
_STEP_COST, _TOKEN_COST = 1.2, 0.1

# The learning rate of the acceptance estimate, and the speedup that a draft must promise: overestimates are acted on, and
# underestimates are not. Tuned on stories, source code, JSON and noise: no text slows down by more than 1 %.
_FOLLOW, _WORTH = 0.05, 1.1


class Lookup:
    """A text that is searched for earlier occurrences of its last tokens."""

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
        """Removes all but the first `length` tokens."""
        self.length = length

    def draft(self, count: int) -> tuple[list[int], int]:
        """Returns the likely continuation, and how many of the last tokens match the earlier occurrence.

        Uses the earlier occurrence with the longest match, and the most recent one of equal matches. A text that repeats with
        a period shorter than the draft continues to repeat.
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
    """Estimates how often drafts are accepted, by length of the match, and the draft length that pays off."""

    def __init__(self) -> None:
        # A longer match is more reliable; a match of one token barely pays off.
        self._share = [matched / (matched + 2) for matched in range(_LONGEST_MATCH + 1)]

    def learn(self, matched: int, true: bool) -> None:
        """Counts one drafted token, whether or not it was read ahead."""
        self._share[matched] += _FOLLOW * (true - self._share[matched])

    def length(self, matched: int, longest: int) -> int:
        """Returns the draft length with the most tokens per cost; 0 if single-token steps give about as many."""
        share, best, best_rate = self._share[matched], 0, _WORTH
        expected, chance = 1.0, 1.0  # expected tokens of a step; probability that the whole draft is accepted
        for count in range(1, longest + 1):
            chance *= share
            expected += chance
            rate = expected / (_STEP_COST + _TOKEN_COST * count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


class SpeculativeDecoder(DecoderAround):
    """A decoder that reads ahead where the text repeats. It has the interface of any other decoder.

    Attributes:
        decoder: The decoder that computes.
        draft_tokens: The longest draft.
        drafted: Tokens read ahead so far.
        accepted: Drafted tokens that were accepted.
        steps: Steps after the prompt, with and without drafts.
    """

    def __init__(self, decoder: Decoder, draft_tokens: int) -> None:
        if draft_tokens < 1:
            raise SlmError(f"draft_tokens is {draft_tokens}; it must be 1 or more")
        super().__init__(decoder)
        self.draft_tokens = draft_tokens
        self.drafted = self.accepted = self.steps = 0
        self._trust = Trust()
        self._text = Lookup(decoder.context)
        self._guess: list[int] = []  # the expected continuation; its first tokens may have been read ahead
        self._matched = 0
        self._ahead: list[Array] = []  # logits after each token that was read ahead

    @property
    def length(self) -> int:
        """The number of tokens read since the last reset, without those read ahead."""
        return self._text.length

    @property
    def description(self) -> str:
        """A short description of the backend and its device."""
        return f"{self.decoder.description}, drafts of up to {self.draft_tokens}"

    @property
    def caveat(self) -> str | None:
        """A warning about drafts with this model; None if drafts never change its text."""
        inner = self.decoder
        if not isinstance(inner, OnnxDecoder) or inner.bundle.manifest.quantization is None:
            return None
        if inner.steps_alike and self.draft_tokens < FEW_TOKENS:
            return None
        heads = inner.bundle.config.num_attention_heads
        return (
            "with this bundle, drafts may change the choice between almost equally likely tokens; not with one from "
            f"slm quantize --int8 --block-size 64 --kv-cache int8 on at most {heads} threads, with drafts of at most "
            f"{FEW_TOKENS - 1} tokens"
        )

    def reset(self) -> None:
        """Forgets all tokens."""
        self.decoder.reset()
        self._text.rewind(0)
        self._trust = Trust()  # the same prompt gets the same drafts after a reset
        self._forget()

    def read(self, ids: Sequence[int]) -> Array:
        """Reads tokens and returns the logits (V,) for the next token."""
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
        """Reads a token, and as much of its expected continuation as pays off."""
        room = min(self.draft_tokens, self.decoder.revocable - 1)
        if self.length < self.context:  # otherwise the decoder below raises the error
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
        """Rewinds the tokens that were read ahead."""
        if self._ahead:
            self.decoder.rewind(self.length)
        self._forget()

    def _forget(self) -> None:
        self._guess, self._matched, self._ahead = [], 0, []

    def _guarded(self, read: Callable[[_Tokens], Array], tokens: _Tokens) -> Array:
        """Calls `read`. After a failure, matches the text to the decoder: unchanged, or empty after an interrupted step."""
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
        """The most tokens that `read_each` may read next so that all of them can be rewound."""
        self._settle()
        return self.decoder.revocable

    def read_each(self, ids: Sequence[int]) -> Array:
        """Reads a few tokens in one step and returns the logits (T, V) after each of them."""
        self._settle()
        logits = self.decoder.read_each(ids)
        self._text.extend(ids)
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all tokens after the first `length`; see `Decoder.rewind`."""
        self._settle()
        self.decoder.rewind(length)
        self._text.rewind(length)

    def snapshot(self) -> TextSnapshot:
        """Returns a copy of the state."""
        self._settle()
        return TextSnapshot(self.decoder.snapshot(), self._text.ids.copy())

    def restore(self, snapshot: Any) -> None:
        """Replaces the state by a snapshot; see `Decoder.restore`."""
        if not isinstance(snapshot, TextSnapshot):
            raise SlmError("the snapshot is not of this decoder", "read the text with this one")
        self.decoder.restore(snapshot.inner)
        self._text.rewind(0)
        self._text.extend(snapshot.ids)
        self._forget()
