"""Cross-entropy from hidden states, without the logits of a whole batch.

The head's product, its softmax and the three gradients are computed chunk by chunk in the forward pass. What remains for the
backward pass has the size of the hidden states and of the head's weights. No product is computed twice.

Dimensions: N positions, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Targets that do not count in the loss, as in PyTorch.
IGNORED = -100

# Default size of a chunk of logits. The gradient of the head's weights is summed once per chunk, so smaller chunks cost more.
CHUNK_BYTES = 128 << 20
# Rows per product with the head on a CPU: with GPT-2's vocabulary 1,024 rows take 69 ms in one product and 46 ms in four (two
# cores with AMX, bfloat16). The gradient of the head's weights is faster in one product: 77 ms against 130.
_ROWS = 256
# On a CPU the softmax processes as many rows at once as stay in a core's cache between its passes.
_CACHED_BYTES = 2 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    rows: tuple[Sequence[int], Tensor] | None = None,
) -> Tensor:
    """Returns the mean cross-entropy of the logits `hidden @ weight.T`, in nats a token, float32.

    The products are computed in autocast's type where it is on, softmax and sums in float32.

    Args:
        hidden: Hidden states (N, D).
        weight: The head (V, D).
        targets: Ids (N,); targets that are `IGNORED` count neither in the loss nor in its mean.
        chunk: Positions whose logits exist at once; None uses as many as fit into `CHUNK_BYTES`.
        rows: Ids, and rows (R, D) that replace theirs in a frozen head; the rows themselves may be trained.
    """
    return linear_loss(hidden, weight, _Labels(targets), chunk, rows)


class Targets(Protocol):
    """What the logits of N positions are compared with."""

    def count(self) -> Tensor:
        """Returns the number of positions that count in the loss, at least 1."""

    def compare(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns the sum of the losses of some positions, and overwrites their logits (n, V) with their gradient.

        Args:
            logits: The logits, in the type of the products.
            rows: The positions.
            dtype: The type of the products.
        """


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    chunk: int | None = None,
    rows: tuple[Sequence[int], Tensor] | None = None,
) -> Tensor:
    """Returns the mean loss of the logits `hidden @ weight.T` for any targets; see `linear_cross_entropy`."""
    dtype = products_dtype(hidden)
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (dtype.itemsize * len(weight)))
    ids, values = rows if rows is not None else ((), None)
    if (
        not torch.is_grad_enabled()
    ):  # autograd functions see which inputs require gradients, even when gradients are disabled
        hidden, weight, values = hidden.detach(), weight.detach(), None if values is None else values.detach()
    loss: Tensor = _LinearLoss.apply(hidden, weight, values, _Products(targets, chunk, dtype, ids))
    return loss


