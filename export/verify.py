"""Verification of a bundle against its checkpoint: each weight, and the output on each provider.

Weights must match the checkpoint's weights: exactly in float32, up to rounding in float16. Integer weights must have exactly
the error that the manifest records. The output is compared with PyTorch running the bundle's own weights, so that the
rounding of weights cannot hide an error in the graph. A quantized graph runs twice: with float activations, where it must be
as accurate as a float graph, and unchanged, where the kernel also rounds activations. A portable quantized graph runs as
written, which computes in floats, and with onnxruntime's optimizations.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.files import scratch_directory
from slm.core.grid import PAIR_LIMIT, pair_sums
from slm.core.manifest import Bundle, Manifest, Parity, Scheme, amend
from slm.core.nn import CausalLM
from slm.core.progress import Progress
from slm.core.weights import Weights
from slm.export.graph import checkpoint_tensors, float_tensors, graph_tensors, released
from slm.export.graph.blocks import QUANTIZED, relative_error
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import smoothing_between
from slm.export.parity import TOLERANCE, TOLERANCES, check_parity
from slm.export.parity_head import check_head
from slm.export.torch_model import causal_lm
from slm.runtime.head import in_halves
from slm.runtime.placement import attends_on, check_placement
from slm.runtime.session import DeviceUnavailable, RuntimeDevice, check_available

# The kernel rounds activations to 8 bits, block by block, in every layer.
INT8_TOLERANCE = 0.3
# With keys and values rounded as well, random weights and tokens (the worst case) give 0.4; a wrong window gives 1.3.
INT8_CACHE_TOLERANCE = 0.6
# The recorded error of a rounded weight was computed from the same numbers by the same function.
_SAME_ERROR = 1e-9
_HALF_ULP_FLOAT16 = 2.0**-11


@dataclass(frozen=True)
class Verification:
    """The result of a successful verification.

    Attributes:
        weights: The number of tensors that match the checkpoint.
        weights_off: The largest difference of a weight, as a fraction of its limit; 0 in float32.
        parity: Differences from PyTorch by provider; "graph as written" means without onnxruntime's optimizations.
    """

    weights: int
    weights_off: float
    parity: dict[str, Parity]


def verify_bundle(
    bundle: Bundle,
    checkpoint: Path,
    progress: Progress,
    device: RuntimeDevice | None = None,
    allow_slow: bool = False,
) -> Verification:
    """Verifies a bundle against a checkpoint.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint's directory.
        progress: Receives the progress of each comparison.
        device: The device that runs the bundle. The default is the CPU, and also CUDA if it is available and runs the
            bundle's attention.
        allow_slow: Whether attention may run on the CPU while the rest runs on CUDA.

    Returns:
        The number of compared weights and the measured differences.

    Raises:
        DeviceUnavailable: If the requested device cannot be used.
        SlmError: If the configuration differs, or a difference is above its limit. The message names the difference.
    """
    if device is not None:
        check_placement(bundle, device, allow_slow)
    theirs = read_config(checkpoint)
    if bundle.config != theirs:
        changed = [name for name, value in bundle.config if value != getattr(theirs, name)]
        raise SlmError(f"the bundle does not match the checkpoint: their configurations differ in {', '.join(changed)}")
    with released():
        count, off = _compare_weights(bundle, checkpoint)
        _check_sums(bundle)
    progress.note(f"{count} weights match the checkpoint")
    with released():
        reference = model_of(bundle)
    limits = _Limits.of(bundle)
    found: dict[str, Parity] = {}
    if device != "cpu" and (device == "cuda" or attends_on(bundle, "cuda") == "cuda" or allow_slow):
        try:
            found = _on_cuda(bundle, reference, progress, limits)
        except DeviceUnavailable as error:
            if device == "cuda":
                raise
            progress.note(f"skipping CUDA: {error.message}")
    if device != "cuda":
        found = _on_cpu(bundle, reference, progress, limits) | found
        if in_halves(bundle):
            check_head(bundle, progress)
    return Verification(count, off, found)


@dataclass(frozen=True)
class _Limits:
    """The largest differences from PyTorch that a bundle may have.

    Attributes:
        optimized: With onnxruntime's optimizations.
        as_written: Without them, on the CPU.
        float_activations: With products that do not round activations; None if the bundle has no others.
    """

    optimized: float
    as_written: float
    float_activations: float | None

    @classmethod
    def of(cls, bundle: Bundle) -> "_Limits":
        """Returns the limits of a bundle."""
        manifest = bundle.manifest
        # Products for GPUs take float16 activations, which no kernel rounds to integers.
        on_gpu, portable = manifest.device != "cpu", manifest.target == "portable"
        rounded_caches = any(layer.dtype == "int8" for layer in manifest.cache)
        if rounded_caches:
            optimized = INT8_CACHE_TOLERANCE
        elif on_gpu:
            optimized = TOLERANCES["float16"]
        else:
            optimized = TOLERANCES[manifest.precision] if manifest.quantization is None else INT8_TOLERANCE
        schemes = () if manifest.quantization is None else manifest.quantization.schemes.values()
        rounds = manifest.quantization is not None and not any(scheme.dynamic for scheme in schemes)
        exact = rounds and not portable and not on_gpu
        return cls(
            optimized,
            as_written=TOLERANCE if portable else optimized,
            float_activations=(optimized if rounded_caches else TOLERANCE) if exact else None,
        )


def _on_cuda(bundle: Bundle, reference: CausalLM, progress: Progress, limits: _Limits) -> dict[str, Parity]:
    """Compares a bundle on CUDA, with and without onnxruntime's optimizations.

    Raises:
        DeviceUnavailable: If there is no CUDA.
    """
    check_available("cuda")
    limit = limits.optimized  # only on CUDA does onnxruntime fuse the norms of queries and keys into attention
    return {
        "cuda": check_parity(bundle, reference, progress, limit, "cuda"),
        "cuda, graph as written": check_parity(bundle, reference, progress, limit, "cuda", optimize=False),
    }


def _on_cpu(bundle: Bundle, reference: CausalLM, progress: Progress, limits: _Limits) -> dict[str, Parity]:
    """Compares a bundle on the CPU, with and without onnxruntime's optimizations and with float activations."""
    found = {
        "cpu": check_parity(bundle, reference, progress, limits.optimized),
        "cpu, graph as written": check_parity(bundle, reference, progress, limits.as_written, optimize=False),
    }
    if limits.float_activations is not None:
        with _float_activations(bundle) as exact:
            found["cpu, float activations"] = check_parity(exact, reference, progress, limits.float_activations)
    return found


