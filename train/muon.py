"""Muon (arXiv:2502.16982) for GPUs without native bfloat16, and NorMuon (arXiv:2510.05491).

`torch.optim.Muon` orthogonalizes in bfloat16, which a GPU below compute capability 8.0 emulates. This is the same step with
a choice of type. float16 has enough range for it: the iteration works on a matrix of Frobenius norm 1, whose entries and
products stay far from float16's limits, and float16 rounds eight times as finely as bfloat16.

NorMuon divides each row of the orthogonalized momentum by the root of the row's second moment: the iteration leaves rows of
very different lengths, so that some outputs of a matrix learn much faster than others.

Dimensions: M rows and N columns of a matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

# Name of the state that NorMuon has besides Muon's.
ROW_MOMENT = "row_moment"
# Keller Jordan's coefficients of the quintic iteration, and its number of steps, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps a matrix (M, N) to one with singular values near 1 and the same singular vectors, by Newton-Schulz iteration.

    Args:
        matrix: The matrix, in float32.
        dtype: Type of the products.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    # In float32: the norm of a large gradient would overflow float16.
    x = (matrix / matrix.norm().clamp(min=_EPS)).to(dtype)
    x = x if wide else x.T
    for _ in range(_STEPS):
        gram = x @ x.T  # (min(M, N), min(M, N))
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and steps scaled to the size that AdamW's have.

    Attributes:
        dtype: Type of the products that orthogonalize.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, weight_decay: float = 0.1, momentum: float = 0.95, dtype: torch.dtype
    ) -> None:
        """Prepares the first step.

        Args:
            params: Parameters or groups of them, each with two dimensions.
            lr: Learning rate.
            weight_decay: Share of a weight subtracted at every step, times the learning rate.
            momentum: Decay of the momentum.
            dtype: See the attribute.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes one step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group["lr"], group["weight_decay"], group["momentum"])

    def _step(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = orthogonalize(grad.lerp(buffer, momentum), self.dtype)
        parameter.mul_(1 - lr * weight_decay)
        update, scale = self._sized(update, state)
        parameter.add_(update, alpha=-lr * scale)

    def _sized(self, update: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Returns the direction of a step (M, N) and the factor that gives it the size of AdamW's.

        Args:
            update: The orthogonalized momentum (M, N).
            state: The state of the parameter.
        """
        return update, 0.2 * max(update.shape) ** 0.5


class NorMuon(Muon):
    """Muon with rows of equal size: each is divided by the root of a moving average of its mean square.

    The state `row_moment` (M, 1) begins at 0. Its bias is the same for all rows, and vanishes when the step is scaled.

    Attributes:
        row_beta: Decay of the moving average.
    """

    def __init__(self, params: Any, *, momentum: float, dtype: torch.dtype, row_beta: float) -> None:
        """Prepares the first step; see `Muon`."""
        super().__init__(params, momentum=momentum, dtype=dtype)
        self.row_beta = row_beta

    @override
    def _sized(self, update: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, float]:
        update = update.float()
        mean_square = update.square().mean(1, keepdim=True)  # (M, 1)
        if ROW_MOMENT not in state:
            state[ROW_MOMENT] = torch.zeros_like(mean_square)
        moment = state[ROW_MOMENT].lerp_(mean_square, 1 - self.row_beta)
        update = update / (moment.sqrt() + _EPS)
        # Scaled on the device: a Python number would wait for the GPU once for each matrix.
        return update.mul_(update.numel() ** 0.5 / update.norm().clamp(min=_EPS)), 0.2


def orthogonalization_flops(rows: int, columns: int) -> int:
    """Returns the floating-point operations of `orthogonalize` for one matrix."""
    short, long = min(rows, columns), max(rows, columns)
    return _STEPS * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
