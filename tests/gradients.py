"""A loss that is computed in chunks and its gradients, compared with the definition from whole logits.

Dimensions: N positions, D hidden, V vocabulary.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slm.train import loss as loss_module

# float32 sums in another order, of the largest value.
TOLERANCE = 2e-5
N, D, V = 37, 24, 101
Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns hidden states (N, D) and the weights of a head (V, D), both with gradients."""
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    return hidden, torch.randn(V, D, generator=generator, requires_grad=True)


def assert_same(patch: pytest.MonkeyPatch, found: Loss, wanted: Loss, hidden: Tensor, weights: Tensor) -> float:
    """Asserts that two losses and their gradients are the same, the first one in blocks of three rows; returns the loss."""
    patch.setattr(loss_module, "_CACHED_BYTES", 3 * 4 * len(weights))
    values = [loss(hidden, weights) for loss in (found, wanted)]
    gradients = [torch.autograd.grad(3 * value, (hidden, weights)) for value in values]
    assert values[0].item() == pytest.approx(values[1].item(), rel=TOLERANCE)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < TOLERANCE * b.abs().max()
    return values[1].item()
