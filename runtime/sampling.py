"""Chooses the next token from logits: small pure functions over one row (V,).

Each `keep_...` returns the indices of the kept tokens, in ascending order; later functions process only these. V is the
vocabulary.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.arguments import MAX_COUNT, check_type, is_whole
from slm.core.errors import SlmError
from slm.runtime.penalties import History, add_bias, penalize_repetition, penalize_use

Array = NDArray[Any]

# Top-k first views a row in this many columns: the k-th largest column maximum is a lower bound of the k-th largest logit.
_STRIDES = 64
# Longer rows are drawn in two stages, first a block and then a token in it: a running sum over a vocabulary takes
# milliseconds.
_BLOCK = 512
# Lower temperatures would make float32 divide 0 by 0; the most likely token has all probability long before.
_COLDEST = 1e-30
# Drawn seeds are below this limit, so that a user can type them again.
_SEEDS = 1 << 32
# The exclusive limit of seeds. Callers accept 63 bits and count up from there for several texts.
_SEED_LIMIT = 2**64
# Fields of `Sampling` that are real numbers.
_REAL = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def draw_seed() -> int:
    """Returns a random seed of 32 bits from the operating system."""
    return secrets.randbelow(_SEEDS)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Settings apply in transformers' order: logit bias, repetition penalty, presence and frequency penalty (transformers has
    neither; vLLM and llama.cpp apply them here), temperature, top-k, top-p, min-p, typical. Each filters the tokens that the
    previous ones kept. llama.cpp applies typical before top-p, and the temperature last.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token after bias and penalties.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose total probability reaches this (arXiv:1904.09751); 1 keeps all.
        seed: The same seed gives the same choices. None draws one, which replaces None. Greedy sampling has None.
        min_p: Keep tokens at least this fraction as likely as the most likely one (arXiv:2407.01082); 0 keeps all.
        typical_p: Keep the fewest tokens closest to the expected surprise whose total probability reaches this
            (arXiv:2202.00666); 1 keeps all.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens in the prompt or the text
            (CTRL, arXiv:1909.05858); 1 changes nothing, higher values reduce repetition.
        presence_penalty: Subtracted once from the logit of each new token used so far, not counting the prompt (OpenAI's
            API).
        frequency_penalty: Subtracted from the logit of a new token for each use so far (OpenAI's API).
        logit_bias: Added to the logits of these ids; -inf excludes one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    seed: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_types()
        infinity = float("inf")
        share = "above 0 and at most 1"
        for name, value, wanted, good in (
            ("temperature", self.temperature, "0 or more", 0 <= self.temperature < infinity),
            ("top_k", self.top_k, f"from 0 to {MAX_COUNT:,}", is_whole(self.top_k, 0, MAX_COUNT)),
            ("top_p", self.top_p, share, 0 < self.top_p <= 1),
            ("seed", self.seed, "from 0 to 2**64 - 1", self.seed is None or is_whole(self.seed, 0, _SEED_LIMIT - 1)),
            ("min_p", self.min_p, "from 0 to 1", 0 <= self.min_p <= 1),
            ("typical_p", self.typical_p, share, 0 < self.typical_p <= 1),
            ("repetition_penalty", self.repetition_penalty, "above 0", 0 < self.repetition_penalty < infinity),
            ("presence_penalty", self.presence_penalty, "a number", abs(self.presence_penalty) < infinity),
            ("frequency_penalty", self.frequency_penalty, "a number", abs(self.frequency_penalty) < infinity),
            *(
                (f"logit_bias of token {token}", bias, "a number or -inf", -infinity <= bias < infinity)
                for token, bias in self.logit_bias.items()
            ),
        ):
            if not good:
                raise SlmError(f"{name} is {value}; it must be {wanted}")
        if self.temperature == 0:
            object.__setattr__(self, "seed", None)  # greedy sampling draws nothing
        elif self.seed is None:
            object.__setattr__(self, "seed", draw_seed())

    def _check_types(self) -> None:
        """Checks the types of all numbers.

        Raises:
            ArgumentError: If a value is not a number; the message names it.
        """
        for name in _REAL:
            check_type(name, getattr(self, name), Real, "a number")
        check_type("top_k", self.top_k, Integral, "a whole number")
        check_type("seed", self.seed, (Integral, type(None)), "a whole number or None")
        check_type("logit_bias", self.logit_bias, Mapping, "a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            check_type("a key of logit_bias", token, Integral, "a token id")
            check_type(f"logit_bias of token {token}", bias, Real, "a number or -inf")

    def generator(self) -> np.random.Generator:
        """Returns the random generator of one text."""
        return np.random.default_rng(self.seed or 0)

    @property
    def adjusts(self) -> bool:
        """Whether the text so far, or a bias, changes the logits."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == self.frequency_penalty == 0
        return bool(self.logit_bias) or not neutral

    def adjust(self, logits: Array, history: History) -> Array:
        """Returns the logits with bias and penalties."""
        if self.logit_bias:
            logits = add_bias(logits, self.logit_bias)
        if self.repetition_penalty != 1:
            logits = penalize_repetition(logits, np.flatnonzero(history.seen), self.repetition_penalty)
        if self.presence_penalty or self.frequency_penalty:
            logits = penalize_use(logits, history.uses, self.presence_penalty, self.frequency_penalty)
        return logits

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Returns the ids that can be chosen, ascending, and their probabilities. Requires a temperature above 0."""
        ids = keep_top_k(logits, self.top_k)
        row = softmax(logits if ids.size == logits.size else logits[ids], self.temperature)
        for keep, value, everything in (
            (keep_top_p, self.top_p, 1),
            (keep_min_p, self.min_p, 0),
            (keep_typical, self.typical_p, 1),
        ):
            if value != everything:
                kept = keep(row, value)
                ids, row = ids[kept], row[kept] / row[kept].sum()
        return ids, row

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """Returns the next token's id from adjusted logits.

        Raises:
            SlmError: If the logits are not finite, or every token is excluded.
        """
        if not np.isfinite(logits.max()):  # the maximum is NaN if any logit is
            raise SlmError("no token can be chosen: the logits are not finite, or the bias excludes every token")
        if self.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        return int(ids[draw(probabilities, generator)])


GREEDY = Sampling(temperature=0)


class Sampler:
    """The sampling state of one text: its random generator and its token history."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> None:
        """Starts a text.

        Raises:
            SlmError: If the bias has a token id outside the vocabulary.
        """
        for token in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise SlmError(f"logit_bias has token id {token:,}; ids are from 0 to {vocab_size - 1:,}")
        self.sampling = sampling
        self._generator = sampling.generator()
        self._history = History(prompt, vocab_size) if sampling.adjusts else None

    def choose(self, logits: Array) -> int:
        """Returns the next token's id and adds it to the history. The logits (V,) are not modified."""
        if self._history is None:
            return self.sampling.choose(logits, self._generator)
        token = self.sampling.choose(self.sampling.adjust(logits, self._history), self._generator)
        self._history.add(token)
        return token


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Returns probabilities (V,) of the logits divided by a temperature above 0; a logit of -inf has probability 0."""
    # one new row, changed in place: allocating rows of megabytes costs more than the arithmetic
    weights = logits - logits.max()
    with np.errstate(over="ignore"):  # near temperature 0, all other logits go to -inf, which is correct
        weights /= max(temperature, _COLDEST)
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


def keep_top_k(row: Array, k: int) -> Array:
    """Returns the k largest; includes ties with the k-th largest. 0 keeps all."""
    if not 0 < k < row.size:
        return np.arange(row.size)
    columns = row.size // _STRIDES
    if k >= columns:
        return np.flatnonzero(row >= _kth_largest(row, k))
    # k columns have a maximum of at least the bound, so that the k largest logits all reach it.
    bound = _kth_largest(row[: _STRIDES * columns].reshape(_STRIDES, columns).max(0), k)
    among = np.flatnonzero(row >= bound)
    return among[row[among] >= _kth_largest(row[among], k)]


def keep_top_p(probabilities: Array, p: float) -> Array:
    """Returns the fewest most likely indices whose total reaches p, at least one."""
    return _fewest(probabilities, probabilities, p)


def keep_min_p(probabilities: Array, p: float) -> Array:
    """Returns those at least p times as likely as the most likely one."""
    return np.flatnonzero(probabilities >= p * probabilities.max())


def keep_typical(probabilities: Array, p: float) -> Array:
    """Returns the fewest indices whose total reaches p, ordered by how close their surprise is to the entropy."""
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    entropy = probabilities @ np.where(probabilities > 0, surprise, 0)
    return _fewest(-np.abs(surprise - entropy), probabilities, p)


def draw(probabilities: Array, generator: np.random.Generator) -> int:
    """Returns an index drawn with these probabilities."""
    blocks = np.cumsum(np.add.reduceat(probabilities, np.arange(0, probabilities.size, _BLOCK), dtype=np.float64))
    point = generator.random() * blocks[-1]
    block = _locate(blocks, point)
    before = blocks[block - 1] if block else 0.0
    start = block * _BLOCK
    inside = np.cumsum(probabilities[start : start + _BLOCK], dtype=np.float64)
    return start + _locate(inside, point - before)


def _locate(cumulative: Array, point: float) -> int:
    """Returns the first index whose cumulative sum exceeds the point; never one with weight 0, despite rounding."""
    return int(np.searchsorted(cumulative, min(point, np.nextafter(cumulative[-1], 0)), side="right"))


def _kth_largest(row: Array, k: int) -> Any:
    return np.partition(row, row.size - k)[row.size - k]


def _fewest(scores: Array, weights: Array, mass: float) -> Array:
    """Returns the fewest indices, by descending score, whose weights reach the mass; of equal scores the first."""
    size = _STRIDES
    while True:  # a confident model needs few: the sorted part grows only as needed
        among = keep_top_k(scores, size)
        among = among[np.argsort(-scores[among], kind="stable")]
        reached = np.cumsum(weights[among], dtype=np.float64)
        if reached[-1] >= mass or among.size == scores.size:
            return np.sort(among[: 1 + int(np.searchsorted(reached, mass))])
        size *= 16
