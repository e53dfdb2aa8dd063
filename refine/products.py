"""Products of the student: integers, scales and zero points of a plan, which training can move.

Dimensions: B batch, T positions, N output channels, K input channels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slm.core.grid import Grid, as_stored
from slm.core.manifest import Scheme
from slm.core.nn.fake_quant import round_activations
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, unpack
from slm.export.graph.builder import Array
from slm.quantize.blocks import stored
from slm.quantize.plan import Arrays

# The distance of a weight from its integer at the start, in steps, is at most this. A weight that GPTQ rounded to a farther
# integer begins near the boundary, so that a small gradient can move it back.
_CLOSE = 0.45
# The outermost position, so that a weight at the end of the range stays near its integer.
_BEYOND = 0.49


class _Values(torch.autograd.Function):
    """The values of blocks from positions on the grid, (N, blocks, block), and relative changes of scales, (N, blocks)."""

    @staticmethod
    def forward(
        ctx: Any, steps: Tensor, change: Tensor, scale: Tensor, zero: Tensor, top: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(steps, change, scale, zero)
        ctx.top = top
        values = _integers(steps, zero, top).mul_((scale * (1 + change))[..., None])
        return values.flatten(1).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        steps, change, scale, zero = ctx.saved_tensors
        of_values = gradient.float().view_as(steps)
        of_change = (of_values * _integers(steps, zero, ctx.top)).sum(-1).mul_(scale)
        return of_values.mul_((scale * (1 + change))[..., None]), of_change, None, None, None, None


def _integers(steps: Tensor, zero: Tensor, top: int) -> Tensor:
    return steps.round().clamp_(0, top).sub_(zero[..., None])


class LearnedProduct(nn.Module):
    """A product whose integers and scales are trained. Rounding is the identity in the backward pass.

    Attributes:
        steps: The position of each weight on its block's grid, (N, blocks, block); the nearest integer is stored.
        change: The relative change of each scale, (N, blocks).
    """

    scale: Tensor
    zero: Tensor

    def __init__(
        self, arrays: Arrays, weight: Array, scheme: Scheme, rounds_activations: bool, dtype: torch.dtype
    ) -> None:
        """Takes the parameters of the graph and the float weight (N, K) that they approximate.

        Args:
            arrays: The parameters of the graph, by name.
            weight: The float weight, with the plan's smoothing.
            scheme: The scheme of the weight.
            rounds_activations: Whether the kernel rounds the inputs.
            dtype: The type of the product in training.
        """
        super().__init__()
        self._scheme, self._rounds, self._dtype = scheme, rounds_activations, dtype
        self._top = (1 << scheme.bits) - 1
        integers = torch.from_numpy(unpack(arrays[QUANTIZED], scheme.bits, scheme.block_size)).float()
        self.register_buffer("scale", torch.tensor(arrays[SCALE]))
        if scheme.zero_points:
            zero = torch.from_numpy(unpack(arrays[ZERO_POINTS], scheme.bits, self.scale.shape[1])).float()
        else:
            zero = torch.full_like(self.scale, 1 << (scheme.bits - 1))
        self.register_buffer("zero", zero)
        off = torch.tensor(weight).view_as(integers) / torch.where(self.scale == 0, 1, self.scale)[..., None]
        off += zero[..., None]
        off -= integers
        self.steps = nn.Parameter(integers.add_(off.clamp_(-_CLOSE, _CLOSE)))
        self.change = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, K) to (B, T, N)."""
        if self._rounds:
            x = round_activations(x, self._scheme)
        weight: Tensor = _Values.apply(self.steps, self.change, self.scale, self.zero, self._top, self._dtype)
        return F.linear(x.to(self._dtype), weight).float()

    @torch.no_grad()
    def bound(self) -> None:
        """Moves positions outside of the range of integers back to its ends."""
        self.steps.clamp_(-_BEYOND, self._top + _BEYOND)

    @torch.no_grad()
    def arrays(self) -> dict[str, Array]:
        """Returns the parameters of the graph, by name."""
        scale = as_stored((self.scale * (1 + self.change)).numpy(), self._scheme)
        integers = self.steps.round().clamp_(0, self._top).numpy()
        return stored(integers, Grid(scale, self.zero.numpy(), 0, self._top), self._scheme)


class FixedProduct(nn.Module):
    """A product whose weight is not trained."""

    weight: Tensor

    def __init__(self, weight: Array, scheme: Scheme, rounds_activations: bool, dtype: torch.dtype) -> None:
        """Takes the dequantized weight (N, K); see `LearnedProduct`."""
        super().__init__()
        self._scheme, self._rounds = scheme, rounds_activations
        self.register_buffer("weight", torch.from_numpy(weight).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, K) to (B, T, N)."""
        if self._rounds:
            x = round_activations(x, self._scheme)
        return F.linear(x.to(self.weight.dtype), self.weight).float()


def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """Returns the parameters of a product whose rows are those of several ones in turn."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
