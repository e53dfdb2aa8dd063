"""`slm doctor` on machines with NVIDIA GPUs: the driver, the versions of CUDA, and the kernels of both libraries."""

import json
from pathlib import Path

import pytest
import torch

from slm.cli import nvidia, probes
from slm.cli.nvidia import Driver, NvidiaGpu
from tests.cli.test_doctor import Done, Slm, finding, quick  # noqa: F401  # a fixture

GIB = 1 << 30
T4, V100 = NvidiaGpu("Tesla T4", (7, 5), 15 * GIB), NvidiaGpu("Tesla V100", (7, 0), 16 * GIB)
FOR_13 = {"onnxruntime": "13.0", "torch": "13.0"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("driver", "builds", "level", "words"),
    [
        (Driver("580.65.06", (13, 0), (T4,)), FOR_13, "ok", "580.65.06, supports CUDA 13.0"),
        (Driver("580.65.06", (13, 0), (T4,)), FOR_13, "ok", "onnxruntime for CUDA 13.0 needs driver 580 or newer"),
        (Driver("550.54.15", (12, 4), (T4,)), FOR_13, "problem", "too old (550.54.15, supports CUDA 12.4)"),
        (Driver("550.54.15", (12, 4), (T4,)), {"onnxruntime": "12.8", "torch": None}, "ok", "needs driver 525"),
        (
            Driver("550.54.15", (12, 4), (T4,)),
            {"onnxruntime": None, "torch": "13.0"},
            "problem",
            "PyTorch for CUDA 13.0",
        ),
        (Driver("550.54.15", None, (), "no libcuda"), FOR_13, "problem", "too old (550.54.15)"),  # by its release alone
        (Driver("580.65.06", None, (), "no libcuda"), FOR_13, "ok", "580.65.06"),
        (Driver(None, (13, 0), (T4,)), FOR_13, "ok", "unknown release, supports CUDA 13.0"),
        (Driver(error="no libcuda"), FOR_13, "note", "none"),
        (Driver(error="no libcuda"), {"onnxruntime": None, "torch": None}, "ok", "none"),
    ],
)
def test_whether_the_driver_is_new_enough(
    slm: Slm,
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver,
    builds: dict[str, str | None],
    level: str,
    words: str,
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: driver)
    monkeypatch.setattr(probes, "cuda_builds", lambda: builds)
    said = finding(slm, "NVIDIA driver")
    assert said["level"] == level and words in f"{said['value']} {said['advice']}"
    report = json.loads(slm("doctor", "--json").out)
    assert any("driver" in problem for problem in report["problems"]) == (level == "problem")
    assert report["cuda_builds"] == builds and report["driver"]["release"] == driver.release


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("gpu", "cuda", "level"), [(T4, "13.0", "ok"), (V100, "13.0", "problem"), (V100, "12.8", "ok")]
)
def test_a_gpu_that_is_too_old_for_the_kernels(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, gpu: NvidiaGpu, cuda: str, level: str
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: Driver("580.65.06", (13, 0), (gpu,)))
    monkeypatch.setattr(probes, "cuda_builds", lambda: {"onnxruntime": cuda, "torch": None})
    said = finding(slm, "GPU")
    assert said["level"] == level and gpu.name in said["value"]
    assert ("no kernels for it (it needs 7.5 or higher)" in said["value"]) == (level == "problem")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("builds", "level", "words"),
    [
        (FOR_13, "ok", "onnxruntime 13.0, PyTorch 13.0: the majors match"),
        ({"onnxruntime": "13.0", "torch": "12.8"}, "note", "onnxruntime 13.0, PyTorch 12.8: the majors differ"),
        ({"onnxruntime": "13.0", "torch": None}, "ok", "PyTorch without"),
        ({"onnxruntime": None, "torch": "13.0"}, "note", "pip uninstall onnxruntime, then"),
        ({"onnxruntime": None, "torch": None}, "note", "pip uninstall onnxruntime, then"),
    ],
)
def test_the_cuda_versions_of_both_are_compared(
    slm: Slm,
    monkeypatch: pytest.MonkeyPatch,
    builds: dict[str, str | None],
    level: str,
    words: str,
) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: Driver("580.65.06", (13, 0), (T4,)))
    monkeypatch.setattr(probes, "cuda_builds", lambda: builds)
    said = finding(slm, "CUDA versions")
    assert said["level"] == level and words in f"{said['value']} {said['advice']}"


@pytest.mark.usefixtures("quick")
def test_without_cuda_and_a_driver_nothing_is_said_of_versions(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "cuda_builds", lambda: {"onnxruntime": None, "torch": None})
    assert all(found["name"] != "CUDA versions" for found in json.loads(slm("doctor", "--json").out)["findings"])


def test_the_version_that_onnxruntime_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    assert probes.cuda_builds()["onnxruntime"] == "13.0"
    monkeypatch.setattr(onnxruntime, "cuda_version", "")
    monkeypatch.setattr(probes, "requires", lambda name: ["numpy>=1.21", 'nvidia-cuda-runtime~=13.0; extra == "cuda"'])
    assert probes.cuda_builds()["onnxruntime"] == "13.0"
    monkeypatch.setattr(probes, "requires", lambda name: ['nvidia-cuda-runtime-cu12~=12.0; extra == "cuda"'])
    assert probes.cuda_builds()["onnxruntime"] == "12"


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)",
            "580.65.06",
        ),
        ("something else", None),
    ],
)
def test_the_release_is_read_from_what_the_module_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, release: str | None
) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0)\n")
    monkeypatch.setattr(nvidia, "_VERSION_FILE", tmp_path / "version")
    assert nvidia._release() == release


def test_a_driver_that_crashes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.child, "run", lambda *_, **__: Done(-11, "", ""))
    monkeypatch.setattr(nvidia, "_VERSION_FILE", Path("nowhere"))
    found = nvidia.driver()
    assert not found.present and found.error


def test_a_machine_without_a_driver() -> None:
    if (found := nvidia.driver()).present:
        pytest.skip("this machine has an NVIDIA driver")
    assert found.gpus == () and "libcuda" in str(found.error)


@pytest.mark.parametrize(
    ("capability", "architectures", "there"),
    [
        ((7, 5), ("sm_75", "sm_80", "sm_120"), True),
        ((7, 0), ("sm_75", "sm_80", "sm_120"), False),
        ((8, 9), ("sm_75", "sm_80", "sm_90"), True),  # machine code of 8.0 runs on 8.9
        ((8, 0), ("sm_75", "sm_86"), False),
        ((12, 1), ("sm_90", "compute_90"), True),  # by the driver's compiler
        ((9, 0), ("sm_75", "sm_90a"), True),
        ((7, 0), (), True),
    ],
)
def test_whether_pytorch_has_kernels_for_a_gpu(
    capability: tuple[int, int], architectures: tuple[str, ...], there: bool
) -> None:
    assert probes.has_kernels(capability, architectures) == there


@pytest.mark.usefixtures("quick")
def test_a_gpu_without_kernels_in_pytorch_is_a_problem(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    said = finding(slm, "GPU in PyTorch")
    assert said["level"] == "problem" and "no kernels for it (sm_75, sm_80)" in said["value"]


@pytest.mark.usefixtures("quick")
def test_the_gpu_and_its_training_type(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    report = json.loads(slm("doctor", "--json").out)
    assert (report["cuda"]["name"], report["cuda"]["compute_capability"]) == ("Tesla T4", "7.5")
    assert set(report["training_dtype"]["presets"].values()) == {"float16 autocast, loss scaled"}
    assert "does not multiply bfloat16" in report["training_dtype"]["why"]
