"""Faster training of a model with an adapter: peft's arithmetic, without the work that frozen weights make unnecessary.

peft's modules keep the parameters; their forward methods are replaced. Frozen matrices are cast to the type of the products
once, where autocast would cast them in every forward pass. A projection and its adapter are one operation that saves only its
input for the backward pass. Norms have frozen gains, and those before products return the type of the products. Trained rows
of the embedding and of the head are inserted where they are used; peft copies the whole table for them, and its gradient.

Dimensions: B rows, T positions, N = B · T, I inputs, O outputs, R rank, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slm.core.nn.fake_quant import round_weight
from slm.core.nn.layers import RMSNorm, ScaledEmbedding
from slm.core.nn.norm import normalize
from slm.core.qat import QatGrid
from slm.finetune.adapter import ADAPTER, TunableLM, trained_rows
from slm.finetune.on_grid import adapted_on_grid, frozen_on_grid, head_on_grid, round_tables

# Rows of the embedding that are compared in one step.
_PART = 4096
# Norms whose output only goes into products.
_INTO_PRODUCTS = ("input_layernorm", "pre_feedforward_layernorm")


def lighten(model: TunableLM, products: torch.dtype | None, grid: QatGrid | None = None) -> None:
    """Replaces the forward methods of a model with a new adapter.

    Args:
        model: The model, on its device, in float32; its frozen matrices change their type permanently.
        products: The autocast type of every later forward pass; None for no autocast.
        grid: The grid of quantization-aware training; None without it.
    """
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, RMSNorm):
            _replace(module, _normed(module, None))
        elif grid is not None and isinstance(module, LoraLinear | nn.Linear):
            _put_on_grid(module, name, products, grid)
        elif isinstance(module, LoraLinear):
            _replace(module, _adapted(module, products))
        elif isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = _cast(module.weight.data, products)
    if products is not None and grid is None:  # rounding needs inputs in float32
        for name, module in model.model.layers.named_modules():
            if isinstance(module, RMSNorm) and name.endswith(_INTO_PRODUCTS):
                _replace(module, _normed(module, products))
    if grid is not None:
        model.head_scheme = grid.scheme("lm_head", model.model.norm.weight.shape[0])
        round_tables(model, model.head_scheme)
        _replace(model.lm_head, head_on_grid(model, model.head_scheme))
    _replace(model.model.norm, _normed(model.model.norm, products if grid is None else None))
    _embed_and_head(model, products)


def _put_on_grid(module: LoraLinear | nn.Linear, name: str, products: torch.dtype | None, grid: QatGrid) -> None:
    if isinstance(module, LoraLinear):
        base = module.get_base_layer()
        scheme = grid.scheme(f"model.layers.{name}", base.in_features)
        _replace(module, adapted_on_grid(module, scheme, products))
    elif not (module.weight.requires_grad or name.endswith(".base_layer")):
        _replace(module, frozen_on_grid(module, grid.scheme(f"model.layers.{name}", module.in_features), products))


def _replace(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    setattr(module, "forward", forward)  # noqa: B010  # mypy takes methods for fixed


def _cast(weight: Tensor, products: torch.dtype | None) -> Tensor:
    return weight if products is None else weight.to(products)


def _adapted(module: LoraLinear, products: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Returns a projection with its adapter: W x + s B A x, and with DoRA each output scaled to its own magnitude."""
    base = module.get_base_layer()
    lora_a, lora_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    dropout, scale = module.lora_dropout[ADAPTER], float(module.scaling[ADAPTER])
    dora = dict(module.lora_magnitude_vector).get(ADAPTER)
    norms = _NormOfSum(base.weight.data, scale) if dora is not None else None
    base.weight.data = _cast(base.weight.data, products)

    def forward(x: Tensor) -> Tensor:
        weight = base.weight
        x = x.to(weight.dtype)
        seen = dropout(x) if module.training and isinstance(dropout, nn.Dropout) else None
        out: Tensor = _Adapted.apply(x, seen, weight, lora_a, lora_b, scale)
        if dora is not None and norms is not None:
            out = out * (dora.weight / norms(lora_a, lora_b)).to(out.dtype)
        return out

    return forward


