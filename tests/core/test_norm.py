"""RMSNorm in training on a CPU: one operation with the values and gradients of PyTorch's composed operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slm.core.nn import layers
from slm.core.nn.layers import RMSNorm
from slm.core.nn.norm import normalize

EPS = 1e-6
# Of the largest value: both compute in float32, in another order.
FLOAT32_TOLERANCE = 1e-6
# Of the largest value: one rounding to bfloat16.
BFLOAT16_TOLERANCE = 2**-8


def composed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), gain.shape, gain, eps).type_as(x)


def results(norm: object, dtype: torch.dtype, offset: float = 0.0) -> dict[str, Tensor]:
    """Returns the output and the gradients of a norm over a transposed view, as queries are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 48, generator=generator).mul(30).to(dtype).transpose(1, 2).requires_grad_()
    gain = torch.randn(48, generator=generator).mul(0.5).add(1 + offset).requires_grad_()
    upstream = torch.randn(2, 3, 5, 48, generator=generator).to(dtype)
    out = norm(x, gain, EPS)  # type: ignore[operator]
    out.backward(upstream)
    assert x.grad is not None and gain.grad is not None
    return {"out": out.detach(), "of_x": x.grad, "of_gain": gain.grad}


def difference(one: Tensor, other: Tensor) -> float:
    assert one.dtype == other.dtype
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)]
)
def test_values_and_gradients_are_those_of_the_composed_norm(dtype: torch.dtype, tolerance: float) -> None:
    ours, wanted = results(normalize, dtype), results(composed, dtype)
    for name, value in wanted.items():
        assert difference(ours[name], value) <= tolerance, name
    moved = results(normalize, dtype, offset=0.1)  # the control: another gain
    assert all(difference(moved[name], wanted[name]) > 2 * tolerance for name in ("out", "of_x"))


def test_gradients_in_float64_arithmetic() -> None:
    """The float32 backward pass against the exact gradient, with an eps that matters."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).mul(0.1).requires_grad_()
    gain, eps = torch.linspace(0.5, 2.0, 16).requires_grad_(), 0.05
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    normalize(x, gain, eps).backward(upstream)
    exact_x, exact_gain = (each.detach().double().requires_grad_() for each in (x, gain))
    (exact_x * (exact_x.square().mean(-1, keepdim=True) + eps).rsqrt() * exact_gain).backward(upstream.double())
    assert x.grad is not None and gain.grad is not None and exact_x.grad is not None and exact_gain.grad is not None
    assert difference(x.grad, exact_x.grad.float()) < FLOAT32_TOLERANCE
    assert difference(gain.grad, exact_gain.grad.float()) < FLOAT32_TOLERANCE


def test_a_frozen_gain_or_input_has_no_gradient() -> None:
    x, gain = torch.ones(2, 8), torch.ones(8)
    normalize(x.requires_grad_(), gain, EPS).sum().backward()
    assert x.grad is not None and gain.grad is None
    y = torch.ones(2, 8)
    normalize(y, gain.requires_grad_(), EPS).sum().backward()
    assert y.grad is None and gain.grad is not None


def test_the_result_is_in_the_type_that_is_asked_for() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    out = normalize(x, torch.ones(8), EPS, torch.bfloat16)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_training_saves_the_input_alone_and_inference_computes_with_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm, x = RMSNorm(8, EPS), torch.randn(4, 8).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        trained = norm(x)
    assert [tensor.shape for tensor in saved if tensor.numel() >= x.numel()] == [x.shape]
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved if tensor.numel() >= x.numel())
    monkeypatch.setattr(layers, "normalize", None)  # a call would fail
    with torch.no_grad():
        assert difference(norm(x), trained.detach()) <= BFLOAT16_TOLERANCE
