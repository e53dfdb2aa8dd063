"""Which kernel training computes attention with, for each type and mask, and that it computes what plain products do."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slm.core.config import FULL, SLIDING
from slm.core.nn import CausalLM
from slm.core.nn.attention import Attention, Positions, expand_heads
from slm.core.nn.flex import BlockMask
from slm.core.nn.kernels import attention_kernel, fits_flex
from slm.core.nn.rope import apply_rope
from tests.conftest import random_model
from tests.gpu.conftest import Record
from tests.gpu.rig import Rig

pytestmark = pytest.mark.gpu

# Longer than what a CPU computes with plain products, and than the window.
LENGTH, ROWS = 192, 2
MASKS = ("causal", "window", "texts", "window by FlexAttention")
# What PyTorch's operators are called in its profiler.
OPERATORS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "cpu",
    "aten::_scaled_dot_product_attention_math": "math",
}
# From this compute capability on, PyTorch may prefer cuDNN's kernel, which keeps no scores either.
CUDNN_FROM = (9, 0)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Attention of one layer with a mask.

    Attributes:
        model: On the device, training.
        layer: The layer's attention.
        hidden: What goes in, (B, T, D).
        kind: The mask, one of `MASKS`.
        dtype: What the products are computed in.
    """

    model: CausalLM
    layer: Attention
    hidden: Tensor
    kind: str
    dtype: torch.dtype

    @property
    def segments(self) -> Tensor:
        """Numbers of three texts in a row, (B, T)."""
        borders = torch.tensor([LENGTH // 4, LENGTH // 2], device=self.hidden.device)
        return torch.bucketize(torch.arange(LENGTH, device=self.hidden.device), borders, right=True).expand(ROWS, -1)

    def positions(self) -> Positions:
        """Returns rotation, mask and kernel as the model chooses them."""
        self.model.model.flex = self.kind == "window by FlexAttention"
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=self.hidden.device)
        kinds = self.model.model.positions(ids, None, 0)
        if self.kind == "texts":
            return kinds[FULL].apart(self.segments)
        return kinds[FULL if self.kind == "causal" else SLIDING]

    def seen(self) -> Tensor:
        """Returns where a query may look, (1 or B, 1, T, T), from the definition of the mask."""
        place = torch.arange(LENGTH, device=self.hidden.device)
        distance = place[:, None] - place
        seen = distance >= 0
        if self.kind == "texts":
            same = self.segments[:, :, None] == self.segments[:, None, :]
            return (seen & same)[:, None]
        if self.kind != "causal":
            seen = seen & (distance < self.model.config.sliding_window)
        return seen[None, None]


def gradients(attend: Callable[[Tensor], Tensor], case: Case, backward: bool) -> list[Tensor]:
    """Returns the output, and where wanted the gradients of what goes in and of the four matrices."""
    hidden = case.hidden.clone().requires_grad_(backward)
    case.layer.zero_grad()
    with torch.set_grad_enabled(backward):
        out = attend(hidden)
    if not backward:
        return [out.float()]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    (out.float() * probe).sum().backward()
    matrices = (case.layer.q_proj, case.layer.k_proj, case.layer.v_proj, case.layer.o_proj)
    found = [out, hidden.grad, *(matrix.weight.grad for matrix in matrices)]
    return [tensor.detach().float().clone() for tensor in found if tensor is not None]


def plain(case: Case, hidden: Tensor, seen: Tensor) -> Tensor:
    """Computes the layer in float32 with all scores in memory."""
    layer, positions = case.layer, case.positions()
    q, k, v = (
        proj(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)  # (B, N or K, T, H)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = (apply_rope(norm(x), positions.cos, positions.sin) for norm, x in ((layer.q_norm, q), (layer.k_norm, k)))
    k, v = (expand_heads(x, q.shape[1]) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * layer.scale).masked_fill(~seen, -torch.inf)
    out: Tensor = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out


def kernels_of(run: Callable[[], object]) -> set[str]:
    """Returns the names of the attention kernels that something used."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {OPERATORS[event.name] for event in profile.events() if event.name in OPERATORS}


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Returns the largest difference, relative to the largest value of each tensor."""
    assert len(found) == len(wanted)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def make_case(rig: Rig) -> Callable[[int, str, str], Case]:
    """Makes a case: (head_dim, type, mask); skips what the device does not train with."""

    def make(head_dim: int, dtype: str, kind: str) -> Case:
        if DTYPES[dtype] not in rig.dtypes:
            pytest.skip(f"training does not use {dtype} here: the GPU emulates it")
        flex = kind == "window by FlexAttention"
        if flex and not rig.rehearsal and rig.missing_compiler is not None:
            pytest.skip(f"training masks windows here: FlexAttention needs {rig.missing_compiler}")
        if flex and not rig.rehearsal and not fits_flex(rig.able.compute, head_dim):
            pytest.skip(f"training masks windows here: FlexAttention's tiles do not fit with head_dim {head_dim}")
        model = random_model(rig.config(head_dim)).to(rig.device).train()
        layer = model.model.layers[model.config.layer_types.index(FULL if kind in ("causal", "texts") else SLIDING)]
        hidden = torch.randn(ROWS, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        return Case(model, layer.self_attn, hidden.to(rig.device), kind, DTYPES[dtype])

    return make


def attend(case: Case, hidden: Tensor) -> Tensor:
    """Computes the layer as training does."""
    with torch.autocast(hidden.device.type, dtype=case.dtype, enabled=case.dtype != torch.float32):
        out: Tensor = case.layer(hidden, case.positions(), None)
        return out


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in DTYPES for kind in MASKS if (dtype, kind) != ("float32", MASKS[-1])],  # always masked
)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU
def test_attention(
    rig: Rig, make_case: Callable[..., Case], record: Record, head_dim: int, dtype: str, kind: str
) -> None:
    case = make_case(head_dim, dtype, kind)
    flex = kind == "window by FlexAttention"
    backward = not (flex and rig.rehearsal)  # on a CPU FlexAttention has no backward pass
    found: list[Tensor] = []
    used = kernels_of(lambda: found.extend(gradients(lambda hidden: attend(case, hidden), case, backward)))
    if isinstance(case.positions().mask, BlockMask):
        assert flex and used == set()  # compiled, without an operator of PyTorch's own
        used = {"flex"}
    wanted = {"flex"} if flex else {attention_kernel(rig.able.compute, case.dtype, head_dim, masked=kind != "causal")}
    if used == {"cudnn"} and rig.able.compute is not None and rig.able.compute >= CUDNN_FROM:
        wanted = used
    seen = case.seen()
    difference = off(found, gradients(lambda hidden: plain(case, hidden, seen), case, backward))
    limit = rig.tolerance(case.dtype)
    what = f"head_dim {head_dim}, {dtype}, {kind}: {'forward and backward' if backward else 'forward'}"
    record(f"{what} with {', '.join(sorted(used))}", difference, limit)
    assert used == wanted
    assert difference <= limit
    other = seen.tril(-1) | torch.eye(LENGTH, dtype=torch.bool, device=seen.device)
    other[..., 0] = kind != "causal"  # the control: the first key is seen where it is not, or not where it is
    other[..., 0, 0] = True
    assert off(found, gradients(lambda hidden: plain(case, hidden, other), case, backward)) > limit


def test_the_math_kernel_is_recognized(rig: Rig, make_case: Callable[..., Case]) -> None:
    """The control of the kernels' names: the one that keeps all scores in memory, which training must not fall back to."""
    case = make_case(64, "float32", "causal")
    with sdpa_kernel([SDPBackend.MATH]):
        assert kernels_of(lambda: attend(case, case.hidden)) == {"math"}
