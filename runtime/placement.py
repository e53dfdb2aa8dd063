"""Checks whether a bundle's graph suits a device.

Attention decides. onnxruntime's CUDA kernel of `GroupQueryAttention` takes 16-bit types. A fused bundle that was exported for
the CPU therefore runs every attention on the CPU, and every layer copies from the GPU and back at each step. A portable
bundle's `Attention` runs on CUDA in float32.
"""

import shlex
from pathlib import Path

from slm.core.checkpoint import is_checkpoint
from slm.core.contract import DEFAULT_CONTEXT
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.runs import bundle_path
from slm.runtime.session import RuntimeDevice, check_available

# The descriptions of fused bundles, by the device that they were exported for.
_NAMES = {"cpu": "the CPU", "cuda": "CUDA", "webgpu": "WebGPU"}
_QUANTIZE = {"int8": "--int8", "int4": "--int4"}


def attends_on(bundle: Bundle, device: RuntimeDevice) -> RuntimeDevice:
    """Returns the device on which a bundle's attention runs when the bundle runs on `device`."""
    on_cpu = bundle.manifest.target == "fused" and bundle.manifest.device == "cpu"
    return "cpu" if on_cpu else device


def check_placement(bundle: Bundle, device: RuntimeDevice, allow_slow: bool = False) -> None:
    """Checks that a bundle's attention runs on the device.

    Args:
        bundle: The bundle.
        device: The requested device.
        allow_slow: Whether attention may run elsewhere.

    Raises:
        DeviceUnavailable: If onnxruntime has no provider for the device.
        SlmError: If attention would run elsewhere; the hint is the command that makes a bundle for the device.
    """
    check_available(device)
    if device == "cuda" and any(layer.dtype == "int8" for layer in bundle.manifest.cache):
        raise SlmError(
            f"{bundle.path} was exported for the CPU and has INT8 caches, which CUDA does not support", _remedy(bundle)
        )
    if allow_slow or attends_on(bundle, device) == device:
        return
    raise SlmError(
        f"{bundle.path} was exported for the CPU: on CUDA its attention would run on the CPU, with copies in every layer",
        f"{_remedy(bundle)}; or --allow-slow (allow_slow=True in Python)",
    )


def conversion_note(bundle: Bundle, device: RuntimeDevice) -> str:
    """Returns a note on a bundle that is slow on a device because of conversions; empty for other bundles."""
    made_for = bundle.manifest.device
    if device != "cpu" or made_for == "cpu":
        return ""
    return (
        f"note: this bundle was exported for {_NAMES[made_for]}; the CPU converts float16 products and caches at every step, "
        f"which is slow. A bundle for the CPU: {shlex.join(['slm', 'export', '--onnx', *_source(bundle)])}"
    )


def _remedy(bundle: Bundle) -> str:
    """Returns the commands that make a CUDA bundle of the same model."""
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
    """Returns the arguments of `slm export` that name a bundle's source; a placeholder if the source no longer exists."""
    provenance = bundle.manifest.provenance
    checkpoint, adapter = provenance.get("checkpoint"), provenance.get("adapter")
    if not isinstance(checkpoint, str) or not is_checkpoint(Path(checkpoint)):
        return [_UNKNOWN]
    return [checkpoint, *(["--adapter", adapter] if isinstance(adapter, str) else [])]


def conversion_notes(decoder: object, device: RuntimeDevice) -> list[str]:
    """Returns a note for each bundle behind a decoder that is slow on a device because it was exported for another one."""
    from slm.runtime.backend import DecoderAround
    from slm.runtime.decoder import OnnxDecoder
    from slm.runtime.ensemble import EnsembleDecoder

    while isinstance(decoder, DecoderAround):
        decoder = decoder.decoder
    members = decoder.decoders if isinstance(decoder, EnsembleDecoder) else (decoder,)
    found = [conversion_note(each.bundle, device) for each in members if isinstance(each, OnnxDecoder)]
    return [note for note in found if note]
