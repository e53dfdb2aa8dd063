"""Suggests the next command after a result (`next: ...`), ready to copy and run."""

import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from slm.cli.console import say

if TYPE_CHECKING:
    from slm.core.manifest import Bundle

PROMPT = "Once upon a time"


def slm_command(*words: object) -> str:
    """Returns an slm command, with its words quoted for a shell."""
    return shlex.join(["slm", *map(str, words)])


def next_step(command: str) -> None:
    """Prints the next command, and whether it requires a GPU that this machine does not have."""
    elsewhere = ("--device", "cuda") in pairwise(shlex.split(command)) and not _has_gpu()
    say(f"next{' (on a machine with an NVIDIA GPU; this one has none)' if elsewhere else ''}: {command}")


def _has_gpu() -> bool:
    """Returns whether onnxruntime has its CUDA provider, and the driver finds a GPU."""
    from slm.cli.nvidia import driver
    from slm.runtime.session import available_devices

    return "cuda" in available_devices() and bool(driver().gpus)


def after_checkpoint(checkpoint: Path) -> str:
    """Returns the next command for a checkpoint: export it."""
    return slm_command("export", "--onnx", checkpoint)


def after_adapter(adapter: Path, base: Path | None = None) -> str:
    """Returns the next command for a LoRA adapter: export its base with the adapter merged.

    Args:
        adapter: The adapter.
        base: The base model, if the adapter does not record it.
    """
    return slm_command("export", "--onnx", *([] if base is None else [base]), "--adapter", adapter)


def after_bundle(bundle: "Bundle", *, verified: bool = False) -> str:
    """Returns the next command for a bundle: quantize a float32 one, verify a quantized or CUDA one, otherwise run it.

    Args:
        bundle: The bundle.
        verified: Whether `slm verify` has just compared it with its checkpoint.
    """
    from slm.core.manifest import parity_devices

    manifest, path = bundle.manifest, bundle.path
    if manifest.device == "webgpu":
        return slm_command("web", path)
    if manifest.precision == "float32" and manifest.target == "fused":
        return slm_command("quantize", f"--{_precision(bundle)}", path)
    if (
        manifest.device == "cuda"
        and not verified
        and "cuda" not in parity_devices(manifest)
        and _source_is_there(bundle)
    ):
        return proving(bundle)
    if manifest.quantization is not None and not verified and _source_is_there(bundle):
        return slm_command("verify", path)
    return asking(bundle)


def proving(bundle: "Bundle") -> str:
    """Returns the command that verifies a bundle for CUDA on a GPU."""
    return slm_command("verify", bundle.path, "--device", "cuda")


def after_model(path: Path) -> str:
    """Returns the next command for a checkpoint or a bundle that was evaluated."""
    from slm.core.manifest import Bundle, is_bundle

    return after_bundle(Bundle.open(path)) if is_bundle(path) else after_checkpoint(path)


def asking(bundle: "Bundle") -> str:
    """Returns the command that runs a bundle: chat if it was fine-tuned on conversations, generate otherwise."""
    from slm.core.chat import knows_turns
    from slm.core.checkpoint import INFO_FILE
    from slm.core.tokenizer import Tokenizer

    device = ["--device", "cuda"] if bundle.manifest.device == "cuda" else []
    record = bundle.manifest.provenance.get(INFO_FILE)
    if isinstance(record, dict) and knows_turns(record, Tokenizer.load(bundle.path)):
        return slm_command("chat", bundle.path, *device)
    return slm_command("generate", bundle.path, *device, "-p", PROMPT)


def _precision(bundle: "Bundle") -> str:
    """Returns the precision for which a model was trained, or the default one."""
    from slm.core.checkpoint import INFO_FILE
    from slm.core.qat import recorded_grid

    record = bundle.manifest.provenance.get(INFO_FILE)
    grid = recorded_grid(record) if isinstance(record, dict) else None
    return "int8" if grid is None else grid.precision


def _source_is_there(bundle: "Bundle") -> bool:
    from slm.core.checkpoint import is_checkpoint

    source = bundle.manifest.provenance.get("checkpoint")
    return isinstance(source, str) and is_checkpoint(Path(source))
