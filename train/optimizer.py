"""Optimizers: the parameters of each, and their state as named tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from slm.core.errors import SlmError
from slm.train.muon import ROW_MOMENT, Muon, NorMuon
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
    NorMuon: ("momentum_buffer", ROW_MOMENT),
}
_PUT_BACK = "put config.yaml back as it was, or start a new run"


class Named(Protocol):
    """A model, or the part of one that is trained."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns the parameters with the names under which their state is saved."""


class Optimizers:
    """One or more of torch's optimizers that step together; each group has its own multiple of one learning rate."""

    def __init__(self, members: list[torch.optim.Optimizer], *, cautious: bool = False) -> None:
        """Takes the optimizers.

        Args:
            members: The optimizers, over different parameters.
            cautious: Whether a weight decays only in steps that move it towards 0 (arXiv:2510.12402). The groups' own
                `weight_decay` is then 0, and `decay` has the share.
        """
        self.members = members
        self._cautious = cautious

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

    def set_momentum(self, momentum: float) -> None:
        """Sets the decay of Muon's momentum in the next update."""
        for group in self.groups:
            if "momentum" in group:
                group["momentum"] = momentum

    def set_decay(self, share: float) -> None:
        """Sets the weight decay of the next update, as a share of the recipe's."""
        for group in self.groups:
            base = group["base_decay"]
            assert isinstance(base, float)
            group["decay" if self._cautious else "weight_decay"] = base * share

    def step(self, by: Callable[[torch.optim.Optimizer], object] = lambda member: member.step()) -> None:
        """Makes a step of every optimizer.

        Args:
            by: Makes the step of one optimizer, such as `GradScaler.step`.
        """
        kept = [(group, p, p.detach().clone()) for group, p in self._decaying()]
        for member in self.members:
            by(member)
        for group, parameter, before in kept:
            decay_cautiously(parameter, before, group["lr"] * group["decay"])

    def _decaying(self) -> Iterable[tuple[dict[str, Any], nn.Parameter]]:
        """Yields the parameters that decay outside of the optimizers, with their groups."""
        if self._cautious:
            for member in self.members:
                for group in member.param_groups:
                    if group["decay"]:
                        yield from ((group, p) for p in group["params"] if p.grad is not None)

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
            f"{names[parameter]}/{key}": _shape(key, parameter)
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
    """Returns AdamW (arXiv:1711.05101) over all parameters, or Muon or NorMuon for the blocks' matrices and AdamW for the rest.

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
    everywhere = recipe.decay == "all"
    by_adamw = [
        _group(recipe, embeddings, recipe.embedding_rate, betas=recipe.embedding_betas or recipe.betas),
        _group(recipe, others, decays=everywhere, betas=recipe.norm_betas or recipe.betas),
    ]
    members: list[torch.optim.Optimizer] = []
    if recipe.orthogonalizes:
        members.append(_muon(recipe, _group(recipe, matrices, recipe.matrix_rate), matrices[0].device))
    else:
        by_adamw.append(_group(recipe, matrices, recipe.matrix_rate))
    groups = [group for group in by_adamw if group["params"]]
    members.append(torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True))
    return Optimizers(members, cautious=recipe.cautious)


def decay_cautiously(parameter: Tensor, before: Tensor, share: float) -> None:
    """Subtracts a share of a weight's value before a step where the step did not move it away from 0.

    Args:
        parameter: The weight after the step, without decay.
        before: The weight before the step.
        share: The weight decay times the learning rate.
    """
    with torch.no_grad():
        towards = (before - parameter.detach()) * before >= 0
        parameter.sub_(before * towards, alpha=share)


def _muon(recipe: "OptimizerRecipe", group: dict[str, object], device: torch.device) -> torch.optim.Optimizer:
    dtype = torch.float16 if _emulates_bfloat16(device) else torch.bfloat16
    if recipe.name == "normuon":
        return NorMuon([group], momentum=recipe.momentum, dtype=dtype, row_beta=recipe.row_beta)
    if dtype == torch.float16:
        return Muon([group], momentum=recipe.momentum, dtype=dtype)
    return torch.optim.Muon([group], momentum=recipe.momentum, adjust_lr_fn="match_rms_adamw")


def _emulates_bfloat16(device: torch.device) -> bool:
    """Returns whether a device is a GPU without native bfloat16; CPUs emulate it fast enough."""
    able = capability(device)
    return able.device == "cuda" and not able.bf16


def _group(
    recipe: "OptimizerRecipe", parameters: list[nn.Parameter], rate: float = 1.0, *, decays: bool = True, **more: object
) -> dict[str, object]:
    decay = recipe.weight_decay if decays else 0.0
    own = 0.0 if recipe.cautious else decay
    return {"params": parameters, "weight_decay": own, "base_decay": decay, "decay": decay, "rate": rate, **more}


def _shape(key: str, parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter's state."""
    if key == _COUNT:
        return torch.Size()
    return torch.Size((len(parameter), 1)) if key == ROW_MOMENT else parameter.shape


def _parameters(member: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns an optimizer's parameters in the order of its `state_dict`."""
    return [parameter for group in member.param_groups for parameter in group["params"]]