def record_parity(bundle: Bundle, found: Verification) -> bool:
    """Records the differences measured on GPUs in the bundle's manifest. `slm info` shows them.

    Returns:
        True if the manifest holds the differences; False if the bundle is not writable.
    """
    ours = {name: parity for name, parity in found.parity.items() if name.partition(",")[0] != "cpu"}
    recorded = bundle.manifest.gpu_parity | ours
    if recorded == bundle.manifest.gpu_parity:
        return True
    try:
        amend(bundle.path, bundle.manifest.model_copy(update={"gpu_parity": recorded}))
    except (OSError, SlmError):
        return False
    return True


@contextmanager
def _float_activations(bundle: Bundle) -> Iterator[Bundle]:
    """Yields a copy of the bundle whose quantized products do not round activations (`accuracy_level` 0)."""
    model = ir.load(bundle.model_path)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    with scratch_directory(bundle.path.parent, "verify") as directory:
        changed = Bundle(directory, bundle.manifest, bundle.config)
        path = directory / bundle.manifest.model
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path)  # writes the graph only; the weights stay in their data file
        data = bundle.model_path.with_name(f"{path.name}_data")
        try:
            os.link(data, path.with_name(data.name))
        except OSError:  # the file system does not support links
            shutil.copy(data, path.with_name(data.name))
        yield changed


def model_of(bundle: Bundle) -> CausalLM:
    """Returns the PyTorch model with a bundle's weights, in float32."""
    return causal_lm(float_tensors(bundle.model_path, _schemes(bundle)), bundle.config)


def _compare_weights(bundle: Bundle, checkpoint: Path) -> tuple[int, float]:
    """Returns the number of compared weights, and the largest difference as a fraction of its limit."""
    config = bundle.config
    quantization = bundle.manifest.quantization
    theirs = checkpoint_tensors(Weights(checkpoint), config)
    ours = float_tensors(bundle.model_path, _schemes(bundle))
    if missing := set(theirs) ^ set(ours):
        raise SlmError(f"the bundle does not match the checkpoint: only one of them has {min(missing)}")
    if quantization is not None and quantization.smoothing is not None:
        theirs = smoothing_between(theirs, ours, config, quantization.smoothing).apply(theirs)
    worst = 0.0
    for name in theirs:
        wanted, found = theirs[name], ours[name]
        if wanted.shape != found.shape:
            raise SlmError(f"the bundle does not match the checkpoint: {name} is {found.shape}, not {wanted.shape}")
        off = _off(bundle.manifest, name, wanted, found)
        if not off <= 1:
            raise SlmError(
                f"the bundle does not match the checkpoint: {name} differs by {float(np.abs(found - wanted).max()):.2g}",
                "use --against to name the checkpoint that the bundle was exported from",
            )
        worst = max(worst, off)
    return len(theirs), worst


def _check_sums(bundle: Bundle) -> None:
    """Checks that sums of two products fit in 16 bits where the manifest says so.

    Raises:
        SlmError: If they do not.
    """
    stored = graph_tensors(bundle.model_path)
    for path, scheme in _schemes(bundle).items():
        if scheme.reduced and pair_sums(stored[f"{path}.{QUANTIZED}"].T.astype(np.int16)).max() > PAIR_LIMIT:
            raise SlmError(
                f"{path} can saturate on CPUs without VNNI, although the manifest excludes it",
                "quantize the float bundle again",
            )


def _schemes(bundle: Bundle) -> Mapping[str, Scheme]:
    return {} if bundle.manifest.quantization is None else bundle.manifest.quantization.schemes


def _off(manifest: Manifest, name: str, wanted: Array, found: Array) -> float:
    """Returns the largest difference of a weight as a fraction of its limit.

    The error of an integer weight, and of a norm that refinement moved, must equal the error in the manifest. A limit for each
    element would be too weak, because GPTQ moves some elements by several steps. Other weights may differ by rounding to their
    type only.
    """
    path, quantization = name.removesuffix(".weight"), manifest.quantization
    scheme = None if quantization is None else quantization.schemes.get(path)
    if quantization is not None and (scheme is not None or (quantization.refined and path in quantization.errors)):
        recorded = quantization.errors[path]
        if scheme is not None and scheme.half:  # the weights were rounded to float16 before they were quantized
            wanted = wanted.astype(np.float16).astype(np.float32)
        wanted, found = np.atleast_2d(wanted), np.atleast_2d(found)
        return abs(relative_error(wanted, found) - recorded) / max(
            recorded * _SAME_ERROR, float(np.finfo(np.float32).tiny)
        )
    tiny = np.float32(np.finfo(np.float32).tiny)
    allowed = np.full_like(wanted, tiny)
    if manifest.device != "cpu":
        allowed = np.maximum(np.abs(wanted) * np.float32(_HALF_ULP_FLOAT16), np.float32(2.0**-25))
    return float(np.max(np.abs(found - wanted) / allowed))
