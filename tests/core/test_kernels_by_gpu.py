"""What a model asks of PyTorch's attention on GPUs that are not here: grouped heads only where a fast kernel takes them.

With `enable_gqa=True` a mask, float32 or a compute capability below 8.0 makes PyTorch compute all scores in float32 in memory.
The capability is mocked; the calls are looked at.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.nn import model as model_module
from slm.core.nn.attention import Positions

Calls = list[tuple[bool, bool, int]]
LONG, SHORT = 40, 12  # past the window of 16, and within it


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Of each call: whether it has a mask, whether heads are grouped, and how many heads the keys have."""
    found: Calls = []
    attend = F.scaled_dot_product_attention

    def noted(q: Any, k: Any, v: Any, attn_mask: Any = None, enable_gqa: bool = False, **named: Any) -> Any:
        found.append((attn_mask is not None, enable_gqa, k.shape[1]))
        assert k.shape[1] == v.shape[1]
        return attend(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return found


@pytest.mark.parametrize(
    ("compute", "half", "length", "grouped"),
    [
        ((7, 5), True, SHORT, (False,)),
        ((7, 5), True, LONG, (False,)),
        ((7, 5), False, SHORT, (False,)),
        ((8, 9), False, SHORT, (False,)),  # evaluation in float32
        ((8, 9), True, SHORT, (True,)),  # flash
        ((8, 9), True, LONG, (False, True)),  # flash in the layer that sees everything
        (None, False, LONG, (True,)),  # the CPU's kernel takes them
    ],
)
def test_heads_are_grouped_only_where_a_fast_kernel_takes_them(
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    compute: tuple[int, int] | None,
    half: bool,
    length: int,
    grouped: tuple[bool, ...],
) -> None:
    monkeypatch.setattr(model_module, "compute_capability", lambda device: compute)
    model = make_model(config)
    ids = torch.arange(length).remainder(config.vocab_size)[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(ids)
    assert len(calls) == config.num_hidden_layers
    assert {together for _, together, _ in calls} == set(grouped)
    for masked, together, heads in calls:
        assert heads == (config.num_key_value_heads if together else config.num_attention_heads)
        assert not (masked and together) or compute is None


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_several_texts_are_masked_and_so_not_flash(masked: bool) -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril() if masked else None
    positions = Positions(torch.ones(1), torch.ones(1), mask, "flash")
    assert positions.apart(segments.as_subclass(OnGpu)).kernel == "efficient"
    assert positions.apart(segments).kernel == "cpu"
