"""Chooses the attention kernel by device, type, mask and head size.

`scaled_dot_product_attention` of PyTorch 2.13 has three kernels on CUDA:

- flash: 16-bit types, compute capability 8.0 and up, `head_dim` up to 256, no mask; query heads may share a key head;
- memory-efficient: every float type, every capability, with or without a mask; each query head needs its own key head;
- math: everything, with all scores in float32 in memory.

A call with `enable_gqa=True` that flash does not support uses math. Keys and values are therefore expanded where flash does
not apply.
"""

from typing import Literal

import torch

# The compute capability of a CUDA device, (major, minor); None for a CPU.
ComputeCapability = tuple[int, int] | None

AttentionKernel = Literal["cpu", "flash", "efficient", "flex"]

_FLASH_FROM = (8, 0)
_FLASH_HEAD_DIM = 256
# With head_dim 256, FlexAttention's tiles need more than the 99 KiB of shared memory per block on 8.6, 8.9 and 12.x, and
# more than the 64 KiB on 7.5 (pytorch issues 143832, 180278). 9.x to 11.x have 227 KiB. 8.0 has 163 KiB, but uses the tile
# sizes of 8.6.
_FLEX_FROM = (8, 0)
_FLEX_HEAD_DIM = 128
_FLEX_LARGE_HEAD_DIM = 256
_FLEX_LARGE_MAJORS = (9, 10, 11)


def attention_kernel(
    compute: ComputeCapability, dtype: torch.dtype, head_dim: int, *, masked: bool, flex: bool = False
) -> AttentionKernel:
    """Returns the kernel that computes attention.

    Args:
        compute: Compute capability of the device; None for a CPU.
        dtype: Type of queries, keys and values in the kernel, after autocast.
        head_dim: Dimensions of a head.
        masked: Whether there is a mask other than the causal one.
        flex: Whether window masks are FlexAttention's block masks.
    """
    if compute is None:
        return "cpu"
    if masked and flex:
        return "flex"
    half = dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and not masked and compute >= _FLASH_FROM and head_dim <= _FLASH_HEAD_DIM else "efficient"


def shares_heads(kernel: AttentionKernel) -> bool:
    """Returns whether a kernel lets query heads share a key head; otherwise keys and values are expanded first."""
    return kernel != "efficient"


def fits_flex(compute: ComputeCapability, head_dim: int) -> bool:
    """Returns whether FlexAttention's tiles, forward and backward, fit into the device's shared memory."""
    if compute is None or compute < _FLEX_FROM:
        return False
    return head_dim <= (_FLEX_LARGE_HEAD_DIM if compute[0] in _FLEX_LARGE_MAJORS else _FLEX_HEAD_DIM)


def compute_capability(device: torch.device) -> ComputeCapability:
    """Returns the compute capability of a CUDA device, None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def products_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the type of matrix products with a weight: autocast's type if it is enabled, or the weight's own."""
    kind = weight.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype
