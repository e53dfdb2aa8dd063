"""Optimizers: the parameters of each, and their state as named tensors."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.train.muon import Muon
from slm.train.parallel import collect, shared_like
from slm.train.precision import capability

if TYPE_CHECKING:
    from slm.train.sections import OptimizerRecipe

# State per parameter after the first step: a count of steps, and tensors of the parameter's shape.
_COUNT = "step"
_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: (_COUNT, "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
    Muon: ("momentum_buffer",),
}
_PUT_BACK = "put config.yaml back as it was, or start a new run"


class Named(Protocol):
    """A model, or the part of one that is trained."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns the parameters with the names under which their state is saved."""


class Optimizers:
    """One or more of torch's optimizers that step together; each group has its own multiple of one learning rate."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members

    @property
    def groups(self) -> list[dict[str, object]]:
        """The parameter groups of all optimizers; `rate` is a group's multiple of the learning rate."""
        return [group for member in self.members for group in member.param_groups]

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""
        for group in self.groups:
            multiple = group["rate"]
            assert isinstance(multiple, float)
            group["lr"] = rate * multiple

    def state_tensors(self, model: Named, keep: bool = True) -> dict[str, Tensor]:
        """Returns the state as `PARAMETER/NAME`, on the CPU; empty before the first update.

        Args:
            model: The owner of the parameters.
            keep: Whether this process needs the state; see `slm.train.parallel.collect`.
        """
        state = (
            (f"{name}/{key}", value)
            for member in self.members
            for name, parameter in model.named_parameters()
            for key, value in member.state.get(parameter, {}).items()
        )
        return collect(state, keep)

    def load_state_tensors(self, model: Named, tensors: Mapping[str, Tensor], hint: str = _PUT_BACK) -> None:
        """Restores the state that `state_tensors` returned.

        Args:
            model: The owner of the parameters.
            tensors: The state; empty before the first update.
            hint: What to do if it does not fit.

        Raises:
            SlmError: When the state is of another model or another optimizer, or incomplete.
        """
        if not tensors:  # saved before the first update
            for member in self.members:
                member.state.clear()
            return
        names = {parameter: name for name, parameter in model.named_parameters()}
        wanted = {
            f"{names[parameter]}/{key}": torch.Size() if key == _COUNT else parameter.shape
            for member in self.members
            for parameter in _parameters(member)
            for key in _STATE[type(member)]
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            what = "missing" if odd[0] not in found else "unknown" if odd[0] not in wanted else "of another shape"
            raise SlmError(
                f"the saved state of the optimizer does not fit the model: {odd[0]} is {what}",
                hint,
            )
        for member in self.members:
            state = {
                number: {
                    key: shared_like(tensors[f"{names[parameter]}/{key}"], parameter) for key in _STATE[type(member)]
                }
                for number, parameter in enumerate(_parameters(member))
            }
            # load_state_dict puts each tensor where the fused kernels expect it.
            member.load_state_dict({"state": state, "param_groups": member.state_dict()["param_groups"]})


def make_optimizers(model: nn.Module, recipe: "OptimizerRecipe") -> Optimizers:
    """Returns AdamW (arXiv:1711.05101) over all parameters, or Muon over the blocks' matrices and AdamW over the rest.

    Muon (arXiv:2502.16982) moves a matrix by its orthogonalized momentum, scaled to the size of AdamW's steps, so that one
    learning rate fits both. Embedding, head and norms do not map one hidden space to another, and stay with AdamW.

    Args:
        model: The model, on its device.
        recipe: The section of the recipe; clipping and averaging happen elsewhere.
    """
    embeddings, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            others.append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    decay, decay_others = recipe.weight_decay, recipe.weight_decay if recipe.decay == "all" else 0.0
    by_adamw = [_group(embeddings, decay, recipe.embedding_rate), _group(others, decay_others, 1.0)]
    members: list[torch.optim.Optimizer] = []
    if recipe.name == "muon":
        group = [_group(matrices, decay, recipe.matrix_rate)]
        if _emulates_bfloat16(matrices[0].device):
            members.append(Muon(group, momentum=recipe.momentum, dtype=torch.float16))
        else:
            members.append(torch.optim.Muon(group, momentum=recipe.momentum, adjust_lr_fn="match_rms_adamw"))
    else:
        by_adamw.append(_group(matrices, decay, recipe.matrix_rate))
    groups = [group for group in by_adamw if group["params"]]
    members.append(torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True))
    return Optimizers(members)


def _emulates_bfloat16(device: torch.device) -> bool:
    """Returns whether a device is a GPU without native bfloat16; CPUs emulate it fast enough."""
    able = capability(device)
    return able.device == "cuda" and not able.bf16


def _group(parameters: list[nn.Parameter], decay: float, rate: float) -> dict[str, object]:
    return {"params": parameters, "weight_decay": decay, "rate": rate}


def _parameters(member: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns an optimizer's parameters in the order of its `state_dict`."""
    return [parameter for group in member.param_groups for parameter in group["params"]]
