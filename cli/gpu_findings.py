"""Findings of `slm doctor` about onnxruntime's providers, the NVIDIA driver and its GPUs, each with advice."""

import re
from collections.abc import Mapping

from slm.cli.finding import Finding
from slm.cli.nvidia import Driver, NvidiaGpu
from slm.cli.probes import Gpu, Provider
from slm.core.install import install_hint

# The oldest driver for any release of a CUDA major version (docs.nvidia.com/deploy/cuda-compatibility).
_DRIVERS = {11: 450, 12: 525, 13: 580}
# The lowest compute capability that the compilers of a CUDA major version support: Maxwell, Pascal and Volta end with CUDA
# 12.
_CAPABILITIES = {13: (7, 5)}
_CUDA = "CUDAExecutionProvider"
_USED = ("CPUExecutionProvider", _CUDA)
_LIBRARY = re.compile(r"\blib(?:cu|nv)\w+\.so")
_NAMES = {"onnxruntime": "onnxruntime", "torch": "PyTorch"}


def onnxruntime_findings(packages: Mapping[str, str | None], providers: Mapping[str, Provider]) -> list[Finding]:
    """Returns the installed onnxruntime, and the state of each of its providers.

    Args:
        packages: Versions of onnxruntime and onnxruntime-gpu; None if not installed.
        providers: By name.
    """
    value = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    if all(packages.values()):
        both = " and ".join(packages) + " overwrite each other"
        findings = [Finding("onnxruntime", both, "uninstall both, then install one of them", "problem")]
    elif not any(packages.values()) and not providers:
        either = f"{install_hint('cpu')}; with an NVIDIA GPU: {install_hint('cuda')}"
        return [Finding("onnxruntime", "no onnxruntime", either, "problem")]
    else:
        findings = [Finding("onnxruntime", value or "from another distribution")]
    return findings + [_provider_finding(name, provider) for name, provider in providers.items()]


def _provider_finding(name: str, provider: Provider) -> Finding:
    if provider.runs:
        return Finding(name, "runs a step with the correct result")
    advice = {
        _CUDA: _cuda_advice(provider),
        "CPUExecutionProvider": "reinstall onnxruntime, which slm requires",
    }.get(name, "none needed: slm uses only the CPU and CUDA")
    fails = "loads, but does not run a step correctly" if provider.loads else "is listed but does not load"
    return Finding(name, f"{name} {fails} ({provider.error})", advice, "problem" if name in _USED else "note")


def _cuda_advice(provider: Provider) -> str:
    error = provider.error or ""
    until = "until then, use --device cpu"
    if "libcuda.so" in error:
        return f"install the NVIDIA driver, {_oldest_driver(13)} or newer for CUDA 13; without an NVIDIA GPU, use --device cpu"
    if _LIBRARY.search(error):
        return (
            f"{install_hint('cuda')}, which installs CUDA's libraries, or add the system's libraries to the loader's path "
            f"(LD_LIBRARY_PATH); {until}"
        )
    if provider.loads:
        return f"update the driver, and check the GPU for other faults (nvidia-smi -q); {until}"
    return f"check that nvidia-smi finds the GPU and that the driver is new enough; {until}"


def driver_findings(driver: Driver, builds: Mapping[str, str | None]) -> list[Finding]:
    """Returns the driver with its GPUs, and a problem if it is too old for the installed packages.

    Args:
        driver: The driver.
        builds: The CUDA version that each package was built for; None for a build without CUDA.
    """
    wants = {name: cuda for name, cuda in builds.items() if cuda}
    needed = "; ".join(
        f"{_NAMES[name]} for CUDA {cuda} needs driver {_oldest_driver(_major(cuda))} or newer"
        for name, cuda in wants.items()
    )
    if not driver.present:
        return [Finding("NVIDIA driver", "none", needed or None, "note" if needed else "ok")]
    runs = "" if driver.cuda is None else f", supports CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    value = f"{driver.release or 'unknown release'}{runs}"
    if all(_is_enough(driver, _major(cuda)) for cuda in wants.values()):
        finding = Finding("NVIDIA driver", value + (f" ({needed})" if needed else ""))
    else:
        finding = Finding("NVIDIA driver", f"the NVIDIA driver is too old ({value})", f"update it: {needed}", "problem")
    if not driver.gpus:
        why = driver.error or "the driver finds no GPU"
        return [finding, Finding("GPU", f"none ({why})", "check the output of nvidia-smi", "note")]
    return [finding, *(_gpu_finding(gpu, builds.get("onnxruntime")) for gpu in driver.gpus)]


def _gpu_finding(gpu: NvidiaGpu, cuda: str | None) -> Finding:
    major, minor = gpu.compute_capability
    value = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / (1 << 30):.1f} GiB"
    oldest = _CAPABILITIES.get(_major(cuda)) if cuda else None
    if oldest is None or gpu.compute_capability >= oldest:
        return Finding("GPU", value)
    return Finding(
        "GPU",
        f"{value}: onnxruntime for CUDA {cuda} has no kernels for it (it needs {oldest[0]}.{oldest[1]} or higher)",
        "use --device cpu to run models; PyTorch may still train on the GPU",
        "problem",
    )


def builds_findings(builds: Mapping[str, str | None], driver: Driver | None) -> list[Finding]:
    """Returns the CUDA versions that the installed packages were built for, and whether their majors match."""
    built = {name: cuda for name, cuda in builds.items() if cuda}
    there = driver is not None and driver.present
    if not built and not there:
        return []
    value = ", ".join(f"{_NAMES[name]} {builds[name] or 'without CUDA'}" for name in builds)
    if there and not builds.get("onnxruntime", ""):
        instead = f"pip uninstall onnxruntime, then {install_hint('cuda')}, to run models on the GPU"
        return [Finding("CUDA versions", value, instead, "note")]
    majors = {_major(cuda) for cuda in built.values()}
    if len(majors) > 1:
        return [Finding("CUDA versions", f"{value}: the majors differ", _matching(built, there), "note")]
    return [Finding("CUDA versions", value + (": the majors match" if len(built) > 1 else ""))]


def _matching(built: Mapping[str, str], there: bool) -> str:
    wanted = _major(built["onnxruntime"])
    each = "each package loads its own libraries, and the driver must be new enough for both"
    return f"{each}; a PyTorch for CUDA {wanted} shares the libraries (pytorch.org)" if there else each


def torch_gpu_finding(gpu: Gpu) -> Finding:
    """Returns the GPU that PyTorch finds, and a problem if PyTorch has no kernels for it."""
    if not gpu.name:
        return Finding("GPU in PyTorch", f"none ({gpu.missing})", gpu.advice, "note" if gpu.advice else "ok")
    value = f"{gpu.name}, compute capability {gpu.compute_capability}"
    if gpu.missing is None:
        return Finding("GPU in PyTorch", value)
    return Finding("GPU in PyTorch", f"{value}: {gpu.missing}", gpu.advice, "problem")


def _is_enough(driver: Driver, major: int) -> bool:
    """Returns whether a driver supports a CUDA major version; True if the driver's version is unknown."""
    if driver.cuda is not None:
        return driver.cuda[0] >= major
    release = (driver.release or "").partition(".")[0]
    return not release.isdecimal() or int(release) >= _oldest_driver(major)


def _oldest_driver(major: int) -> int:
    return _DRIVERS.get(major, max(_DRIVERS.values()))


def _major(cuda: str) -> int:
    return int(cuda.partition(".")[0])
