"""The tokens over which predictions are compared: those that matter, and in each step a sample of the rest.

The product of hidden states and a table of 262,144 tokens takes as long as six layers. Most of the probability belongs to a
few thousand tokens.

Dimensions: P positions, D hidden, S compared tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The number of tokens that every step compares, and of those that it samples from the rest.
KEPT, SAMPLED = 16384, 4096
# The number of positions from which the probability of each token is estimated, and those computed at a time.
_POSITIONS, _TOGETHER = 1024, 64


@dataclass(frozen=True)
class Vocabulary:
    """The compared tokens.

    Attributes:
        kept: The tokens of every step.
        rest: The other tokens, of which a step compares a sample.
    """

    kept: Tensor
    rest: Tensor

    @classmethod
    def of(cls, table: Tensor, hidden: Tensor, seen: Tensor, generator: torch.Generator) -> "Vocabulary":
        """Chooses the tokens that occur in the text, and the likeliest others.

        Args:
            table: The float head (vocabulary, D).
            hidden: The float model's hidden states (P, D).
            seen: The tokens of the text.
            generator: Draws the positions.
        """
        size = len(table)
        if size <= KEPT + SAMPLED:
            return cls(torch.arange(size), torch.empty(0, dtype=torch.int64))
        drawn = torch.randperm(len(hidden), generator=generator)[:_POSITIONS]
        likely = torch.zeros(size)
        for some in drawn.split(_TOGETHER):
            likely += (hidden[some] @ table.T).softmax(-1).sum(0)
        likely[seen] += len(drawn)  # before all others
        order = likely.argsort(descending=True, stable=True)
        return cls(order[:KEPT].sort().values, order[KEPT:].sort().values)

    def drawn(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the tokens of a step (S,), and what to add to their logits (S,) so that the sample stands for the rest."""
        if not len(self.rest):
            return self.kept, torch.zeros(len(self.kept))
        sample = self.rest[torch.randint(len(self.rest), (SAMPLED,), generator=generator)]
        weight = math.log(len(self.rest) / SAMPLED)
        return torch.cat([self.kept, sample]), torch.cat([torch.zeros(len(self.kept)), torch.full((SAMPLED,), weight)])


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Returns the mean KL divergence of the found logits (P, S) from the wanted ones, in nats."""
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()
