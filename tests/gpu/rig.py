"""Where the checks of `make test-gpu` run: on a card at full shapes, or rehearsed on a CPU with small ones.

Device, shapes and tolerances are decided here; the checks themselves are the same code in both places.
"""

import gc
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._triton import has_triton

from slm.core.config import FULL, SLIDING, ModelConfig
from slm.runtime.session import RuntimeDevice
from slm.train.precision import Capability, capability
from slm.train.recipe import Recipe, load_recipe
from tests.conftest import AWKWARD
from tests.gpu.live import LiveBytes

# What a rehearsal changes in a recipe's shape. One fits into the window and into the CPU's plain products, one does not.
_SMALL = ("model.preset=tiny", "model.vocab_size=320", "model.num_hidden_layers=3", "batch.accumulation=2")
_SMALL_BATCH = {
    "documented": ("batch.context=64", "batch.batch_size=8"),
    "modern": ("batch.context=160", "batch.batch_size=4"),
}
_MIB = 1 << 20


@dataclass(frozen=True)
class Rig:
    """A place for the checks.

    Attributes:
        rehearsal: Whether the CPU stands for the card.
    """

    rehearsal: bool

    @property
    def device(self) -> torch.device:
        """Where PyTorch computes."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def provider(self) -> RuntimeDevice:
        """Where onnxruntime computes."""
        return "cpu" if self.rehearsal else "cuda"

    @cached_property
    def able(self) -> Capability:
        """What the device can do."""
        return capability(self.device)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The types that products are trained in here; bfloat16 only where it is not emulated."""
        half = (torch.float16, torch.bfloat16) if self.rehearsal or self.able.bf16 else (torch.float16,)
        return (torch.float32, *half)

    @property
    def missing_compiler(self) -> str | None:
        """Returns what torch.compile lacks here; None where nothing is missing."""
        if self.rehearsal:
            return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler"
        here = has_triton() and any(map(shutil.which, ("cc", "gcc", "clang")))
        return None if here else "Triton and a C compiler"

    def check_fits(self, estimated: int) -> None:
        """Skips a test that by an estimate needs more memory, in bytes, than the card has."""
        if self.rehearsal:
            return
        available = torch.cuda.get_device_properties(0).total_memory
        if estimated > available:
            pytest.skip(f"needs about {estimated / _MIB:,.0f} MiB, and the card has {available / _MIB:,.0f}")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns how far attention may be from plain products in float32, relative to the largest value.

        float16 keeps 11 bits and bfloat16 8, over sums of a few hundred products. A GPU's kernel for float32 splits its
        products into several of TF32.
        """
        exact = 2e-5 if self.rehearsal else 1e-3
        return {torch.float32: exact, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]

    @property
    def parting(self) -> float:
        """Returns how far a resumed run may end from one in one piece, relative to the way that the weights went.

        A CPU repeats itself bit for bit; some of CUDA's kernels add in an order that changes from run to run.
        """
        return 0.0 if self.rehearsal else 0.05

    def config(self, head_dim: int) -> ModelConfig:
        """Returns a small model with heads of a width, and a window that a short text passes."""
        return AWKWARD.model_copy(
            update={
                "head_dim": head_dim,
                "query_pre_attn_scalar": head_dim,
                "sliding_window": 32 if self.rehearsal else 128,
                "max_position_embeddings": 512,
                "num_hidden_layers": 2 if self.rehearsal else 4,
                "layer_types": (SLIDING, FULL) if self.rehearsal else (SLIDING, SLIDING, FULL, SLIDING),
            }
        )

    def recipe(self, name: str, text: Path, tokenizer: Path, updates: int, *overrides: str) -> Recipe:
        """Returns a recipe at its full shape, or a rehearsal's, cut to a few updates on a short text.

        Args:
            name: Of a recipe that ships with slm.
            text: What is trained on.
            tokenizer: Its `tokenizer.json`.
            updates: How many.
            *overrides: As for `load_recipe`; they win.
        """
        chosen = [*((*_SMALL, *_SMALL_BATCH[name]) if self.rehearsal else ()), *overrides]
        accumulation = load_recipe(name, chosen).batch.accumulation
        return load_recipe(
            name,
            [
                *chosen,
                f"data.train=[{text}]",
                f"data.tokenizer={tokenizer}",
                f"machine.device={self.device.type}",
                f"schedule.micro_steps={updates * accumulation}",
                "schedule.warmup_micro_steps=0",
                "evaluation.every_micro_steps=1000000",
                f"evaluation.windows={4 if self.rehearsal else 16}",
                "evaluation.prompts=[]",
            ],
        )

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Returns the most memory that tensors took at the same time while something ran, beside what they took before."""
        gc.collect()
        if self.rehearsal:
            with LiveBytes() as live:
                run()
            return live.peak
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def used_mib(self) -> int | None:
        """Returns the MiB of the card's memory that all processes take; None where nvidia-smi does not say."""
        said = None if self.rehearsal else nvidia_smi("memory.used")
        return int(said) if said is not None and said.isdecimal() else None

    def about(self) -> dict[str, Any]:
        """Returns what a report says of the machine."""
        about: dict[str, Any] = {
            "torch": torch.__version__,
            "onnxruntime": _first_version("onnxruntime-gpu", "onnxruntime"),
            "cpus": os.cpu_count(),
        }
        if self.rehearsal:
            return {"device": "CPU (rehearsal)", **about}
        card = torch.cuda.get_device_properties(0)
        return {
            "device": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_mib": card.total_memory // _MIB,
            "driver": nvidia_smi("driver_version"),
            "torch_cuda": torch.version.cuda,
            **about,
        }


def nvidia_smi(field: str) -> str | None:
    """Returns a field of the first card from nvidia-smi; None where there is no nvidia-smi or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 and lines[0].strip() else None


def _first_version(*packages: str) -> str | None:
    for package in packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return None
