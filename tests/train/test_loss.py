"""The chunked cross-entropy equals PyTorch's on whole logits, and holds a chunk of logits at a time.

Dimensions: N positions, D hidden, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slm.train import loss as module
from slm.train.loss import IGNORED, linear_cross_entropy

# float32 sums in another order: 2e-7 seen, of the largest value.
TOLERANCE = 2e-6
# bfloat16 keeps 8 bits: whole logits under autocast are off by as much (5e-3 seen).
BF16_TOLERANCE = 2e-2


def inputs(n: int = 37, d: int = 24, v: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=draw, requires_grad=True)
    weight = torch.randn(v, d, generator=draw, requires_grad=True)
    targets = torch.randint(0, v, (n,), generator=draw)
    targets[::5] = IGNORED
    return hidden, weight, targets


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 3.0, of)]


def differences(got: list[Tensor], wanted: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("chunk", [1, 8, 37, 64, None])
def test_it_is_the_cross_entropy_of_the_whole_logits(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED_BYTES", 3 * 4 * 101)  # blocks of three rows
    hidden, weight, targets = inputs()
    wanted = gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    got = gradients(linear_cross_entropy(hidden, weight, targets, chunk), hidden, weight)
    assert differences(got, wanted) < TOLERANCE
    # the control: one target more
    targets[0] = 1
    assert differences(gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight), got) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_have_its_type(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs()
    wanted = gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(hidden, weight, targets)
    got = gradients(loss, hidden, weight)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert TOLERANCE < differences(got, wanted) < BF16_TOLERANCE  # rounded, but no more than that


def test_small_gradients_survive_float16() -> None:
    """Divided by 4,096 positions a probability of 1e-4 would be 2e-8, below the smallest float16."""
    hidden, weight, targets = inputs(n=4096, v=8192)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden * 0.01, weight * 0.01, targets)
    got = torch.autograd.grad(loss, weight)[0]
    wanted = torch.autograd.grad(F.cross_entropy(hidden * 0.01 @ (weight * 0.01).T, targets), weight)[0]
    assert ((got - wanted).norm() / wanted.norm()).item() < BF16_TOLERANCE


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() > 0


def test_nothing_to_learn_is_a_loss_of_zero() -> None:
    hidden, weight, targets = inputs()
    got = gradients(linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED)), hidden, weight)
    assert all((tensor == 0).all() for tensor in got)


class Largest(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.width:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_the_logits_never_exist_at_once() -> None:
    hidden, weight, targets = inputs(d=7)  # the head itself, turned over, has fewer rows than a chunk
    with Largest(101) as seen:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert seen.rows == 37
    with Largest(101) as seen:
        linear_cross_entropy(hidden, weight, targets, chunk=8).backward()
    assert seen.rows == 8


@pytest.mark.parametrize("chunk", [8, None])
def test_rows_stand_in_the_place_of_the_head_s(chunk: int | None) -> None:
    hidden, weight, targets = inputs()
    weight = weight.detach()
    ids = [7, 3]
    targets[:4] = torch.tensor([3, 7, 3, 9])
    rows = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    whole = weight.index_copy(0, torch.tensor(ids), rows)
    wanted = gradients(F.cross_entropy(hidden @ whole.T, targets), hidden, rows)
    got = gradients(linear_cross_entropy(hidden, weight, targets, chunk, (ids, rows)), hidden, rows)
    assert differences(got, wanted) < TOLERANCE
    # the control: the two the other way round
    got = gradients(linear_cross_entropy(hidden, weight, targets, chunk, (ids[::-1], rows)), hidden, rows)
    assert differences(got, wanted) > 100 * TOLERANCE


def test_rows_of_a_head_that_is_learned_are_refused() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="frozen head"):
        linear_cross_entropy(hidden, weight, targets, rows=([1], torch.zeros(1, weight.shape[1])))


def test_measuring_makes_no_gradients() -> None:
    hidden, weight, targets = inputs()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        measured = linear_cross_entropy(hidden, weight, targets)
    products = [name for name in made if "mm" in name]
    assert len(products) == 1  # the logits; with gradients there are three
    assert measured.item() == pytest.approx(F.cross_entropy(hidden @ weight.T, targets).item(), rel=TOLERANCE)
