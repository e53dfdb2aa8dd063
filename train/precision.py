"""The type of the products of a forward pass. Weights, gradients and the optimizer's moments are always float32."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from slm.core.errors import SlmError
from slm.core.nn.kernels import ComputeCapability, compute_capability
from slm.train.choices import PrecisionName

# Width from which bfloat16 is faster on a CPU with AMX: 1.3 times at 256, 1.8 times at 640, not at 128, for 16 windows of 128
# tokens on two cores (docs/LOG.md).
_CPU_BF16_HIDDEN_SIZE = 256
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
    return Capability("cpu", torch.cpu._is_amx_tile_supported())


def choose_precision(wanted: PrecisionName, able: Capability, hidden_size: int) -> Precision:
    """Returns the precision of a run.

    "auto" is bfloat16 on CUDA if native, else float16 with a scaled loss. On a CPU it is bfloat16 if AMX multiplies it and the
    model is wide enough to gain, else float32.

    Args:
        wanted: The choice.
        able: The capabilities of the device.
        hidden_size: The model's width.
    """
    if wanted == "auto":
        if able.device == "cuda":
            wanted = "bfloat16" if able.bf16 else "float16"
        else:
            wanted = "bfloat16" if able.bf16 and hidden_size >= _CPU_BF16_HIDDEN_SIZE else "float32"
    dtype = None if wanted == "float32" else getattr(torch, wanted)
    return Precision(dtype, scale_loss=wanted == "float16")


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
