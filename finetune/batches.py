"""Examples as tensors, and the loss on what is learned.

Dimensions: B rows, T positions, D hidden, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.finetune.adapter import TunableLM
from slm.finetune.examples import Example

# The label of a position whose next token is not learned: read only, or padding.
IGNORED = -100
# Rows of this many batches are sorted by length together: long enough to find rows of like length, short enough to stay
# random.
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    No attention mask goes with them: attention is causal, so no token sees the padding after it, and what the padding
    itself computes carries no label. The loss is exactly that of the rows one by one.

    Attributes:
        input_ids: Int64 (B, T).
        labels: The next token where it is learned, `IGNORED` elsewhere; int64 (B, T).
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def trained(self) -> int:
        """Number of tokens that are learned."""
        return int((self.labels != IGNORED).sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Returns examples as one batch."""
    length = max(len(example.ids) for example in examples) - 1
    input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, example.start - 1 : len(ids) - 1] = ids[example.start :]
    return Batch(input_ids, labels)


def epoch_batches(examples: Sequence[Example], batch_size: int, order: random.Random) -> list[Batch]:
    """Returns every example once, in random batches of rows of similar length, so that little is padding."""
    shuffled = order.sample(examples, len(examples))
    span = batch_size * _SORTED_BATCHES
    batches: list[Batch] = []
    for start in range(0, len(shuffled), span):
        near = sorted(shuffled[start : start + span], key=lambda example: len(example.ids))
        batches += [collate(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
    order.shuffle(batches)
    return batches


def batch_loss(model: TunableLM, batch: Batch) -> Tensor:
    """Returns the sum of the cross-entropies of the learned tokens, in nats.

    The head, which costs most in a small model, is computed only where something is learned.
    """
    device = model.model.norm.weight.device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    learned = labels != IGNORED
    hidden = model.model(input_ids)[learned]  # (learned tokens, D)
    logits = model.lm_head(hidden).float()  # (learned tokens, V)
    return F.cross_entropy(logits, labels[learned], reduction="sum")


@torch.no_grad()
def mean_loss(model: TunableLM, examples: Sequence[Example], batch_size: int) -> float:
    """Returns the mean cross-entropy of the learned tokens of all examples, in nats, without dropout."""
    model.eval()
    near = sorted(examples, key=lambda example: len(example.ids))
    batches = [collate(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
    total = sum(batch_loss(model, batch).item() for batch in batches)
    return total / sum(batch.trained for batch in batches)
