"""Whether a bundle is the checkpoint it says it is: its weights one by one, and what it computes on each provider.

Weights are compared with the checkpoint's: equal in float32, rounded in float16, and where they are integers exactly as
far off as rounding moved them. What the bundle computes is compared with PyTorch running the bundle's own weights, so that
rounding of weights does not hide an error in the graph. A graph of integers is run twice: with activations in floats, where
it must agree as closely as a float graph, and as it ships, where the kernel rounds activations too. A portable graph of
integers says floats: it is run as it is written, and with what onnxruntime's optimizations make of it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from slm.core.checkpoint import read_config
from slm.core.errors import SlmError
from slm.core.files import scratch_directory
from slm.core.manifest import Bundle, Manifest, Parity, Scheme, amend
from slm.core.nn import CausalLM
from slm.core.progress import Progress
from slm.core.weights import Weights
from slm.export.graph import checkpoint_tensors, float_tensors, released
from slm.export.graph.blocks import relative_error
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import smoothing_between
from slm.export.parity import TOLERANCE, TOLERANCES, check_parity
from slm.runtime.placement import attends_on, check_placement
from slm.runtime.session import Device, DeviceUnavailable, check_available

# The kernel rounds activations to 8 bits block by block, in every layer.
INT8_TOLERANCE = 0.3
# Keys and values rounded too, at its worst with random weights and tokens: 0.4 there, and 1.3 with a wrong window.
INT8_CACHE_TOLERANCE = 0.6
# The error of a rounded weight is computed from the same numbers in the same way as when it was written.
_SAME_ERROR = 1e-9
_HALF_ULP_FLOAT16 = 2.0**-11


@dataclass(frozen=True)
class Verification:
    """What was found, all within what is allowed.

    Attributes:
        weights: How many tensors are the checkpoint's.
        weights_off: The largest difference of a weight, in units of what rounding allows it; 0 in float32.
        parity: Differences from PyTorch, by provider; "cpu, graph as written" without onnxruntime's optimizations.
    """

    weights: int
    weights_off: float
    parity: dict[str, Parity]


def verify_bundle(
    bundle: Bundle,
    checkpoint: Path,
    progress: Progress,
    device: Device | None = None,
    allow_slow: bool = False,
) -> Verification:
    """Compares a bundle with a checkpoint.

    Args:
        bundle: The bundle.
        checkpoint: What it must be.
        progress: Is told of each comparison.
        device: Where the bundle is run. By default on the CPU, and on CUDA too where that starts and the bundle's attention
            runs there.
        allow_slow: Whether attention may run on the CPU when the rest runs on CUDA.

    Raises:
        DeviceUnavailable: When the device that is named cannot be used.
        SlmError: When anything differs by more than is allowed; it says what.
    """
    if device is not None:
        check_placement(bundle, device, allow_slow)
    theirs = read_config(checkpoint)
    if bundle.config != theirs:
        changed = [name for name, value in bundle.config if value != getattr(theirs, name)]
        raise SlmError(f"the bundle is not the checkpoint: their configurations differ in {', '.join(changed)}")
    with released():
        count, off = _compare_weights(bundle, checkpoint)
    progress.note(f"{count} weights are the checkpoint's")
    with released():
        reference = model_of(bundle)
    precision = bundle.manifest.precision
    rounded_caches = any(layer.dtype == "int8" for layer in bundle.manifest.cache)
    quantized = bundle.manifest.quantization
    on_gpu = (
        bundle.manifest.device != "cpu"
    )  # where products take activations in float16, which nothing rounds to integers
    tolerance = TOLERANCES["float16"] if on_gpu else TOLERANCES[precision] if quantized is None else INT8_TOLERANCE
    tolerance = INT8_CACHE_TOLERANCE if rounded_caches else tolerance
    found: dict[str, Parity] = {}
    if device != "cpu" and (device == "cuda" or attends_on(bundle, "cuda") == "cuda" or allow_slow):
        try:
            check_available("cuda")
            # onnxruntime folds the norms of queries and keys into attention on CUDA alone, so both graphs are run there.
            found["cuda"] = check_parity(bundle, reference, progress, tolerance, "cuda")
            found["cuda, graph as written"] = check_parity(
                bundle, reference, progress, tolerance, "cuda", optimize=False
            )
        except DeviceUnavailable as error:
            if device == "cuda":
                raise
            progress.note(f"not compared on CUDA: {error.message}")
    if device == "cuda":
        return Verification(count, off, found)
    found = {"cpu": check_parity(bundle, reference, progress, tolerance)} | found
    portable = bundle.manifest.target == "portable"
    as_written = TOLERANCE if portable else tolerance
    found["cpu, graph as written"] = check_parity(bundle, reference, progress, as_written, optimize=False)
    rounds = quantized is not None and not any(scheme.dynamic for scheme in quantized.schemes.values())
    if rounds and not portable and not on_gpu:
        with _float_activations(bundle) as exact:
            allowed = tolerance if rounded_caches else TOLERANCE
            found["cpu, float activations"] = check_parity(exact, reference, progress, allowed)
    return Verification(count, off, found)


def record_parity(bundle: Bundle, found: Verification) -> bool:
    """Writes what was found on GPUs into the bundle's manifest, which `slm info` shows.

    Returns:
        Whether the manifest has it; False where the bundle cannot be written to, as on a medium that is read-only.
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
    """Yields the bundle with one attribute of its products changed, so that they take activations as they are."""
    model = ir.load(bundle.model_path)
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    with scratch_directory(bundle.path.parent, "verify") as directory:
        changed = Bundle(directory, bundle.manifest, bundle.config)
        path = directory / bundle.manifest.model
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path)  # the weights stay where they are, beside it
        data = bundle.model_path.with_name(f"{path.name}_data")
        try:
            os.link(data, path.with_name(data.name))
        except OSError:  # a file system without links
            shutil.copy(data, path.with_name(data.name))
        yield changed


