"""Queries the NVIDIA driver for its version and GPUs, without PyTorch and in a separate process."""

import ctypes
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core import child

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_RELEASE = re.compile(r"Kernel Module.*?\s(\d+(?:\.\d+)+)")
_ASKING_SECONDS = 60
# cuda.h
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU, and its memory in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver.

    Attributes:
        release: The release, such as "580.65.06"; None if there is no driver or the release is unknown.
        cuda: The newest CUDA version that it supports, such as (13, 0); None if its library cannot be loaded.
        gpus: The GPUs that it finds.
        error: Why it finds none.
    """

    release: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[NvidiaGpu, ...] = ()
    error: str | None = None

    @property
    def present(self) -> bool:
        """Whether a driver is installed."""
        return self.release is not None or self.cuda is not None


def driver() -> Driver:
    """Returns the driver and its GPUs. If the driver hangs or crashes, the result has an error."""
    release = _release()
    try:
        done = child.run("from slm.cli.nvidia import answer; answer()", timeout=_ASKING_SECONDS)
        said = json.loads(done.stdout.splitlines()[-1])
    except Exception as error:  # the process cannot start, times out, or crashes before its output
        return Driver(release, error=f"{type(error).__name__}: {error}"[:200])
    gpus = tuple(
        NvidiaGpu(gpu["name"], (gpu["capability"][0], gpu["capability"][1]), gpu["memory"]) for gpu in said["gpus"]
    )
    cuda = said["cuda"]
    return Driver(
        release or said["release"], None if cuda is None else (cuda // 1000, cuda % 1000 // 10), gpus, said["error"]
    )


def answer() -> None:
    """Runs in the separate process: prints one JSON object."""
    found: dict[str, Any] = {"release": None, "cuda": None, "gpus": [], "error": None}
    library = _library("libcuda.so.1", "nvcuda.dll")
    if library is None:
        found["error"] = "the driver library libcuda is missing"
    else:
        number = ctypes.c_int()
        found["release"] = _nvml_release()
        found["cuda"] = number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None
        try:
            found["gpus"] = _gpus(library)
        except OSError as error:
            found["error"] = str(error)
    sys.stdout.write(json.dumps(found) + "\n")


def _gpus(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """Returns the GPUs.

    Raises:
        OSError: If the driver fails, with its reason.
    """

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(library, name)(*arguments):
            reason = ctypes.c_char_p()
            library.cuGetErrorString(status, ctypes.byref(reason))
            raise OSError(f"{name}: {(reason.value or b'error').decode(errors='replace')} ({status})")

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    found = []
    for ordinal in range(count.value):
        device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        call("cuDeviceGet", ctypes.byref(device), ordinal)
        call("cuDeviceGetName", name, _NAME_BYTES, device)
        call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        text = name.value.decode(errors="replace")
        found.append({"name": text, "capability": (major.value, minor.value), "memory": memory.value})
    return found


def _release() -> str | None:
    """Returns the release that the kernel module reports; None if it does not, as on Windows and WSL."""
    try:
        found = _RELEASE.search(_VERSION_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _nvml_release() -> str | None:
    library = _library("libnvidia-ml.so.1", "nvml.dll")
    text = ctypes.create_string_buffer(_NAME_BYTES)
    if library is None or library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, _NAME_BYTES):
        return None
    return text.value.decode(errors="replace")


def _library(linux: str, windows: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(windows if sys.platform == "win32" else linux)
    except OSError:
        return None
