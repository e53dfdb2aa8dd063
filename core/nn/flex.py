"""Sliding-window attention with FlexAttention (arXiv:2412.05496), which skips blocks of scores outside the window.

It is faster on CUDA, where it compiles to one kernel. Elsewhere it computes all scores, masks them, and has no backward pass.

Dimensions: B batch, T positions, N heads, K kv heads, H head dim.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from slm.core.config import ModelConfig

__all__ = ["BlockMask", "attend_in_blocks", "flex_failure", "window_mask"]

# The longest quote of a compiler's message, in characters.
_MAX_REASON = 160


@lru_cache(maxsize=8)
def window_mask(length: int, window: int, device: torch.device) -> BlockMask:
    """Returns the mask of blocks in a (T, T) score matrix that a causal window touches; `window` includes the query."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(seen, None, None, length, length, device=str(device))


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Maps queries (B, N, T, H) and keys and values (B, K, T, H) to (B, N, T, H)."""
    attend: Any = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    return out


def flex_failure(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compiles the forward and backward kernels for a model's heads and runs them once.

    Args:
        config: The model's shape.
        length: T.
        device: The device to compile for.
        dtype: Type of queries, keys and values.

    Returns:
        The reason why the kernels do not work on the device, in one line; None if they work.
    """
    q, k, v = (
        torch.randn(1, heads, length, config.head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    try:
        attend_in_blocks(q, k, v, window_mask(length, config.sliding_window, device), 1.0).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # the compiler, Triton and the driver have no narrower base class in common
        return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
    return None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)
