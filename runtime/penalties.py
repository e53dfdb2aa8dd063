"""Changes of the logits (V,) before a token is chosen: bias and penalties. Every function returns a new row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class History:
    """The tokens of a text.

    Attributes:
        seen: Whether each token is in the prompt or the text, bool (V,).
        uses: How often each token was chosen, int32 (V,); tokens of the prompt do not count.
    """

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen = np.zeros(vocab_size, bool)
        self.seen[list(prompt)] = True
        self.uses = np.zeros(vocab_size, np.int32)

    def add(self, token: int) -> None:
        """Counts a chosen token."""
        self.seen[token] = True
        self.uses[token] += 1


def add_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Adds a bias to the logits of some tokens."""
    changed = logits.copy()
    for token, value in bias.items():
        changed[token] += value
    return changed


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Divides the positive logits of the seen ids by the penalty, and multiplies the negative ones.

    CTRL (arXiv:1909.05858, section 4.1) divides both, which makes tokens with negative logits more likely. Later
    implementations multiply these, as here.
    """
    changed = logits.copy()
    values = logits[seen]
    changed[seen] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def penalize_use(logits: Array, uses: Array, presence: float, frequency: float) -> Array:
    """Subtracts `presence` from the logit of every used token, and `frequency` for each use, counted in uses (V,).

    OpenAI's definition: https://platform.openai.com/docs/api-reference/completions
    """
    changed = logits.copy()
    used = np.flatnonzero(uses)
    changed[used] -= presence + frequency * uses[used]
    return changed
