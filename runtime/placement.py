"""Whether a bundle's graph suits the device that is to run it.

Attention decides. onnxruntime's CUDA kernel of `GroupQueryAttention` takes 16-bit types, so of a fused bundle that was exported
for the CPU every attention runs on the CPU, and every layer copies from the GPU and back at each step. A portable bundle's
`Attention` runs on CUDA in float32.
"""

import shlex
from pathlib import Path

from slm.core.checkpoint import is_checkpoint
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.runs import bundle_path
from slm.runtime.session import Device, check_available

# What a fused bundle is called that was exported for a device.
_NAMES = {"cpu": "the CPU", "cuda": "CUDA", "webgpu": "WebGPU"}
_QUANTIZE = {"int8": "--int8", "int4": "--int4"}


def attends_on(bundle: Bundle, device: Device) -> Device:
    """Returns where a bundle's attention runs when the bundle is run on a device."""
    on_cpu = bundle.manifest.target == "fused" and bundle.manifest.device == "cpu"
    return "cpu" if on_cpu else device


def check_placement(bundle: Bundle, device: Device, allow_slow: bool = False) -> None:
    """Makes sure that a bundle's attention runs on the device.

    Args:
        bundle: The bundle.
        device: Where it is to run.
        allow_slow: Whether attention may run elsewhere.

    Raises:
        DeviceUnavailable: When onnxruntime has no provider for the device.
        SlmError: When attention would run elsewhere; the hint is the command that makes a bundle for the device.
    """
    check_available(device)
    if allow_slow or attends_on(bundle, device) == device:
        return
    raise SlmError(
        f"{bundle.path} was exported for the CPU: on CUDA its attention would run on the CPU, with copies in every layer",
        f"{_remedy(bundle)}; or --allow-slow (allow_slow=True in Python)",
    )


def conversion_note(bundle: Bundle, device: Device) -> str:
    """Returns a line that says why a bundle is slow on a device which runs it with conversions; empty for other bundles."""
    made_for = bundle.manifest.device
    if device != "cpu" or made_for == "cpu":
        return ""
    return (
        f"note: this bundle was exported for {_NAMES[made_for]}; the CPU converts float16 products and caches at every step, "
        f"which is slow. A bundle for the CPU: {shlex.join(['slm', 'export', '--onnx', *_source(bundle)])}"
    )


def _remedy(bundle: Bundle) -> str:
    """Returns the commands that make the same model's bundle for CUDA."""
    manifest = bundle.manifest
    source = _source(bundle)
    longest = min(bundle.config.max_position_embeddings, DEFAULT_CONTEXT)
    context = [] if manifest.context == longest else ["--context", str(manifest.context)]
    export = shlex.join(["slm", "export", "--onnx", "--device", "cuda", *source, *context])
    if manifest.precision not in _QUANTIZE:
        return export
    checkpoint, adapter = Path(source[0]), Path(source[2]) if len(source) > 1 else None
    exported = "BUNDLE" if source[0] == _UNKNOWN else str(bundle_path(checkpoint, device="cuda", adapter=adapter))
    return f"{export}, then {shlex.join(['slm', 'quantize', _QUANTIZE[manifest.precision], exported])}"


_UNKNOWN = "CHECKPOINT"


def _source(bundle: Bundle) -> list[str]:
    """Returns the arguments of `slm export` that name what a bundle was exported from; a placeholder where that is gone."""
    provenance = bundle.manifest.provenance
    checkpoint, adapter = provenance.get("checkpoint"), provenance.get("adapter")
    if not isinstance(checkpoint, str) or not is_checkpoint(Path(checkpoint)):
        return [_UNKNOWN]
    return [checkpoint, *(["--adapter", adapter] if isinstance(adapter, str) else [])]
