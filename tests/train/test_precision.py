"""What a device computes in, with its capability faked, and that the residual stream stays float32 whatever it is."""

from collections.abc import Callable

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.presets import PRESETS
from slm.train import trial
from slm.train.choices import PrecisionName
from slm.train.precision import (
    Capability,
    Precision,
    bfloat16_instructions,
    capability,
    choose_precision,
    measured,
)

T4 = Capability("cuda", bf16=False, compute=(7, 5))
A100 = Capability("cuda", bf16=True, compute=(8, 0))
ZEN4 = Capability("cpu", bf16=True)
LAPTOP = Capability("cpu", bf16=False)

FLOAT32 = Precision(None, scale_loss=False)
BF16 = Precision(torch.bfloat16, scale_loss=False)
FP16 = Precision(torch.float16, scale_loss=True)


NARROW, WIDE = PRESETS["tiny"], PRESETS["gemma3-270m"]


def no_measurement(config: ModelConfig) -> float:
    raise AssertionError("a layer was measured")


@pytest.mark.parametrize(
    ("able", "config", "expected"),
    [
        (A100, WIDE, BF16),
        (A100, NARROW, BF16),
        (T4, WIDE, FP16),
        (ZEN4, NARROW, FLOAT32),
        (LAPTOP, WIDE, FLOAT32),
    ],
)
def test_auto_without_a_measurement(able: Capability, config: ModelConfig, expected: Precision) -> None:
    assert choose_precision("auto", able, config, speedup=no_measurement) == expected
    assert not measured(able, config)


@pytest.mark.parametrize(("speedup", "expected"), [(0.4, FLOAT32), (1.19, FLOAT32), (1.2, BF16), (2.5, BF16)])
def test_a_cpu_with_bfloat16_is_measured(speedup: float, expected: Precision) -> None:
    assert measured(ZEN4, WIDE)
    assert choose_precision("auto", ZEN4, WIDE, speedup=lambda config: speedup) == expected


@pytest.mark.parametrize(("wanted", "expected"), [("float32", FLOAT32), ("bfloat16", BF16), ("float16", FP16)])
def test_a_choice_is_obeyed(wanted: PrecisionName, expected: Precision) -> None:
    for able in (T4, A100, ZEN4, LAPTOP):
        assert choose_precision(wanted, able, WIDE, speedup=no_measurement) == expected
        assert choose_precision(wanted, able, WIDE, FP16.name, speedup=no_measurement) == expected


@pytest.mark.parametrize(
    ("able", "before", "expected"),
    [
        (ZEN4, FLOAT32, FLOAT32),
        (ZEN4, BF16, BF16),
        (T4, FP16, FP16),
        (A100, FP16, FP16),
        (A100, FLOAT32, FLOAT32),
        (LAPTOP, BF16, FLOAT32),  # resumed on a machine without bfloat16
        (T4, BF16, FP16),
    ],
)
def test_a_resumed_run_keeps_its_precision_if_the_device_has_it(
    able: Capability, before: Precision, expected: Precision
) -> None:
    assert choose_precision("auto", able, WIDE, before.name, no_measurement) == expected


def test_the_measurement_is_made_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ModelConfig] = []

    def model(config: ModelConfig) -> CausalLM:
        made.append(config)
        return CausalLM(config)

    monkeypatch.setattr(trial, "CausalLM", model)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    config = NARROW.model_copy(update={"intermediate_size": 96})
    ratio = trial.bfloat16_speedup(config)
    assert 0.01 < ratio < 100
    # The vocabulary and the other layers do not take part.
    assert trial.bfloat16_speedup(config.model_copy(update={"vocab_size": 512})) == ratio
    assert [(each.num_hidden_layers, each.hidden_size) for each in made] == [(1, NARROW.hidden_size)]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not bfloat16_instructions(), reason="the CPU does not multiply bfloat16")
def test_wide_layers_gain() -> None:
    assert trial.bfloat16_speedup(PRESETS["100m"]) > 1.2


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