class _NormOfSum:
    """The norms of the rows of W + s B A, without computing the sum: |w|² + 2 s w·(BA) + s² |BA|²."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        self._weight, self._scale = weight, scale
        self._squares = weight.square().sum(1)  # (O,)

    @torch.no_grad()
    def __call__(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Returns the norms (O,) in float32, without their gradient, as in the paper (arXiv:2402.09353, 4.3)."""
        with torch.autocast(lora_a.device.type, enabled=False):
            crossed = ((self._weight @ lora_a.T) * lora_b).sum(1)
            of_update = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(1)
            squares = self._squares + 2 * self._scale * crossed + self._scale**2 * of_update
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


class _Adapted(torch.autograd.Function):
    """x Wᵀ + s y Aᵀ Bᵀ for inputs x (…, I), where the adapter reads y: x itself, or x after dropout."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seen: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])  # (N, I)
            read = rows if seen is None else seen.reshape(-1, x.shape[-1])
            low = read @ lora_a.to(x.dtype).T  # (N, R)
            out = (rows @ weight.T).addmm_(low, lora_b.to(x.dtype).T, alpha=scale)  # (N, O)
        ctx.save_for_backward(read, low, weight, lora_a, lora_b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, low, weight, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_seen = ctx.needs_input_grad[:2]
        with torch.autocast(gradient.device.type, enabled=False):
            rows = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
            of_low = (rows @ lora_b.to(rows.dtype)).mul_(ctx.scale)  # (N, R)
            of_a = (of_low.T @ read).to(lora_a.dtype)
            of_b = (rows.T @ low).to(lora_b.dtype).mul_(ctx.scale)
            of_x = of_seen = None
            if wants_x:
                of_x = rows @ weight  # (N, I)
                if not wants_seen:
                    of_x.addmm_(of_low, lora_a.to(rows.dtype))
                of_x = of_x.view(ctx.shape)
            if wants_seen:
                of_seen = (of_low @ lora_a.to(rows.dtype)).view(ctx.shape)
        return of_x, of_seen, None, of_a, of_b, None


def _normed(module: RMSNorm, products: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Returns a norm with a frozen gain, whose output is in the type of the products if one is given."""
    gain = 1.0 + module.weight.data.float()

    def forward(x: Tensor) -> Tensor:
        return normalize(x, gain, module.eps, products)

    return forward


def _embed_and_head(model: TunableLM, products: torch.dtype | None) -> None:
    """Replaces the embedding, and gives the head its matrix in the type of the products."""
    wrapped, head = model.model.embed_tokens, trained_rows(model.lm_head)[0]
    table, rows = trained_rows(wrapped)
    plain: ScaledEmbedding = wrapped.original_module if isinstance(wrapped, TrainableTokensWrapper) else wrapped
    tied = head.data_ptr() == table.data_ptr()
    if products is not None:
        exact = _cast(table.data, products)
        # True of Gemma's weights: one table serves both. Compared in parts, because it is most of a small model.
        if all(torch.equal(a.float(), b) for a, b in zip(exact.split(_PART), table.data.split(_PART), strict=True)):
            table.data = exact
            model.head_weight = table.data if tied else _cast(head.data, products)
        else:
            model.head_weight = exact if tied else _cast(head.data, products)
        if not tied:
            head.data = model.head_weight
    scale = plain.embed_scale
    place = torch.full(
        (len(table),), -1, dtype=torch.int64, device=table.device
    )  # index of each token among the trained rows
    if rows is not None:
        place[torch.tensor(rows[0], device=table.device)] = torch.arange(len(rows[0]), device=table.device)

    def embed(input_ids: Tensor) -> Tensor:
        found = F.embedding(input_ids, plain.weight.detach()).float()  # (B, T, D)
        if rows is not None:
            row = place[input_ids]
            values = rows[1] if model.head_scheme is None else round_weight(rows[1], model.head_scheme)
            found = torch.where((row >= 0)[..., None], values[row.clamp(min=0)], found)
        return found * scale

    _replace(wrapped, embed)
