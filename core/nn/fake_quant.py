"""Fake quantization for quantization-aware training (arXiv:1712.05877).

Products compute with rounded weights and rounded inputs, the very values that the quantized bundle computes with. The backward
pass treats rounding as the identity (straight-through gradients, arXiv:1308.3432), so that training moves the weights in
float32. Parameters keep their names and values.

Dimensions: B batch, T positions, N output channels, K input channels, D hidden.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.core.grid import rounded, rounded_activations
from slm.core.manifest import Scheme
from slm.core.nn.layers import ScaledEmbedding
from slm.core.nn.model import CausalLM
from slm.core.qat import QatGrid


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        out: Tensor = rounded(weight.float(), scheme, torch)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class _RoundedActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block_size: int) -> Tensor:
        out: Tensor = rounded_activations(x.float(), block_size, torch)
        return out.type_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def round_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """Returns a weight (..., K) in float32 with its values on their grid, with a straight-through gradient."""
    out: Tensor = _RoundedWeight.apply(weight, scheme)
    return out


def round_activations(x: Tensor, scheme: Scheme) -> Tensor:
    """Returns the inputs (..., K) of a product as the kernel rounds them, with a straight-through gradient."""
    out: Tensor = _RoundedActivations.apply(x, scheme.block_size)
    return out


class _OnGrid(nn.Module):
    """A module with a weight (N, K) on a grid.

    Attributes:
        scheme: The grid's scheme.
        active: Whether training rounds; evaluation always does.
        held: Whether the weight already has rounded values (`rounded_in_place`).
    """

    weight: Tensor
    scheme: Scheme
    active = True
    held = False

    @property
    def rounds(self) -> bool:
        """Whether the forward pass rounds."""
        return self.active or not self.training

    def values(self, weight: Tensor) -> Tensor:
        """Returns the values of the weight, or of some of its rows, with which the forward pass computes."""
        return round_weight(weight, self.scheme) if self.rounds and not self.held else weight


class GridLinear(_OnGrid, nn.Linear):
    """A linear layer whose weight and inputs are rounded."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns inputs (..., K) and weight (N, K) of the product."""
        return round_activations(x, self.scheme) if self.rounds else x, self.values(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., K) to (..., N)."""
        return F.linear(*self.operands(x))


class GridEmbedding(_OnGrid, ScaledEmbedding):
    """A scaled embedding whose rows are rounded when they are looked up."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ids (B, T) to hidden states (B, T, D)."""
        found = self.values(F.embedding(input_ids, self.weight))
        return found * torch.tensor(self.embed_scale, dtype=found.dtype)


def operands(head: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns inputs and weight of a head's product, rounded if the head is on a grid."""
    return head.operands(x) if isinstance(head, GridLinear) else (x, head.weight)


def fake_quantize(model: CausalLM, grid: QatGrid) -> CausalLM:
    """Puts the products and the embedding of a model on a grid, in place, and returns the model.

    Args:
        model: The model. Its parameters keep their names, values and identity.
        grid: The grid.

    Raises:
        SlmError: If no block size divides the number of inputs of a product.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | ScaledEmbedding):
            continue
        outputs, inputs = module.weight.shape
        kind = GridLinear if isinstance(module, nn.Linear) else GridEmbedding
        sizes = (inputs, outputs) if isinstance(module, nn.Linear) else (outputs, inputs)
        without_bias = {"bias": False} if isinstance(module, nn.Linear) else {}
        new: _OnGrid = kind(*sizes, **without_bias, device="meta")  # type: ignore[arg-type]
        new.weight = module.weight
        new.scheme = grid.scheme(path, inputs)
        new.train(module.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model


def modules_on_grid(model: nn.Module) -> Iterator[_OnGrid]:
    """Yields the modules that `fake_quantize` has put on a grid."""
    return (module for module in model.modules() if isinstance(module, _OnGrid))


def set_active(model: nn.Module, active: bool) -> None:
    """Switches rounding in training on or off. Evaluation always rounds."""
    for module in modules_on_grid(model):
        module.active = active


@contextmanager
def rounded_in_place(model: nn.Module) -> Iterator[None]:
    """Replaces the weights by their rounded values within the block, in which nothing may be trained.

    Each process of a group rounds its own rows.
    """
    kept: dict[nn.Parameter, Tensor] = {}
    modules = list(modules_on_grid(model))
    try:
        for module in modules:
            parameter = module.weight
            assert isinstance(parameter, nn.Parameter)
            if parameter not in kept:  # a tied table belongs to two modules
                kept[parameter] = _local(parameter).clone()
                _local(parameter).copy_(round_weight(_local(parameter), module.scheme))
            module.held = True
        yield
    finally:
        for module in modules:
            module.held = False
        for parameter, values in kept.items():
            _local(parameter).copy_(values)


def round_weights(model: CausalLM, grid: QatGrid) -> None:
    """Replaces the weights of a model, on a grid or not, by their rounded values."""
    parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    for name, scheme in grid.schemes(model.config):
        parameter = parameters[name]
        with torch.no_grad():
            parameter.copy_(round_weight(parameter.detach(), scheme))


def _local(parameter: nn.Parameter) -> Tensor:
    """Returns the values of a parameter, or the rows that this process holds of it."""
    values = parameter.detach()
    return values.to_local() if hasattr(values, "to_local") else values
