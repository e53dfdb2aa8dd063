"""Grouped-query attention (arXiv:2305.13245) with QK-norm before rotation, global or within a sliding window.

Dimensions: B batch, T new positions, S visible positions, N heads, K kv heads, H head dim, D hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.core.config import ModelConfig
from slm.core.nn.cache import LayerCache
from slm.core.nn.flex import BlockMask, attend_in_blocks
from slm.core.nn.kernels import AttentionKernel, shares_heads
from slm.core.nn.layers import RMSNorm
from slm.core.nn.rope import apply_rope

# The longest text, in tokens, for `attend_in_products`. A CPU trains faster with four plain matrix products than with its
# fused kernel, whose backward pass over 8 rows of 128 tokens takes eight times as long as its forward pass. Longer texts
# would need too much memory for scores.
SHORT = 128


@dataclass(frozen=True)
class Positions:
    """Rotation and mask of the new positions, for one kind of layer.

    Attributes:
        cos: Cosine of the rotation, (B, 1, T, H/2).
        sin: Sine of the rotation, (B, 1, T, H/2).
        mask: True where a query attends to a key, (B, 1, T, S); None for plain causal attention; blocks for FlexAttention.
        kernel: The kernel that computes attention (`slm.core.nn.kernels`).
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None
    kernel: AttentionKernel = "cpu"

    def apart(self, segments: Tensor) -> "Positions":
        """Returns the positions for rows that pack several texts, numbered by `segments` (B, T); texts are masked apart.

        Rotation depends on distance only, so positions need not restart at each text.
        """
        length = segments.shape[1]
        same = segments[:, None, :, None] == segments[:, None, None, :]  # (B, 1, T, T)
        kernel: AttentionKernel = "efficient" if segments.is_cuda else "cpu"  # flash does not support masks
        if self.mask is None:
            return Positions(self.cos, self.sin, same.tril(), kernel)
        assert isinstance(self.mask, Tensor) and self.mask.shape[-1] == length, "texts of a row are kept apart by masks"
        return Positions(self.cos, self.sin, same & self.mask, kernel)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Maps keys or values (B, K, T, H) to (B, heads, T, H); each is repeated for the query heads that share it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def attend_in_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Maps queries (B, N, T, H) and keys and values (B, K, T, H) to (B, N, T, H), with causal attention.

    Computes the same as scaled_dot_product_attention, with all scores in memory, in float32.
    """
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, group · T, H)
    scores = (rows @ k.transpose(2, 3)).float() * scale  # (B, K, group · T, T)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)
    shares = scores.masked_fill(future, -torch.inf).softmax(-1).type_as(v)
    return (shares @ v).unflatten(2, (group, length)).flatten(1, 2)


class Attention(nn.Module):
    """Attention of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, N or K, T, H)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = apply_rope(self.q_norm(q), positions.cos, positions.sin)
        k = apply_rope(self.k_norm(k), positions.cos, positions.sin)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, H)
        mask = positions.mask
        if isinstance(mask, BlockMask):
            attended = attend_in_blocks(q, k, v, mask, self.scale)
        elif mask is None and self.training and q.shape[2] <= SHORT and not q.is_cuda:
            attended = attend_in_products(q, k, v, self.scale)
        else:
            shared = shares_heads(positions.kernel)
            if not shared:
                k, v = (expand_heads(each, q.shape[1]) for each in (k, v))  # (B, N, S, H)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=shared
            )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out
