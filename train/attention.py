"""The attention kernel of a training run: the recipe's `machine.attention` applied to the device."""

import shutil
from collections.abc import Callable

import torch
from torch.utils._triton import has_triton

from slm.core.config import ModelConfig
from slm.core.nn.flex import flex_failure
from slm.core.nn.kernels import AttentionKernel, attention_kernel, fits_flex
from slm.train.precision import Capability, Precision
from slm.train.recipe import Recipe


def wants_flex(recipe: Recipe, config: ModelConfig, able: Capability, precision: Precision) -> bool:
    """Returns whether settings and device call for FlexAttention.

    "auto" uses it on CUDA if a window is shorter than the context, products are computed in 16 bits, and the kernel's
    tiles fit into shared memory (`slm.core.nn.kernels.fits_flex`). Otherwise, and for rows of documents, scores are masked.
    """
    if able.device != "cuda" or recipe.machine.attention == "sdpa" or not _slides(recipe, config):
        return False
    if recipe.data.sampler == "best_fit":
        return False
    if recipe.machine.attention == "flex":
        return True
    return precision.autocast is not None and fits_flex(able.compute, config.head_dim)


def choose_flex(
    recipe: Recipe,
    config: ModelConfig,
    able: Capability,
    precision: Precision,
    device: torch.device,
    note: Callable[[str], None],
) -> bool:
    """Returns whether to use FlexAttention, after compiling it once to verify that it works on this machine.

    Args:
        recipe: The recipe.
        config: The model's shape.
        able: The capabilities of the device.
        precision: The type of the products.
        device: The device.
        note: Receives the reason if FlexAttention fails and masked attention replaces it.
    """
    if not wants_flex(recipe, config, able, precision):
        return False
    if not has_triton() or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        failure: str | None = "it needs Triton and a C compiler"
    else:
        failure = flex_failure(config, recipe.batch.context, device, precision.autocast or torch.float32)
    if failure is not None:
        note(f"warning: FlexAttention is not available here ({failure}); training masks attention scores instead")
    return failure is None


def training_kernels(
    recipe: Recipe, config: ModelConfig, able: Capability, precision: Precision
) -> tuple[AttentionKernel, ...]:
    """Returns the attention kernel of each layer."""
    flex = wants_flex(recipe, config, able, precision)
    dtype = precision.autocast or torch.float32
    return tuple(
        attention_kernel(able.compute, dtype, config.head_dim, masked=_masked(recipe, config, layer), flex=flex)
        for layer in range(config.num_hidden_layers)
    )


def _masked(recipe: Recipe, config: ModelConfig, layer: int) -> bool:
    """Returns whether a layer needs a mask: its window is shorter than the context of training, or rows have documents."""
    window = config.window(layer)
    return recipe.data.sampler == "best_fit" or (window is not None and recipe.batch.context > window)


def _slides(recipe: Recipe, config: ModelConfig) -> bool:
    return any(_masked(recipe, config, layer) for layer in range(config.num_hidden_layers))