def products_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the type of products with hidden states: autocast's where it is on, else their own."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@dataclass(frozen=True)
class _Products:
    """How the products with the head are computed.

    Attributes:
        targets: What the logits are compared with.
        chunk: Positions whose logits exist at once.
        dtype: The type of the products.
        replaced: Ids of the head's rows that are replaced.
    """

    targets: Targets
    chunk: int
    dtype: torch.dtype
    replaced: Sequence[int]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, values: Tensor | None, products: _Products) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = None
            if values is not None:
                if ctx.needs_input_grad[1]:
                    raise ValueError("rows can only replace rows of a frozen head")
                ids = torch.tensor(products.replaced, device=hidden.device)
                rows = _Rows(ids, values.to(products.dtype), ctx.needs_input_grad[2])
            return _forward(ctx, hidden, weight, products, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients were returned already: there is no second backward pass")
        scale = gradient * ctx.scale
        # In place: the head's gradient is as large as the head, and nothing else refers to it.
        hidden, weight, rows = (None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)
        return hidden, weight, rows, None


class _Rows:
    """Rows that replace rows of a head.

    Args:
        ids: Ids of the replaced rows, int64 (R,).
        values: The rows (R, D), in the type of the products.
        learned: Whether to compute their gradient.
    """

    def __init__(self, ids: Tensor, values: Tensor, learned: bool) -> None:
        self._ids, self._values = ids, values
        self.gradient = torch.zeros(values.shape, dtype=torch.float32, device=values.device) if learned else None

    def put(self, logits: Tensor, inputs: Tensor) -> None:
        """Writes the rows' logits into the others (n, V), for inputs (n, D)."""
        logits[:, self._ids] = inputs @ self._values.T

    def take(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Moves the gradients of the rows' logits out, leaving zeros; returns the gradient of the inputs (n, D)."""
        mine = gradients[:, self._ids]
        gradients[:, self._ids] = 0
        if self.gradient is not None:
            self.gradient += mine.T @ inputs
        return mine @ self._values


def _forward(ctx: Any, hidden: Tensor, weight: Tensor, products: _Products, replaced: _Rows | None) -> Tensor:
    targets, chunk, dtype = products.targets, products.chunk, products.dtype
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    # Not yet divided by the number of targets: most values would become too small for float16.
    hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
    weight_gradient: Tensor | None = None
    total = hidden.new_zeros((), dtype=torch.float32)
    inputs, head = hidden.to(dtype), weight.to(dtype)
    for first in range(0, len(hidden), chunk):
        rows = slice(first, min(first + chunk, len(hidden)))
        logits = inputs.new_empty(rows.stop - first, len(head))
        step = chunk if logits.is_cuda else _ROWS
        for start in range(first, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            values = logits[block.start - first : block.stop - first]
            torch.mm(inputs[block], head.T, out=values)
            if replaced is not None:
                replaced.put(values, inputs[block])
            total += targets.compare(values, block, dtype)
            taken = None if replaced is None else replaced.take(values, inputs[block])
            if hidden_gradient is not None:
                hidden_gradient[block] = values @ head
                if taken is not None:
                    hidden_gradient[block] += taken
        if wants_weight:
            part = logits.T @ inputs[rows]
            weight_gradient = part.float() if weight_gradient is None else weight_gradient.add_(part)
    ctx.gradients = hidden_gradient, weight_gradient, None if replaced is None else replaced.gradient
    ctx.scale = targets.count().reciprocal()
    mean: Tensor = total * ctx.scale
    return mean


class _Labels:
    """One target a position.

    Args:
        targets: Ids (N,); those that are `IGNORED` do not count.
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets, self._learned = targets, targets != IGNORED

    def count(self) -> Tensor:
        """Returns the number of positions that count in the loss, at least 1."""
        return self._learned.sum().clamp(min=1)

    def compare(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns the sum of the losses, and overwrites the logits with their gradient; see `Targets`."""
        return _softmax_minus_target(logits, self._targets[rows], self._learned[rows])


def cached_rows(logits: Tensor) -> int:
    """Returns how many rows of logits a softmax processes at once."""
    return len(logits) if logits.is_cuda else max(1, _CACHED_BYTES // (4 * logits.shape[1]))


def _softmax_minus_target(logits: Tensor, targets: Tensor, learned: Tensor) -> Tensor:
    """Returns the sum of the losses, and overwrites the logits with their gradient."""
    rows = max(1, cached_rows(logits))
    total = logits.new_zeros((), dtype=torch.float32)
    for first in range(0, len(targets), rows):
        block, mask = logits[first : first + rows], learned[first : first + rows, None]
        target = targets[first : first + rows, None].where(mask, 0)
        values = block.to(torch.float32, copy=True)
        of_target = values.gather(1, target)
        highest = values.amax(1, keepdim=True)
        values.sub_(highest).exp_()
        sums = values.sum(1, keepdim=True)
        total += ((sums.log() + highest - of_target) * mask).sum()
        values.mul_(mask / sums)
        values.scatter_add_(1, target, -mask.to(torch.float32))
        block.copy_(values)
    return total
