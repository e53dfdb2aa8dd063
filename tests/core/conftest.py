"""Fixtures for comparisons with transformers: its model with slm's weights, inputs, and measures of difference.

Fixtures that return functions, for test modules do not import from each other.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM


def _reference(model: CausalLM, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    fields = transformers.Gemma3TextConfig(**(config or model.config).to_hf())
    # Created in its dtype, as from_pretrained does: `.to(dtype)` would round the rotary frequencies too.
    hf = transformers.AutoModelForCausalLM.from_config(fields, dtype=dtype, attn_implementation="eager").eval()
    hf.load_state_dict(model.state_dict())
    return hf


def _token_ids(config: ModelConfig, length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _padding(lengths: Sequence[int], side: str) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _gradient_difference(model: CausalLM, hf: nn.Module, ids: Tensor, lengths: Sequence[int], side: str) -> float:
    mask, position_ids = _padding(lengths, side)
    valid, targets = mask.bool(), ids.roll(1, dims=-1)
    outputs = model(ids, mask), hf(ids, attention_mask=mask, position_ids=position_ids).logits
    for network, logits in zip((model, hf), outputs, strict=True):
        network.zero_grad()
        nn.functional.cross_entropy(logits[valid], targets[valid]).backward()
    theirs = {name: parameter.grad for name, parameter in hf.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    found = {
        name: _difference(parameter.grad, theirs[name]) / max(theirs[name].abs().max().item(), 1e-3 * largest)
        for name, parameter in model.named_parameters()
    }
    assert found.keys() == theirs.keys()
    return max(found.values())


@pytest.fixture(scope="session")
def reference() -> Callable[..., nn.Module]:
    """Returns transformers' model with slm's weights, built from the config.json that slm writes."""
    return _reference


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., Tensor]:
    """Returns random ids (batch, length), the same for each call with the same length."""
    return _token_ids


@pytest.fixture(scope="session")
def difference() -> Callable[[Tensor, Tensor], float]:
    """Returns the largest absolute difference of two tensors."""
    return _difference


@pytest.fixture(scope="session")
def padding() -> Callable[[Sequence[int], str], tuple[Tensor, Tensor]]:
    """Returns the mask of rows padded on one side, and the positions that transformers needs with it."""
    return _padding


@pytest.fixture(scope="session")
def gradient_difference() -> Callable[..., float]:
    """Returns the largest difference of a tensor's gradient, relative to the largest value of that gradient.

    Gradients that vanish (those of queries and keys when there is one position) are noise of about nothing: a
    thousandth of the model's largest value is the smallest unit.
    """
    return _gradient_difference
