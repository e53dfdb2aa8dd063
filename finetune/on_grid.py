"""Quantization-aware fine-tuning of an adapter: the sum of a frozen matrix and its update is rounded, as merging rounds it.

Dimensions: N rows of all texts, I inputs, O outputs, R rank, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slm.core.grid import rounded
from slm.core.manifest import Scheme
from slm.core.nn.fake_quant import round_activations, round_weight
from slm.finetune.adapter import ADAPTER, TunableLM, trained_rows

Forward = Callable[[Tensor], Tensor]


def frozen_on_grid(module: nn.Linear, scheme: Scheme, products: torch.dtype | None) -> Forward:
    """Rounds the frozen weight of a product, permanently; returns a forward method that rounds its inputs.

    Args:
        module: The product.
        scheme: The scheme of its weight.
        products: The autocast type of every later forward pass; None for no autocast.
    """
    values = round_weight(module.weight.data, scheme)
    module.weight.data = values if products is None else values.to(products)

    def forward(x: Tensor) -> Tensor:
        return F.linear(round_activations(x, scheme).to(module.weight.dtype), module.weight)

    return forward


def adapted_on_grid(module: LoraLinear, scheme: Scheme, products: torch.dtype | None) -> Forward:
    """Returns the forward method of a projection with its adapter: the rounded W + s B A, times the rounded inputs.

    With DoRA, the rows of W + s B A are first scaled to their magnitudes.

    Args:
        module: The projection. Its adapter has no dropout.
        scheme: The scheme of the merged weight.
        products: The autocast type of every later forward pass; None for no autocast.
    """
    base = module.get_base_layer()
    lora_a, lora_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    scale = float(module.scaling[ADAPTER])
    dora = dict(module.lora_magnitude_vector).get(ADAPTER)
    parts = [lora_a, lora_b] if dora is None else [lora_a, lora_b, dora.weight]
    kept: list[tuple[tuple[int, ...], Tensor]] = []  # evaluation rounds the weight once, and training at every step

    @torch.no_grad()
    def merged() -> tuple[Tensor, Tensor | None]:
        """Returns the rounded weight (O, I), and for DoRA the sum W + s B A (O, I) whose rows are scaled before rounding."""
        with torch.autocast(lora_a.device.type, enabled=False):
            total = torch.addmm(base.weight.float(), lora_b, lora_a, alpha=scale)
            scaled = total if dora is None else total * (dora.weight / torch.linalg.vector_norm(total, dim=1))[:, None]
            values = rounded(scaled, scheme, torch)
        return values if products is None else values.to(products), None if dora is None else total

    def forward(x: Tensor) -> Tensor:
        versions = tuple(part._version for part in parts)
        if not torch.is_grad_enabled():
            if not kept or kept[0][0] != versions:
                kept[:] = [(versions, merged()[0])]
            weight = kept[0][1]
            return F.linear(round_activations(x, scheme).to(weight.dtype), weight)
        kept.clear()
        weight, total = merged()
        # The gradient of the norms is left out, as in the paper (arXiv:2402.09353, 4.3).
        ratio = None if dora is None or total is None else dora.weight / torch.linalg.vector_norm(total, dim=1)
        x = round_activations(x, scheme).to(weight.dtype)
        out: Tensor = _AdaptedOnGrid.apply(x, weight, lora_a, lora_b, scale, ratio, total)
        return out

    return forward


class _AdaptedOnGrid(torch.autograd.Function):
    """x Qᵀ for inputs x (…, I) and the rounded Q (O, I), with the gradients of the unrounded diag(r) (W + s B A).

    `ratio` is r (O,), and `total` the sum W + s B A (O, I); both are None without DoRA.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        ratio: Tensor | None,
        total: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])  # (N, I)
            out = rows @ weight.T  # (N, O)
            low = rows @ lora_a.to(x.dtype).T  # (N, R)
        ctx.save_for_backward(rows, low, weight, lora_a, lora_b, ratio, total)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, low, weight, lora_a, lora_b, ratio, total = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            rows = gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)  # (N, O)
            of_x = (rows @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
            of_ratio = None
            if ratio is not None:
                of_ratio = ((rows.T @ read) * total).sum(1).to(ratio.dtype)
                rows = rows * ratio.to(rows.dtype)
            of_low = (rows @ lora_b.to(rows.dtype)).mul_(ctx.scale)  # (N, R)
            of_a = (of_low.T @ read).to(lora_a.dtype)
            of_b = (rows.T @ low).to(lora_b.dtype).mul_(ctx.scale)
        return of_x, None, of_a, of_b, None, of_ratio, None


def round_tables(model: TunableLM, scheme: Scheme) -> None:
    """Rounds the frozen matrices of embedding and head, permanently; a tied one once."""
    table, head = trained_rows(model.model.embed_tokens)[0], trained_rows(model.lm_head)[0]
    tied = head.data_ptr() == table.data_ptr()
    table.data = round_weight(table.data, scheme)
    head.data = table.data if tied else round_weight(head.data, scheme)


def head_on_grid(model: TunableLM, scheme: Scheme) -> Forward:
    """Returns the forward method of a head whose matrix is already rounded: it rounds its inputs, and trained rows."""

    def forward(hidden: Tensor) -> Tensor:
        weight, rows = trained_rows(model.lm_head)
        x = round_activations(hidden, scheme)
        logits = F.linear(x.to(weight.dtype), weight)
        if rows is not None:
            logits = logits.index_copy(
                -1,
                torch.tensor(rows[0], device=logits.device),
                F.linear(x.to(weight.dtype), round_weight(rows[1], scheme)),
            )
        return logits

    return forward
