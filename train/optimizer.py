"""Optimizers: which parameters go to which, and their state as named tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from slm.train.parallel import collect, shared_like

OptimizerName = Literal["adamw", "muon"]
Decay = Literal["matrices", "all"]


@dataclass(frozen=True)
class OptimizerSettings:
    """What `make_optimizers` needs to know; the fields are those of `slm.train.recipe.OptimizerRecipe`."""

    name: OptimizerName
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay: Decay
    momentum: float
    matrix_rate: float
    embedding_rate: float


class Optimizers:
    """One or more of torch's optimizers that step together, each group at its own multiple of one learning rate."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members

    @property
    def groups(self) -> list[dict[str, object]]:
        """The parameter groups of all of them; `rate` is a group's multiple of the learning rate."""
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

    def state_tensors(self, model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
        """Returns the state as `PARAMETER/NAME`, on the CPU; empty before the first update.

        Args:
            model: The one whose parameters are moved.
            keep: Whether this process wants it; see `slm.train.parallel.collect`.
        """
        state = (
            (f"{name}/{key}", value)
            for member in self.members
            for name, parameter in model.named_parameters()
            for key, value in member.state.get(parameter, {}).items()
        )
        return collect(state, keep)

    def load_state_tensors(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state_tensors` returned."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        parameters = dict(model.named_parameters())
        for member in self.members:
            ordered = [names[parameter] for group in member.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for number, name in enumerate(ordered):
                mine = {
                    key: shared_like(tensors[full], parameters[name])
                    for full in tensors
                    if (key := _key_of(full, name)) is not None
                }
                if mine:
                    state[number] = mine
            # Through torch's own loading, which puts each tensor where the fused kernels want it.
            member.load_state_dict({"state": state, "param_groups": member.state_dict()["param_groups"]})


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> Optimizers:
    """Returns AdamW (arXiv:1711.05101) over all parameters, or Muon over the blocks' matrices and AdamW over the rest.

    Muon (arXiv:2502.16982) moves a matrix by its momentum made orthogonal, scaled to the size that AdamW's steps have, so
    that one learning rate fits both. Embedding, head and norms are no maps from one hidden space to another: they stay
    with AdamW.

    Args:
        model: On its device already.
        settings: What the recipe says.
    """
    embeddings, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            others.append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    decay, decay_others = settings.weight_decay, settings.weight_decay if settings.decay == "all" else 0.0
    by_adamw = [_group(embeddings, decay, settings.embedding_rate), _group(others, decay_others, 1.0)]
    members: list[torch.optim.Optimizer] = []
    if settings.name == "muon":
        members.append(
            torch.optim.Muon(
                [_group(matrices, decay, settings.matrix_rate)],
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    else:
        by_adamw.append(_group(matrices, decay, settings.matrix_rate))
    groups = [group for group in by_adamw if group["params"]]
    members.append(torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True))
    return Optimizers(members)


def _group(parameters: list[nn.Parameter], decay: float, rate: float) -> dict[str, object]:
    return {"params": parameters, "weight_decay": decay, "rate": rate}


def _key_of(full: str, name: str) -> str | None:
    parameter, _, key = full.rpartition("/")
    return key if parameter == name else None
