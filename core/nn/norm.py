"""RMSNorm (arXiv:1910.07467) as one operation for training on a CPU, where PyTorch composes it from several operators.

The composed norm takes twice the time in training, and saves its input in float32 and the normalized values. This one saves its
input in its own type, and computes the values again.

Dimensions: N rows, D hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalize(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Returns x (..., D) divided by its root mean square and multiplied by a gain (D,), computed in float32.

    Args:
        x: The values.
        gain: The gain, in float32; its gradient is computed if it requires one.
        eps: Added to the mean square.
        dtype: Type of the result; None for that of `x`.
    """
    out: Tensor = _Normalized.apply(x, gain, eps, dtype or x.dtype)
    return out


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        values = x.float()
        # vector_norm needs one pass over memory; squares and their mean need three.
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        shrink = length.square_().div_(values.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, shrink)
        return (values * shrink).mul_(gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shrink = ctx.saved_tensors
        wants_x, wants_gain = ctx.needs_input_grad[:2]
        normed, gradient = x.float() * shrink, gradient.float()
        of_x = of_gain = None
        if wants_gain:
            of_gain = (gradient * normed).reshape(-1, len(gain)).sum(0)
        if wants_x:
            scaled = gradient * gain
            along = torch.linalg.vecdot(scaled, normed)[..., None].div_(-len(gain))
            of_x = scaled.addcmul_(normed, along).mul_(shrink).to(x.dtype)
        return of_x, of_gain, None, None
