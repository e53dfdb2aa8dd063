"""Direct preference optimization: pairs of a preferred and a rejected answer to the same prompt (arXiv:2305.18290).

The loss of a pair is -log sigmoid(beta * margin), with

    margin = (log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))

p is the model, r the reference: the model before the first update, whose adapter changes nothing yet. Log probabilities
are sums over the tokens of the answer, its end included. Those of the reference are computed once.

Dimensions: B pairs, T positions, D hidden.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from slm.core.nn import CausalLM
from slm.finetune.adapter import TunableLM
from slm.finetune.batches import Batch, alone, casting, collate, row_losses
from slm.finetune.examples import Example
from slm.finetune.material import Material
from slm.train.evaluate import Check


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt, in tokens, with the log probabilities that the reference gives them, in nats."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def length(self) -> int:
        """Tokens of the longer answer with its prompt."""
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class PairBatch(Batch):
    """The chosen answers of some pairs (the first half of the rows), and their rejected answers.

    Attributes:
        reference: The reference's margin of each pair, log r(chosen) - log r(rejected), in nats, float32 (B,).
    """

    reference: Tensor = field(default_factory=lambda: torch.empty(0))


class Preferences(Material):
    """Pairs to train on, and pairs to measure."""

    def __init__(self, pairs: Sequence[Pair], measured: Sequence[Pair], beta: float, loss_name: str) -> None:
        """Takes pairs whose reference is not known yet; see `refer`.

        Args:
            pairs: The pairs to train on.
            measured: The pairs on which the loss is measured.
            beta: How far the model may move away from the reference; smaller values allow more.
            loss_name: Name of the measured loss in messages.
        """
        self.loss_name = loss_name
        self._pairs, self._measured, self._beta = list(pairs), list(measured), beta
        self._preferred = 0.0

    @override
    def __len__(self) -> int:
        return len(self._pairs)

    def refer(self, model: TunableLM | CausalLM, batch_size: int, autocast: torch.dtype | None, check: Check) -> None:
        """Computes the reference's log probabilities with the model as it is: before the first update."""
        self._pairs = referred(model, self._pairs, batch_size, autocast, check)
        self._measured = referred(model, self._measured, batch_size, autocast, check)

    @override
    def batches(self, batch_size: int, order: random.Random) -> list[Batch]:
        shuffled = order.sample(self._pairs, len(self._pairs))
        return [_collated(shuffled[first : first + batch_size]) for first in range(0, len(shuffled), batch_size)]

    @override
    def loss(self, model: TunableLM | CausalLM, batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        return preference_loss(margins(model, batch), self._beta)

    @override
    def measure(
        self, model: TunableLM | CausalLM, batch_size: int, autocast: torch.dtype | None, check: Check
    ) -> float:
        model.eval()
        found: list[Tensor] = []
        near = sorted(self._measured, key=lambda pair: pair.length)
        for first in range(0, len(near), batch_size):
            check()
            batch = _collated(near[first : first + batch_size])
            with torch.no_grad(), casting(model, autocast):
                found.append(margins(model, batch).cpu())
        moved = torch.cat(found)
        own = moved + torch.tensor([pair.reference[0] - pair.reference[1] for pair in near])
        self._preferred = float((own > 0).float().mean())
        return float(preference_loss(moved, self._beta))

    @property
    @override
    def figures(self) -> dict[str, float]:
        return {"preferred": self._preferred}


def preference_loss(margin: Tensor, beta: float) -> Tensor:
    """Returns the mean loss of margins (B,), in nats a pair."""
    return -logsigmoid(beta * margin).mean()


def margins(model: TunableLM | CausalLM, batch: PairBatch) -> Tensor:
    """Returns how much more than the reference the model prefers each chosen answer, in nats, float32 (B,)."""
    chosen, rejected = (-row_losses(model, batch)).chunk(2)
    return chosen - rejected - batch.reference.to(chosen.device)


@torch.no_grad()
def referred(
    model: TunableLM | CausalLM, pairs: Sequence[Pair], batch_size: int, autocast: torch.dtype | None, check: Check
) -> list[Pair]:
    """Returns the pairs with the log probabilities that a model gives them."""
    model.eval()
    found: list[Pair] = list(pairs)
    order = sorted(range(len(pairs)), key=lambda number: pairs[number].length)
    for first in range(0, len(order), batch_size):
        check()
        numbers = order[first : first + batch_size]
        with casting(model, autocast):
            chosen, rejected = (-row_losses(model, _collated([pairs[number] for number in numbers]))).chunk(2)
        for number, *reference in zip(numbers, chosen.tolist(), rejected.tolist(), strict=True):
            found[number] = replace(pairs[number], reference=(reference[0], reference[1]))
    return found


def _collated(pairs: Sequence[Pair]) -> PairBatch:
    rows = alone([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])
    batch = collate(rows)
    reference = torch.tensor([pair.reference[0] - pair.reference[1] for pair in pairs])
    return PairBatch(batch.input_ids, batch.labels, batch.segments, reference)
