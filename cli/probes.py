"""Probes of `slm doctor` for other packages, which can be missing or broken, or print messages."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from slm.core import child
from slm.core.install import install_hint
from slm.core.presets import PRESETS

_CPU = "CPUExecutionProvider"
_NO_DEVICE = ("AzureExecutionProvider",)  # calls a service
_LOADING_SECONDS = 120
# The presets for which `slm doctor` says in what type they are trained; each takes up to a second.
_TYPES_OF = ("gemma3-270m", "stories-4m", "tiny")

# The code of a separate process, because a provider can print, hang or crash while its libraries load. onnxruntime reports
# the reason of a failed load on standard error only. The process does not import PyTorch, which would load CUDA's libraries.
_STEP = """
import json, sys
from slm.runtime.trial import try_provider
print(json.dumps(try_provider(sys.argv[1])))
"""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_PREFIX = re.compile(r"^.*\[[EF]:onnxruntime:[^\]]*\] ")

# The file names of GPT-2's vocabulary in tiktoken's cache, which are the SHA-1 hashes of their URLs.
_GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


@dataclass(frozen=True)
class Provider:
    """The state of one provider of onnxruntime on this machine.

    Attributes:
        loads: Whether its libraries load and a session opens with it.
        runs: Whether one step of a tiny model computes the expected result (`slm.runtime.trial`).
        error: The reason if the provider does not load or run.
    """

    loads: bool
    runs: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch finds, or the reason why it finds none or cannot use it, with advice."""

    name: str | None = None
    compute_capability: str | None = None
    missing: str | None = None
    advice: str | None = None


@dataclass(frozen=True)
class TrainingType:
    """The type of products in training on this machine, by preset, and the reason.

    Attributes:
        device: The device that training would use; None without PyTorch.
        presets: Name of the type by name of the preset, for some of them.
        why: The reason.
        bfloat16_speedup: How many times as fast as in float32 a layer is in bfloat16, by preset, where it was measured.
    """

    device: Literal["cpu", "cuda"] | None
    presets: dict[str, str]
    why: str
    bfloat16_speedup: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Offline:
    """Tokenizers and models that are available offline. `hub_token` is whether a token is configured."""

    gpt2: bool
    gpt2_directory: str | None
    hub_directory: str
    hub_models: int
    hub_offline: bool
    hub_token: bool


def package_version(package: str) -> str | None:
    """Returns the version of an installed distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def providers() -> dict[str, Provider]:
    """Runs a step with each provider that onnxruntime lists. Does not raise."""
    if find_spec("onnxruntime") is None:
        return {}
    found: dict[str, Provider] = {}
    available, found[_CPU] = step_with(_CPU)
    for name in available:
        if name not in (_CPU, *_NO_DEVICE):
            found[name] = step_with(name)[1]
    return found


def step_with(provider: str) -> tuple[list[str], Provider]:
    """Runs a step of a tiny model with one provider; returns the available providers and the result."""
    try:
        done = child.run(_STEP, provider, timeout=_LOADING_SECONDS)
        if done.returncode:
            return [], Provider(False, False, _reason(done.stderr) or f"the process ended with {done.returncode}")
        said = json.loads(done.stdout.splitlines()[-1])
    except Exception as error:  # the process does not start, or does not reply in time
        return [], Provider(False, False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
    if said["ran"]:
        return said["available"], Provider(True, True)
    loads = provider in said["loaded"]
    # If the provider did not load, onnxruntime printed the reason before the final error.
    reason = said["error"] if loads else _reason(done.stderr) or said["error"]
    return said["available"], Provider(loads, False, (reason or "onnxruntime reports no reason")[:200])


def _reason(stderr: str) -> str | None:
    """Returns the line with the reason: onnxruntime's first error, or else the last line."""
    lines = [line.strip() for line in _COLOUR.sub("", stderr).splitlines() if line.strip()]
    errors = [line for line in lines if _LOG_PREFIX.match(line)]
    if not lines:
        return None
    line = _LOG_PREFIX.sub("", errors[0] if errors else lines[-1])
    return line.partition(" with error: ")[2][:200] or line[:200]


