"""Which attention kernel is taken on which GPU, and that expanded keys and values compute the same."""

from collections.abc import Callable

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.nn import model as model_module
from slm.core.nn.attention import expand_heads
from slm.core.nn.kernels import attention_kernel, fits_flex, shares_heads

HALF, FLOAT = torch.float16, torch.float32
# float32; the order of sums differs. 2e-6 seen.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("compute", "dtype", "head_dim", "masked", "flex", "kernel"),
    [
        (None, FLOAT, 256, False, False, "cpu"),
        ((7, 5), HALF, 256, False, False, "efficient"),  # flash needs 8.0
        ((7, 5), HALF, 64, True, False, "efficient"),
        ((8, 0), HALF, 256, False, False, "flash"),
        ((8, 9), torch.bfloat16, 128, False, False, "flash"),
        ((8, 9), torch.bfloat16, 128, True, False, "efficient"),  # flash takes no mask
        ((9, 0), FLOAT, 256, False, False, "efficient"),  # nor float32
        ((9, 0), HALF, 512, False, False, "efficient"),
        ((9, 0), HALF, 256, True, True, "flex"),
        ((9, 0), HALF, 256, False, True, "flash"),  # where there is nothing to skip
    ],
)
def test_kernels(
    compute: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, masked: bool, flex: bool, kernel: str
) -> None:
    assert attention_kernel(compute, dtype, head_dim, masked=masked, flex=flex) == kernel


def test_only_the_memory_efficient_kernel_needs_expanded_heads() -> None:
    assert not shares_heads("efficient")
    assert all(map(shares_heads, ("cpu", "flash", "flex")))


@pytest.mark.parametrize(
    ("compute", "head_dim", "fits"),
    [
        (None, 64, False),
        ((7, 5), 64, False),
        ((8, 0), 128, True),
        ((8, 0), 256, False),
        ((8, 6), 256, False),
        ((8, 9), 128, True),
        ((8, 9), 256, False),
        ((9, 0), 256, True),
        ((10, 0), 256, True),
        ((12, 0), 256, False),
        ((12, 0), 128, True),
        ((9, 0), 512, False),
    ],
)
def test_where_flex_fits(compute: tuple[int, int] | None, head_dim: int, fits: bool) -> None:
    assert fits_flex(compute, head_dim) == fits


def test_heads_are_repeated_beside_each_other() -> None:
    keys = torch.arange(6.0).view(1, 2, 1, 3)
    expanded = expand_heads(keys, 4)
    assert [head.tolist() for head in expanded[0]] == [[[0, 1, 2]], [[0, 1, 2]], [[3, 4, 5]], [[3, 4, 5]]]


@pytest.mark.parametrize("length", [16, 17, 150])
def test_expanded_heads_compute_the_same(
    config: ModelConfig, make_model: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A T4's path on this CPU: logits and gradients; keys that are repeated in another order are the control."""
    ids = torch.arange(length).remainder(config.vocab_size)[None]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model = make_model(config)
        logits = model(ids)
        logits.square().mean().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        assert gradient is not None
        return logits.detach(), gradient

    wanted = run()
    monkeypatch.setattr(model_module, "compute_capability", lambda device: (7, 5))
    calls: list[int] = []

    def counted(x: torch.Tensor, heads: int) -> torch.Tensor:
        calls.append(heads)
        return expand_heads(x, heads)

    monkeypatch.setattr("slm.core.nn.attention.expand_heads", counted)
    for found, expected in zip(run(), wanted, strict=True):
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert len(calls) == 2 * config.num_hidden_layers
    monkeypatch.setattr("slm.core.nn.attention.expand_heads", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))
    assert (run()[0] - wanted[0]).abs().max() > 100 * TOLERANCE
