"""Opening a bundle's graph with onnxruntime, with the options that ship."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from typing import Literal

import onnxruntime as ort

from slm.core.errors import SlmError
from slm.core.install import install_hint
from slm.core.machine import (
    check_threads,
    usable_cores,
)
from slm.core.manifest import MANIFEST_FILE, Bundle
from slm.runtime.hugepages import use_huge_pages

Device = Literal["cpu", "cuda"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# What onnxruntime calls a GPU's own memory; "CudaPinned" is the host's.
_CUDA_MEMORY = "Cuda"
_SEVERITY_ERROR = 3
_DOCTOR = "slm doctor checks the driver, the libraries and the GPU; or --device cpu"
# Products of float32 stay float32: TF32 would keep 10 of 23 bits of what is multiplied, without a word.
CUDA_OPTIONS = {"use_tf32": "0"}
# What onnxruntime calls the types of tensors.
_TYPES = {name: f"tensor({ort_name})" for name, ort_name in
          (("int64", "int64"), ("float32", "float"), ("float16", "float16"), ("int8", "int8"))}  # fmt: skip


# onnxruntime puts its own source lines before what CUDA says.
_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;]*[^;\s]")


class DeviceUnavailable(SlmError):
    """A device that this onnxruntime has no provider for, or whose provider cannot start here."""


def available_devices() -> list[Device]:
    """Returns the devices that this onnxruntime can use; "cuda" means that its provider is installed."""
    installed = ort.get_available_providers()
    devices: list[Device] = ["cpu", "cuda"]
    return [device for device in devices if _PROVIDERS[device] in installed]


@lru_cache(maxsize=1)
def load_cuda_libraries() -> str:
    """Loads the libraries of CUDA that pip installs beside onnxruntime-gpu, where its provider does not look by itself.

    Returns:
        What onnxruntime says about those that it does not find; empty when all are there, or this onnxruntime has no CUDA.
    """
    if "cuda" not in available_devices() or not hasattr(ort, "preload_dlls"):
        return ""
    said = io.StringIO()
    with redirect_stdout(said):  # onnxruntime prints
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Returns the options that ship; by default one thread for each usable physical core.

    Raises:
        SlmError: When the number of threads is out of range.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores() if threads is None else check_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = _SEVERITY_ERROR
    return options


def check_available(device: Device) -> None:
    """Makes sure that this onnxruntime has a device's provider.

    Raises:
        DeviceUnavailable: When it has none.
    """
    if device not in available_devices():
        raise DeviceUnavailable(
            "onnxruntime here has no CUDA provider",
            f"pip uninstall onnxruntime, then {install_hint('cuda')}; or --device cpu",
        )


def open_session(
    bundle: Bundle,
    device: Device = "cpu",
    threads: int | None = None,
    optimize: bool = True,
    cuda_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Opens the graph; its weights are mapped from the file, not read into memory.

    Args:
        bundle: The bundle.
        device: Where to run. CUDA's attention kernel takes the float16 caches of bundles exported for it. A bundle exported
            for the CPU has its matrix products there and its attention on the CPU (`takes_from` says which it is).
        threads: Threads for one operator; by default the usable physical cores.
        optimize: Whether onnxruntime may change the graph, as it does by default.
        cuda_options: Further options of the CUDA provider.

    Raises:
        DeviceUnavailable: When the device's provider is missing or cannot start.
        SlmError: When the graph cannot be opened.
    """
    check_available(device)
    options = session_options(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if device == "cuda":
        load_cuda_libraries()
    cuda = (_PROVIDERS["cuda"], CUDA_OPTIONS | dict(cuda_options or {}))
    providers = [cuda] * (device == "cuda") + [_PROVIDERS["cpu"]]
    try:
        # Without the fallback, which prints to standard output and runs everything on the CPU.
        session = ort.InferenceSession(str(bundle.model_path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base but this
        if _CUDA_FAILURE.search(str(error)):
            raise DeviceUnavailable(f"the CUDA provider could not start ({first_line(error)})", _DOCTOR) from None
        raise SlmError(f"onnxruntime cannot open {bundle.model_path} ({first_line(error)})") from None
    _check_signature(session, bundle)
    if device == "cuda" and _PROVIDERS["cuda"] not in session.get_providers():
        raise DeviceUnavailable("the CUDA provider could not start", _DOCTOR)
    if device == "cpu":
        use_huge_pages()
    return session


def _check_signature(session: ort.InferenceSession, bundle: Bundle) -> None:
    """Makes sure that the graph takes and gives what the manifest says: buffers are made by that.

    Raises:
        SlmError: When it does not; the first of them is named.
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
                    f"{bundle.model_path}: {spec.name} is not what {bundle.path / MANIFEST_FILE} says",
                    "copy or export the bundle again",
                )


def takes_from(session: ort.InferenceSession, inputs: Sequence[str]) -> Device:
    """Returns in whose memory a session wants some of its inputs: where the operators run that read them.

    What lies elsewhere is copied when it is bound, and not again when it changes.

    Raises:
        SlmError: When it wants some here and some there.
    """
    names = [each.name for each in session.get_inputs()]
    places = dict(zip(names, session.get_input_memory_infos(), strict=True))
    found: set[Device] = {"cuda" if places[name].name == _CUDA_MEMORY else "cpu" for name in inputs}
    if len(found) > 1:
        raise SlmError("attention would run on CUDA in some layers and on the CPU in others", "--device cpu")
    return found.pop()


def first_line(error: Exception) -> str:
    """Returns what onnxruntime says of a failure in a line; of a failure of CUDA what CUDA says."""
    if failure := _CUDA_FAILURE.search(str(error)):
        return failure[0]
    return str(error).strip().partition("\n")[0]
