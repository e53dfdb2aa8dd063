"""What a device computes in, with its capability faked, and that the residual stream stays float32 whatever it is."""

from collections.abc import Callable

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.train.precision import Capability, Precision, capability, choose_precision

T4 = Capability("cuda", bf16=False, compute=(7, 5))
A100 = Capability("cuda", bf16=True, compute=(8, 0))
AMX = Capability("cpu", bf16=True)
LAPTOP = Capability("cpu", bf16=False)

FLOAT32 = Precision(None, scale_loss=False)
BF16 = Precision(torch.bfloat16, scale_loss=False)
FP16 = Precision(torch.float16, scale_loss=True)


@pytest.mark.parametrize(
    ("able", "hidden_size", "expected"),
    [
        (A100, 640, BF16),
        (A100, 128, BF16),
        (T4, 640, FP16),
        (AMX, 640, BF16),
        (AMX, 256, BF16),
        (AMX, 128, FLOAT32),
        (LAPTOP, 640, FLOAT32),
    ],
)
def test_auto(able: Capability, hidden_size: int, expected: Precision) -> None:
    assert choose_precision("auto", able, hidden_size) == expected


@pytest.mark.parametrize(("wanted", "expected"), [("float32", FLOAT32), ("bfloat16", BF16), ("float16", FP16)])
def test_a_choice_is_obeyed(wanted: str, expected: Precision) -> None:
    for able in (T4, A100, AMX, LAPTOP):
        assert choose_precision(wanted, able, 128) == expected  # type: ignore[arg-type]


def test_an_emulating_gpu_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A T4 answers True unless asked without emulation.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert capability(torch.device("cuda")) == T4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_stays_float32(
    config: ModelConfig, make_model: Callable[..., CausalLM], dtype: torch.dtype
) -> None:
    model = make_model(config)
    seen: list[torch.dtype] = []
    for module in (model.model.embed_tokens, *model.model.layers, model.model.norm):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    products: list[torch.dtype] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: products.append(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        model(torch.arange(20)[None])
    assert set(seen) == {torch.float32}
    assert products == [dtype]  # autocast was on at all
