"""Rotary position embedding (arXiv:2104.09864) that pairs the first half of each head with the second.

Dimensions: B batch, N heads, T positions, H head dim.
"""

import torch
from torch import Tensor

from slm.core.config import RopeParameters


def rope_angles(positions: Tensor, head_dim: int, rope: RopeParameters) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine, float32 (B, 1, T, H/2), for positions (B, T)."""
    # Computed in float64 and rounded once: an error of one unit in the last place of a frequency changes angles by 1e-4 at
    # 1,500 positions, and the exported tables must have the same angles.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    inverse_frequency = (rope.rope_theta**-exponents / rope.factor).float()
    angles = positions[:, None, :, None].float() * inverse_frequency
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, N, T, H) by its positions' angles; same shape and dtype."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
