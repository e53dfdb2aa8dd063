"""Products of the student: the integers of a plan, and scales that training can move.

Dimensions: B batch, T positions, N output channels, K input channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slm.core.manifest import Scheme
from slm.core.nn.fake_quant import round_activations
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, unpack
from slm.export.graph.builder import Array
from slm.quantize.plan import Arrays


class _Values(torch.autograd.Function):
    """The values (N, K) of integers (N, blocks, block) and scales (N, blocks). The backward pass needs no other array."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, integers: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(integers)
        return (integers * scale[..., None]).flatten(1).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (integers,) = ctx.saved_tensors
        return (gradient.view_as(integers) * integers).sum(-1, dtype=torch.float32), None, None


class LearnedProduct(nn.Module):
    """A product with fixed integers and trained scales.

    Attributes:
        change: The relative change of each scale, (N, blocks).
    """

    scale: Tensor
    integers: Tensor

    def __init__(self, arrays: Arrays, scheme: Scheme, rounds_activations: bool, dtype: torch.dtype) -> None:
        """Takes the parameters of the graph.

        Args:
            arrays: The parameters of the graph, by name.
            scheme: The scheme of the weight.
            rounds_activations: Whether the kernel rounds the inputs.
            dtype: The type of the product in training.
        """
        super().__init__()
        self._scheme, self._rounds, self._dtype = scheme, rounds_activations, dtype
        integers = unpack(arrays[QUANTIZED], scheme.bits, scheme.block_size).astype("int16")  # (N, blocks, block)
        if scheme.zero_points:
            integers -= unpack(arrays[ZERO_POINTS], scheme.bits, integers.shape[1])[..., None]
        else:
            integers -= 1 << (scheme.bits - 1)
        self.register_buffer("integers", torch.from_numpy(integers.astype("int8")))
        self.register_buffer("scale", torch.tensor(arrays[SCALE]))
        self.change = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, K) to (B, T, N)."""
        if self._rounds:
            x = round_activations(x, self._scheme)
        weight: Tensor = _Values.apply(self.scale * (1 + self.change), self.integers, self._dtype)
        return F.linear(x.to(self._dtype), weight).float()

    @torch.no_grad()
    def scales(self) -> Array:
        """Returns the trained scales, float32 (N, blocks)."""
        found: Array = (self.scale * (1 + self.change)).numpy()
        return found
