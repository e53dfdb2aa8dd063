"""The type of the products of a forward pass. Weights, gradients and the optimizer's moments are always float32."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.machine import instruction_sets
from slm.core.nn.kernels import ComputeCapability, compute_capability
from slm.train.choices import PrecisionName
from slm.train.trial import bfloat16_speedup

# On a CPU, a layer must be this much faster in bfloat16. Below, the measurement could decide differently the next time.
_WORTHWHILE = 1.2
# Narrower models are not measured. At width 128 the ratio was 1.07 to 1.21 on an AMD EPYC (Zen 4) and 1.0 on a Xeon with AMX:
# too near to the limit for the same choice each time.
_NARROWEST = 192
_NEW_RUN = "start a new run with another --out"


@dataclass(frozen=True)
class Capability:
    """The capabilities of a device.

    Attributes:
        device: "cpu" or "cuda".
        bf16: Whether it multiplies bfloat16 in hardware.
        compute: Compute capability of a CUDA device.
    """

    device: Literal["cpu", "cuda"]
    bf16: bool
    compute: ComputeCapability = None


# The capabilities of every CPU.
CPU = Capability("cpu", bf16=False)


@dataclass(frozen=True)
class Precision:
    """The precision of a training run.

    Attributes:
        autocast: Type of the products; None for float32 throughout.
        scale_loss: Whether the loss is scaled so that small gradients survive float16 (arXiv:1710.03740).
    """

    autocast: torch.dtype | None
    scale_loss: bool

    @property
    def name(self) -> str:
        """The name in messages."""
        if self.autocast is None:
            return "float32"
        return f"{str(self.autocast).removeprefix('torch.')} autocast{', loss scaled' if self.scale_loss else ''}"


FLOAT32 = Precision(None, scale_loss=False)


def capability(device: torch.device) -> Capability:
    """Returns the capabilities of a device."""
    if device.type == "cuda":
        # A T4 emulates bfloat16, and counts as supporting it unless emulation is excluded.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Capability("cuda", native, compute_capability(device))
    return Capability("cpu", bool(bfloat16_instructions()))


def bfloat16_instructions() -> list[str]:
    """Returns the names of this CPU's instruction sets for products of bfloat16."""
    has = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "BF16": instruction_sets().get("BF16", False),  # ARM's
    }
    return [name for name, there in has.items() if there]


def choose_precision(
    wanted: PrecisionName,
    able: Capability,
    config: ModelConfig,
    before: str | None = None,
    speedup: Callable[[ModelConfig], float] = bfloat16_speedup,
) -> Precision:
    """Returns the precision of a run.

    "auto" is bfloat16 on CUDA if native, else float16 with a scaled loss. On a CPU it is bfloat16 if the CPU multiplies it and
    a layer of the model is at least 1.2 times as fast with it, which is measured within a second; else float32.

    Args:
        wanted: The choice.
        able: The capabilities of the device.
        config: The shape of the model.
        before: The name of the precision of a run that is resumed. "auto" keeps this precision if the device supports it.
        speedup: Measures how many times as fast as in float32 a layer of a model is in bfloat16 on this CPU.
    """
    if wanted == "auto":
        has: dict[str, PrecisionName] = {FLOAT32.name: "float32"}
        if able.bf16:
            has[_precision("bfloat16").name] = "bfloat16"
        if able.device == "cuda":
            has[_precision("float16").name] = "float16"
        wanted = has.get(before or "") or _fastest(able, config, speedup)
    return _precision(wanted)


def measured(able: Capability, config: ModelConfig) -> bool:
    """Returns whether "auto" measures a layer of a model."""
    return able.device == "cpu" and able.bf16 and config.hidden_size >= _NARROWEST


def _fastest(able: Capability, config: ModelConfig, speedup: Callable[[ModelConfig], float]) -> PrecisionName:
    if able.device == "cuda":
        return "bfloat16" if able.bf16 else "float16"
    return "bfloat16" if measured(able, config) and speedup(config) >= _WORTHWHILE else "float32"


def _precision(name: PrecisionName) -> Precision:
    return Precision(None if name == "float32" else getattr(torch, name), scale_loss=name == "float16")


def restore_scaler(scaler: torch.amp.GradScaler, saved: Mapping[str, int | float], hint: str = _NEW_RUN) -> None:
    """Restores the state of the loss scale, if there is one.

    Raises:
        SlmError: When the saved state is damaged.
    """
    if not saved or not scaler.is_enabled():
        return
    wanted = scaler.state_dict()
    if saved.keys() != wanted.keys() or any(type(saved[name]) is not type(value) for name, value in wanted.items()):
        raise SlmError("the saved state of the loss scale is damaged", hint)
    scaler.load_state_dict(dict(saved))
