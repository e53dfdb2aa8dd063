"""Opens a bundle's graph with onnxruntime, with the same options for every command."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import onnxruntime as ort

from slm.core.errors import SlmError
from slm.core.install import install_hint
from slm.core.machine import (
    check_threads,
    usable_cores,
)
from slm.core.manifest import MANIFEST_FILE, Bundle
from slm.runtime.hugepages import use_huge_pages
from slm.runtime.products import limited_weights, saturates
from slm.runtime.unused import page_out, trim_freed_memory

# The devices on which slm runs a model.
RuntimeDevice = Literal["cpu", "cuda"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# onnxruntime's name of a GPU's own memory; "CudaPinned" is host memory.
_CUDA_MEMORY = "Cuda"
_SEVERITY_ERROR = 3
# onnxruntime computes nodes without inputs once, when it opens a graph. In a fused graph for the CPU, the only one with a
# larger result reshapes the embedding, and the result would be a copy of the mapped table in memory.
_FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
_LARGEST_FOLDED = 1 << 20
_DOCTOR = "slm doctor checks the driver, the libraries and the GPU; or --device cpu"
# Disables TF32, which keeps only 10 of the 23 mantissa bits of factors.
CUDA_OPTIONS = {"use_tf32": "0"}
# onnxruntime's names of tensor types.
_TYPES = {name: f"tensor({ort_name})" for name, ort_name in
          (("int64", "int64"), ("float32", "float"), ("float16", "float16"), ("int8", "int8"))}  # fmt: skip


# Weights that replace those of the file. onnxruntime does not copy them, so that they live as long as their session.
_REPLACED: WeakKeyDictionary[ort.InferenceSession, dict[str, ort.OrtValue]] = WeakKeyDictionary()
# onnxruntime puts its own source lines before the message of CUDA.
_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;]*[^;\s]")


class DeviceUnavailable(SlmError):
    """Raised if this onnxruntime has no provider for a device, or the provider cannot start."""


def available_devices() -> list[RuntimeDevice]:
    """Returns the devices that this onnxruntime can use; "cuda" means that its provider is installed."""
    installed = ort.get_available_providers()
    devices: list[RuntimeDevice] = ["cpu", "cuda"]
    return [device for device in devices if _PROVIDERS[device] in installed]


@lru_cache(maxsize=1)
def load_cuda_libraries() -> str:
    """Loads the CUDA libraries that pip installs beside onnxruntime-gpu, where the provider does not search by itself.

    Returns:
        onnxruntime's messages about missing libraries; empty if all were found, or this onnxruntime has no CUDA.
    """
    if "cuda" not in available_devices() or not hasattr(ort, "preload_dlls"):
        return ""
    said = io.StringIO()
    with redirect_stdout(said):  # onnxruntime prints its messages
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Returns the session options of every command; by default one thread per usable physical core.

    Raises:
        SlmError: If the number of threads is out of range.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores() if threads is None else check_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = _SEVERITY_ERROR
    return options


def check_available(device: RuntimeDevice) -> None:
    """Checks that this onnxruntime has a provider for the device.

    Raises:
        DeviceUnavailable: If it has none.
    """
    if device not in available_devices():
        raise DeviceUnavailable(
            "onnxruntime here has no CUDA provider",
            f"pip uninstall onnxruntime, then {install_hint('cuda')}; or --device cpu",
        )


def open_session(
    bundle: Bundle,
    device: RuntimeDevice = "cpu",
    threads: int | None = None,
    optimize: bool = True,
    cuda_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Opens the graph. Its weights are mapped from the file, not read into memory.

    Args:
        bundle: The bundle.
        device: Where to run. CUDA's attention kernel takes the float16 caches of bundles exported for CUDA. A bundle
            exported for the CPU runs its matrix products on CUDA and its attention on the CPU (`takes_from` returns which).
        threads: Threads per operator; by default the usable physical cores.
        optimize: Whether onnxruntime may optimize the graph.
        cuda_options: Further options of the CUDA provider.

    Raises:
        DeviceUnavailable: If the device's provider is missing or cannot start.
        SlmError: If the graph cannot be opened.
    """
    check_available(device)
    options = session_options(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if device == "cpu" and bundle.manifest.target == "fused":
        options.add_session_config_entry(_FOLDING_LIMIT, str(_LARGEST_FOLDED))
    limited = limited_weights(bundle) if saturates(bundle) else {}
    replaced = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in limited.items()}
    for name, value in replaced.items():
        options.add_initializer(name, value)
    if device == "cuda":
        load_cuda_libraries()
    cuda = (_PROVIDERS["cuda"], CUDA_OPTIONS | dict(cuda_options or {}))
    providers = [cuda] * (device == "cuda") + [_PROVIDERS["cpu"]]
    try:
        # Without disable_fallback, a failing provider prints to standard output and everything runs on the CPU.
        session = ort.InferenceSession(str(bundle.model_path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no narrower base class
        if _CUDA_FAILURE.search(str(error)):
            raise DeviceUnavailable(f"the CUDA provider could not start ({first_line(error)})", _DOCTOR) from None
        raise SlmError(f"onnxruntime cannot open {bundle.model_path} ({first_line(error)})") from None
    _REPLACED[session] = replaced
    _check_signature(session, bundle)
    if device == "cuda" and _PROVIDERS["cuda"] not in session.get_providers():
        raise DeviceUnavailable("the CUDA provider could not start", _DOCTOR)
    if device == "cpu":
        page_out(weights_file(bundle))
        trim_freed_memory()
        use_huge_pages()
    return session


def weights_file(bundle: Bundle) -> Path:
    """Returns the file beside the graph that has its weights."""
    return bundle.model_path.with_name(f"{bundle.model_path.name}_data")


def _check_signature(session: ort.InferenceSession, bundle: Bundle) -> None:
    """Checks that the graph's inputs and outputs match the manifest, which determines the buffers.

    Raises:
        SlmError: If they do not match; the message names the first difference.
    """
    taken = [*session.get_inputs(), *session.get_overridable_initializers()]
    for said, there in ((bundle.manifest.inputs, taken), (bundle.manifest.outputs, session.get_outputs())):
        found = {each.name: (each.type, each.shape) for each in there}
        for spec in said:
            kind, shape = found.get(spec.name, ("", []))
            fixed = len(shape) == len(spec.shape) and all(
                size == wanted for size, wanted in zip(shape, spec.shape, strict=True) if isinstance(wanted, int)
            )
            if kind != _TYPES[spec.dtype] or not fixed:
                raise SlmError(
                    f"{bundle.model_path}: {spec.name} does not match {bundle.path / MANIFEST_FILE}",
                    "copy or export the bundle again",
                )


def takes_from(session: ort.InferenceSession, inputs: Sequence[str]) -> RuntimeDevice:
    """Returns the memory from which a session reads some of its inputs: that of the operators that use them.

    An input elsewhere is copied once when it is bound, and later changes are not seen.

    Raises:
        SlmError: If the inputs are read from different memories.
    """
    names = [each.name for each in session.get_inputs()]
    places = dict(zip(names, session.get_input_memory_infos(), strict=True))
    found: set[RuntimeDevice] = {"cuda" if places[name].name == _CUDA_MEMORY else "cpu" for name in inputs}
    if len(found) > 1:
        raise SlmError("attention would run on CUDA in some layers and on the CPU in others", "--device cpu")
    return found.pop()


def first_line(error: Exception) -> str:
    """Returns onnxruntime's error message in one line; for a failure of CUDA, CUDA's message."""
    if failure := _CUDA_FAILURE.search(str(error)):
        return failure[0]
    return str(error).strip().partition("\n")[0]
