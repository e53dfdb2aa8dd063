"""RMSNorm, scaled embedding and gated MLP of Gemma 3 (arXiv:2503.19786).

Dimensions: B batch, T positions, D hidden, F intermediate, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.core.config import Activation, ModelConfig
from slm.core.nn.norm import normalize


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), its gain stored as the offset from 1.

    Computes in float32 for every input type: Gemma's residual stream exceeds 65,504, the largest float16.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized `x` in its own dtype and shape."""
        gain = 1.0 + self.weight.float()
        # On CUDA, rms_norm is one operation already; compiled code fuses it.
        if torch.is_grad_enabled() and not (x.is_cuda or torch.compiler.is_compiling()):
            return normalize(x, gain, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, gain, self.eps).type_as(x)


class ScaledEmbedding(nn.Embedding):
    """Token embedding multiplied by sqrt(D); a tied head uses the table without the factor."""

    @property
    def embed_scale(self) -> float:
        """The factor, under transformers' name: peft reads it when it looks up trained rows itself."""
        return self.embedding_dim**0.5

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ids (B, T) to hidden states (B, T, D)."""
        return super().forward(input_ids) * torch.tensor(self.embed_scale, dtype=self.weight.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns GELU (arXiv:1606.08415) in its tanh approximation; same shape and dtype.

    Compiled code uses the logistic function, which gives the same: 1 + tanh(z) = 2 / (1 + exp(-2z)). Vectorized on a CPU, its
    exponential takes less than half as long as tanh.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """Gated MLP (arXiv:2002.05202); Gemma's activation is the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_activation]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, D) to (B, T, D) through F."""
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out
