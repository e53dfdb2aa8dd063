"""Batches of examples as tensors, and their loss.

Dimensions: B rows, T positions, D hidden.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slm.core.nn import CausalLM
from slm.core.nn.fake_quant import GridLinear, round_activations, round_weight
from slm.finetune.adapter import TunableLM, trained_rows
from slm.finetune.examples import Example
from slm.train.evaluate import Check
from slm.train.loss import IGNORED, linear_cross_entropy

# Rows of this many batches are sorted by length together: enough to find rows of similar length, few enough to stay random.
_SORTED_BATCHES = 16

# The examples of a row: one, or several that are packed.
Packed = tuple[Example, ...]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    They need no attention mask: attention is causal, so no token attends to the padding after it, and padding has no labels.
    The loss equals that of the rows one by one.

    Attributes:
        input_ids: Int64 (B, T).
        labels: The next token if it counts in the loss, else `IGNORED`; int64 (B, T).
        segments: Number of each token's example in its row, -1 for padding; int64 (B, T). None if every row has one
            example.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Tensor | None = None

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())


def alone(examples: Sequence[Example]) -> list[Packed]:
    """Returns rows of one example each."""
    return [(example,) for example in examples]


def pack(examples: Sequence[Example], max_length: int, order: random.Random) -> list[Packed]:
    """Packs examples into rows of at most `max_length` tokens, each into the first row that has room for it.

    Examples are taken in random order. Only a limited number of rows stays open at a time; the fullest is closed first.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    full: list[Packed] = []
    for example in order.sample(examples, len(examples)):
        size = len(example.ids) - 1
        place = next((number for number, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(max_length - 1)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= size
        if len(rows) > 8 * _SORTED_BATCHES:
            fullest = min(range(len(room)), key=room.__getitem__)
            full.append(tuple(rows.pop(fullest)))
            room.pop(fullest)
    return [*full, *map(tuple, rows)]


def collate(rows: Sequence[Packed]) -> Batch:
    """Returns the batch of some rows."""
    length = max(_length(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    segments = torch.full_like(input_ids, -1)
    for number, row in enumerate(rows):
        place = 0
        for segment, example in enumerate(row):
            ids = torch.tensor(example.ids)
            input_ids[number, place : place + len(ids) - 1] = ids[:-1]
            segments[number, place : place + len(ids) - 1] = segment
            for start, end in example.spans:
                labels[number, place + start - 1 : place + end - 1] = ids[start:end]
            place += len(ids) - 1
    return Batch(input_ids, labels, segments if any(len(row) > 1 for row in rows) else None)


def epoch_batches(rows: Sequence[Packed], batch_size: int, order: random.Random) -> list[Batch]:
    """Returns every row once, in random batches of rows of similar length, to limit padding."""
    shuffled = order.sample(rows, len(rows))
    span = batch_size * _SORTED_BATCHES
    batches: list[Batch] = []
    for start in range(0, len(shuffled), span):
        near = sorted(shuffled[start : start + span], key=_length)
        batches += [collate(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
    order.shuffle(batches)
    return batches


def batch_loss(model: TunableLM | CausalLM, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy over the labels, in nats.

    The head dominates the cost of a small model; it is computed only at positions with a label, chunk by chunk.
    """
    hidden, labels = batch_hidden(model, batch)
    return cross_entropy(model, hidden, labels)


def row_losses(model: TunableLM | CausalLM, batch: Batch) -> Tensor:
    """Returns the sum of the cross-entropies of each row's labels, in nats, float32 (B,)."""
    hidden, labels = batch_hidden(model, batch)
    counts = (batch.labels != IGNORED).sum(1).tolist()
    parts = zip(hidden.split(counts), labels.split(counts), strict=True)
    return torch.stack([cross_entropy(model, part, of_part) * len(of_part) for part, of_part in parts])


def batch_hidden(model: TunableLM | CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the hidden states (N, D) at positions with a label, and the labels (N,), row after row."""
    device = model.model.norm.weight.device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    segments = None if batch.segments is None else batch.segments.to(device)
    learned = labels != IGNORED
    return model.model(input_ids, segments=segments)[learned], labels[learned]


def cross_entropy(model: TunableLM | CausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of hidden states (N, D) for labels (N,), in nats."""
    hidden, weight, rows = head_operands(model, hidden)
    return linear_cross_entropy(hidden, weight, labels, rows=rows)


def head_operands(
    model: TunableLM | CausalLM, hidden: Tensor
) -> tuple[Tensor, Tensor, tuple[list[int], Tensor] | None]:
    """Returns the factors of the head's product for hidden states (N, D), on the grid if the model is trained for one.

    Returns:
        The hidden states (N, D), the matrix (V, D), and the ids and rows (R, D) that replace some of its rows.
    """
    weight, rows = trained_rows(model.lm_head)
    if isinstance(model.lm_head, GridLinear):
        hidden, weight = model.lm_head.operands(hidden)
    if isinstance(model, TunableLM):
        weight = weight if model.head_weight is None else model.head_weight
        if model.head_scheme is not None:
            hidden = round_activations(hidden, model.head_scheme)
            rows = None if rows is None else (rows[0], round_weight(rows[1], model.head_scheme))
    return hidden, weight, rows


def logits(model: TunableLM | CausalLM, hidden: Tensor) -> Tensor:
    """Returns the logits (…, V) of hidden states (…, D). Trained rows of the head take their places without a copy of it."""
    weight, rows = trained_rows(model.lm_head)
    if rows is None or not isinstance(model, TunableLM) or model.head_scheme is not None:
        out: Tensor = model.lm_head(hidden)
        return out
    weight = weight if model.head_weight is None else model.head_weight
    ids, values = rows
    found = functional.linear(hidden.to(weight.dtype), weight).float()
    found[..., ids] = functional.linear(hidden.to(weight.dtype), values.to(weight.dtype)).float()
    return found


@torch.no_grad()
def mean_loss(
    model: TunableLM | CausalLM,
    examples: Sequence[Example],
    batch_size: int,
    autocast: torch.dtype | None = None,
    check: Check = lambda: None,
) -> float:
    """Returns the mean cross-entropy over the labels of all examples, in nats, without dropout.

    Args:
        model: The model.
        examples: The examples.
        batch_size: Rows per batch.
        autocast: Type of the products; None for float32.
        check: Called between batches; may raise to stop.
    """
    return mean_over(model, examples, batch_size, batch_loss, autocast, check)


@torch.no_grad()
def mean_over(
    model: TunableLM | CausalLM,
    examples: Sequence[Example],
    batch_size: int,
    loss: Callable[[TunableLM | CausalLM, Batch], Tensor],
    autocast: torch.dtype | None,
    check: Check,
) -> float:
    """Returns the mean of any loss a token over the labels of all examples; see `mean_loss`.

    Args:
        model: The model.
        examples: The examples.
        batch_size: Rows per batch.
        loss: Returns the mean loss over the labels of a batch.
        autocast: Type of the products; None for float32.
        check: Called between batches; may raise to stop.
    """
    model.eval()
    near = sorted(examples, key=lambda example: len(example.ids))
    total, trained = 0.0, 0
    for first in range(0, len(near), batch_size):
        check()
        batch = collate(alone(near[first : first + batch_size]))
        with casting(model, autocast):
            total += loss(model, batch).item() * batch.trained
        trained += batch.trained
    return total / trained


def casting(model: TunableLM | CausalLM, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Returns autocast on the model's device, or a context without effect if there is no type."""
    return nullcontext() if dtype is None else torch.autocast(model.model.norm.weight.device.type, dtype=dtype)


def _length(row: Packed) -> int:
    return sum(len(example.ids) - 1 for example in row)
