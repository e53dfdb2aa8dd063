"""Rotary position embedding (arXiv:2104.09864), the two halves of a head rotated against each other.

Dimensions: B batch, N heads, T positions, H head dim.
"""

import torch
from torch import Tensor

from slm.core.config import RopeParameters


def rope_angles(positions: Tensor, head_dim: int, rope: RopeParameters) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine, float32 (B, 1, T, H/2), for positions (B, T)."""
    # In float64 and rounded once: a frequency that is off by one unit in the last place turns by 1e-4 within 1,500
    # positions, and the exported tables must turn alike.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    inverse_frequency = (rope.rope_theta**-exponents / rope.factor).float()
    angles = positions[:, None, :, None].float() * inverse_frequency
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, N, T, H) by its positions' angles; same shape and dtype."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.type_as(x), sin.type_as(x)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
