"""AdamW, its groups, and its state as named tensors."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Decay = Literal["matrices", "all"]


def make_adamw(
    model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float, decay: Decay
) -> torch.optim.AdamW:
    """Returns AdamW (arXiv:1711.05101) over all parameters; the loop sets the learning rate before every update.

    Args:
        model: On its device already.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Share of a weight taken away at every update, times the learning rate.
        decay: What is decayed: "matrices" leaves the norms alone, "all" does not.
    """
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1 or decay == "all"]
    others = [p for p in parameters if p.dim() <= 1 and decay != "all"]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizer's state as `PARAMETER/NAME`, on the CPU; empty before the first update."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state_tensors` returned."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(ordered)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(number[name], {})[key] = tensor
    # Through torch's own loading, which puts each tensor where the fused kernels want it.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