def model_of(bundle: Bundle) -> CausalLM:
    """Returns PyTorch's model with a bundle's weights."""
    tensors = float_tensors(bundle.model_path, _schemes(bundle))
    config = bundle.config
    with torch.device("meta"):
        model = CausalLM(config)
    state: dict[str, torch.Tensor] = {}
    for name in tensors:
        array = tensors[name]
        parent, _, product = name.removesuffix(".weight").rpartition(".")
        match product:
            case "qkv_proj":
                queries, width = (
                    config.num_attention_heads * config.head_dim,
                    config.num_key_value_heads * config.head_dim,
                )
                parts = dict(zip("qkv", np.split(array, [queries, queries + width]), strict=True))
                state |= {f"{parent}.{part}_proj.weight": torch.tensor(value) for part, value in parts.items()}
            case "gate_up_proj":
                parts = dict(zip(("gate", "up"), np.split(array, 2), strict=True))
                state |= {f"{parent}.{part}_proj.weight": torch.tensor(value) for part, value in parts.items()}
            case _ if product.endswith("norm"):
                state[name] = torch.tensor(array - np.float32(1))
            case _:
                state[name] = torch.tensor(array)
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.eval()


def _compare_weights(bundle: Bundle, checkpoint: Path) -> tuple[int, float]:
    """Returns how many weights were compared, and the largest difference in units of what is allowed."""
    config = bundle.config
    quantization = bundle.manifest.quantization
    theirs = checkpoint_tensors(Weights(checkpoint), config)
    ours = float_tensors(bundle.model_path, _schemes(bundle))
    if missing := set(theirs) ^ set(ours):
        raise SlmError(f"the bundle is not the checkpoint: it has other weights, {min(missing)} among them")
    if quantization is not None and quantization.smoothing is not None:
        theirs = smoothing_between(theirs, ours, config, quantization.smoothing).apply(theirs)
    worst = 0.0
    for name in theirs:
        wanted, found = theirs[name], ours[name]
        if wanted.shape != found.shape:
            raise SlmError(f"the bundle is not the checkpoint: {name} is {found.shape}, not {wanted.shape}")
        off = _off(bundle.manifest, name, wanted, found)
        if not off <= 1:
            raise SlmError(
                f"the bundle is not the checkpoint: {name} differs by {float(np.abs(found - wanted).max()):.2g}",
                "name the checkpoint that it was exported from with --against",
            )
        worst = max(worst, off)
    return len(theirs), worst


def _schemes(bundle: Bundle) -> Mapping[str, Scheme]:
    return {} if bundle.manifest.quantization is None else bundle.manifest.quantization.schemes


def _off(manifest: Manifest, name: str, wanted: Array, found: Array) -> float:
    """Returns the largest difference in units of what is allowed.

    Integers are as far from the weight as the manifest says that rounding moved it: by GPTQ some move by several steps, so
    that a bound on each would let much through. A weight that is not quantized is off by rounding to its type alone.
    """
    path = name.removesuffix(".weight")
    if manifest.quantization is not None and path in manifest.quantization.schemes:
        recorded = manifest.quantization.errors[path]
        if manifest.quantization.schemes[path].half:  # integers were chosen for the weights of the float16 bundle
            wanted = wanted.astype(np.float16).astype(np.float32)
        return abs(relative_error(wanted, found) - recorded) / max(
            recorded * _SAME_ERROR, float(np.finfo(np.float32).tiny)
        )
    tiny = np.float32(np.finfo(np.float32).tiny)
    allowed = np.full_like(wanted, tiny)
    if manifest.device != "cpu":
        allowed = np.maximum(np.abs(wanted) * np.float32(_HALF_ULP_FLOAT16), np.float32(2.0**-25))
    return float(np.max(np.abs(found - wanted) / allowed))