def cuda() -> Gpu:
    """Returns the GPU that PyTorch finds, or the reason why it finds none."""
    driver = Path("/proc/driver/nvidia/version").exists()
    if find_spec("torch") is None:
        return Gpu(missing="PyTorch is not installed", advice=f"{install_hint('train')} to train" if driver else None)
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name, architectures = torch.cuda.get_device_name(), torch.cuda.get_arch_list()
        if has_kernels((major, minor), architectures):
            return Gpu(name, f"{major}.{minor}")
        lacks = f"this PyTorch has no kernels for it ({', '.join(architectures)})"
        return Gpu(name, f"{major}.{minor}", lacks, "install a PyTorch built for an older CUDA (pytorch.org)")
    if torch.version.cuda is None:
        return Gpu(
            missing="this PyTorch is built without CUDA",
            advice="an NVIDIA driver is installed: install PyTorch built for CUDA (pytorch.org)" if driver else None,
        )
    advice = "an NVIDIA driver is installed: check that nvidia-smi finds the GPU and that it is new enough for PyTorch"
    return Gpu(missing="PyTorch finds no GPU", advice=advice if driver else None)


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Returns whether a build runs on a GPU: with machine code of the same major version, or PTX for the driver to compile.

    Args:
        capability: The compute capability of the GPU.
        architectures: The architectures of the build, such as "sm_75" and "compute_90"; empty if unknown.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", each) for each in architectures]
    versions = [(each[1], (int(each[2]), int(each[3]))) for each in found if each]
    return not versions or any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions
    )


def cuda_builds() -> dict[str, str | None]:
    """Returns the CUDA versions that onnxruntime and PyTorch were built for; None without CUDA or without the package."""
    found: dict[str, str | None] = {"onnxruntime": _onnxruntime_cuda(), "torch": None}
    if find_spec("torch") is not None:
        import torch

        found["torch"] = torch.version.cuda
    return found


def _onnxruntime_cuda() -> str | None:
    """Returns the CUDA version that onnxruntime reports, or that its wheel requires."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    if stated := getattr(onnxruntime, "cuda_version", None):
        return str(stated)
    try:
        required = requires("onnxruntime-gpu") or []
    except PackageNotFoundError:
        return None
    found = re.search(r"nvidia-cuda-runtime(?:-cu(\d+)|\W*(\d+\.\d+))", " ".join(required))
    return (found[1] or found[2]) if found else None


def training_type() -> TrainingType:
    """Returns the types that training uses on this machine."""
    if find_spec("torch") is None:
        return TrainingType(None, {}, "PyTorch is not installed")
    import torch

    from slm.train import precision
    from slm.train.trial import bfloat16_speedup

    able = precision.capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shown = {name: PRESETS[name] for name in _TYPES_OF}
    chosen = {name: precision.choose_precision("auto", able, config).name for name, config in shown.items()}
    ratios = {name: bfloat16_speedup(config) for name, config in shown.items() if precision.measured(able, config)}
    if able.device == "cuda":
        why = f"the GPU {'multiplies' if able.bf16 else 'does not multiply'} bfloat16 in hardware"
    elif able.bf16:
        times = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in ratios.items())
        why = f"the CPU multiplies it with {' and '.join(precision.bfloat16_instructions())}; a layer is faster by {times}"
    else:
        why = "the CPU has no instructions for bfloat16"
    return TrainingType(able.device, chosen, why, {name: round(ratio, 2) for name, ratio in ratios.items()})


def offline() -> Offline:
    """Returns the tokenizers and models that are available offline."""
    cache = _tiktoken_cache()
    hub, token_file = _hub()
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or _has_content(token_file)
    return Offline(
        gpt2=cache is not None and all((cache / name).is_file() for name in _GPT2_FILES),
        gpt2_directory=None if cache is None else str(cache),
        hub_directory=str(hub),
        hub_models=sum(1 for _ in hub.glob("models--*")),
        hub_offline=any(_is_on(os.environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
        hub_token=token,
    )


def _tiktoken_cache() -> Path | None:
    """Returns tiktoken's cache directory; None if its cache is disabled."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            return Path(os.environ[name]) if os.environ[name] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _hub() -> tuple[Path, Path]:
    """Returns the model cache and the token file of the Hub's client."""
    if find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE), Path(constants.HF_TOKEN_PATH)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub"), Path(os.environ.get("HF_TOKEN_PATH") or home / "token")


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _is_on(said: str | None) -> bool:
    return (said or "").upper() in ("1", "ON", "YES", "TRUE")
