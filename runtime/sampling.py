"""Choosing the next token from logits: small pure functions over one row (V,)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.errors import SlmError

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the fewest likeliest tokens whose probability reaches this (arXiv:1904.09751).
        seed: Same seed, same choices.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, wanted, good in (
            ("temperature", self.temperature, "0 or more", 0 <= self.temperature < float("inf")),
            ("top_k", self.top_k, "0 or more", self.top_k >= 0),
            ("top_p", self.top_p, "above 0 and at most 1", 0 < self.top_p <= 1),
            ("seed", self.seed, "0 or more", self.seed >= 0),
        ):
            if not good:
                raise SlmError(f"{name} is {value}; it must be {wanted}")

    def generator(self) -> np.random.Generator:
        """Returns the source of chance for one text."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """Returns the next token's id."""
        if self.temperature == 0:
            return int(logits.argmax())
        kept = keep_top_k(logits.astype(np.float64) - logits.max(), self.top_k)
        with np.errstate(over="ignore"):  # next to a temperature of nothing the others go to -inf, which is right
            probabilities = softmax(kept / self.temperature)
        return draw(keep_top_p(probabilities, self.top_p), generator)


GREEDY = Sampling(temperature=0)


def softmax(logits: Array) -> Array:
    """Returns probabilities (V,); a logit of -inf gets 0."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def keep_top_k(logits: Array, k: int) -> Array:
    """Returns the logits with all but the k largest at -inf; ties at the border stay. 0 keeps all."""
    if not 0 < k < logits.size:
        return logits
    border = np.partition(logits, -k)[-k]
    return np.where(logits >= border, logits, -np.inf)


def keep_top_p(probabilities: Array, p: float) -> Array:
    """Returns the probabilities with all but the fewest that reach p set to 0, scaled to sum to 1; one always stays."""
    if p >= 1:
        return probabilities
    order = np.argsort(-probabilities, kind="stable")
    reached_before = np.concatenate(([0.0], np.cumsum(probabilities[order])[:-1]))
    kept = np.zeros_like(probabilities)
    inside = order[reached_before < p]
    kept[inside] = probabilities[inside]
    return kept / kept.sum()


def draw(probabilities: Array, generator: np.random.Generator) -> int:
    """Returns an index drawn with these probabilities."""
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
