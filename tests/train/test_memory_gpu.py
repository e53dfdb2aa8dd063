"""The memory estimate for a GPU against what PyTorch keeps when a CPU computes as a GPU does.

On CUDA, RMSNorm is one kernel that keeps its input, its root mean square and its gain (`_fused_rms_norm` of PyTorch 2.9 and
up). Here an autograd function does the same on the CPU, and attention expands its keys and values as it does on a T4.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slm.core.nn import layers
from slm.core.nn import model as model_module
from slm.train.estimate import GPUS
from slm.train.loss import linear_cross_entropy
from slm.train.memory import training_bytes
from slm.train.precision import Precision
from slm.train.recipe import Recipe, load_recipe
from tests.gpu.live import LiveBytes
from tests.train.test_memory import kept_at_most

attend = layers.F.scaled_dot_product_attention
FLOAT32 = Precision(None, scale_loss=False)
HALF = Precision(torch.bfloat16, scale_loss=False)  # as many bytes as float16, which a T4 computes in
T4 = GPUS["t4"].able
# Cosines, sines and logarithms of sums are not counted: 4 % seen.
TOLERANCE = 0.06


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's kernel keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    result: Tensor = FusedRMSNorm.apply(x, weight, eps)
    return result


def as_on_cuda(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The norm by PyTorch's operator, which a CPU composes from several."""
    return layers.F.rms_norm(x.float(), gain.shape, gain, eps).type_as(x)


def in_the_layout_of_the_next_product(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose output lies as the memory-efficient kernel's does: (B, T, N, H)."""
    return attend(q.transpose(1, 2).contiguous().transpose(1, 2), *args, **kwargs)


def recipe(*overrides: str) -> Recipe:
    """Rows too long for the CPU's plain products, as a GPU never takes them."""
    return load_recipe("tiny", ["batch.batch_size=4", "batch.context=256", "model.sliding_window=256", *overrides])


@pytest.mark.parametrize("precision", [FLOAT32, HALF], ids=["float32", "half"])
@pytest.mark.parametrize(
    "shape",
    [(), ("model.head_dim=256", "model.hidden_size=160"), ("machine.gradient_checkpointing=true",)],
    ids=["tiny", "wide-heads", "checkpointed"],
)
def test_activations_on_a_gpu(monkeypatch: pytest.MonkeyPatch, precision: Precision, shape: tuple[str, ...]) -> None:
    monkeypatch.setattr(model_module, "compute_capability", lambda device: T4.compute)
    monkeypatch.setattr(layers, "normalize", as_on_cuda)
    chosen = recipe(*shape)
    estimate = training_bytes(chosen, chosen.model.config(), precision, able=T4).activations
    composed = kept_at_most(chosen, precision)
    monkeypatch.setattr(layers.F, "rms_norm", rms_norm)
    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", in_the_layout_of_the_next_product)
    assert estimate == pytest.approx(kept_at_most(chosen, precision), rel=TOLERANCE)
    assert composed > (1 + 2 * TOLERANCE) * estimate  # the control: norms composed of several operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_loss_holds_on_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """On CUDA the softmax of a whole chunk is computed at once; a chunk of a CPU's blocks would take far less."""
    chosen = recipe("model.vocab_size=4096", "machine.loss_chunk=256")
    config = chosen.model.config()
    precision = HALF if dtype != torch.float32 else FLOAT32
    estimate = training_bytes(chosen, config, precision, able=T4).loss
    on_cpu = training_bytes(chosen, config, precision).loss
    hidden = torch.randn(512, config.hidden_size, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    monkeypatch.setattr("slm.train.loss._CACHED_BYTES", 1 << 40)
    monkeypatch.setattr("slm.train.loss._ROWS", 256)
    with LiveBytes() as live, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        linear_cross_entropy(hidden, weight, targets, 256)
    assert estimate == pytest.approx(live.peak, rel=0.1)
    assert abs(on_cpu - live.peak) > 0.2 * live.peak
