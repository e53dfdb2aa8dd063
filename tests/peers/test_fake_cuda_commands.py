"""Commands of slm with onnxruntime-gpu in front of a CUDA that computes nothing (`tests/fake_cuda`).

Its numbers are wrong, so whatever claims to check numbers must fail here: `slm doctor` and `slm verify` are tested by that.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.checkpoint import read_config
from slm.core.contract import Device
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle

pytestmark = pytest.mark.peer

CUDA = "CUDAExecutionProvider"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def home(shared_checkpoint: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint of a model whose heads CUDA's kernels take."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    model = CausalLM(read_config(shared_checkpoint).model_copy(update={"head_dim": 64})).eval()
    save_checkpoint(home / "checkpoint", model, tokenizer, {})
    return home


@pytest.fixture(scope="module")
def bundles(home: Path) -> dict[str, Path]:
    """A bundle for CUDA and one for the CPU."""
    devices: list[Device] = ["cuda", "cpu"]
    return {
        device: export_bundle(home / "checkpoint", home / device, ExportOptions(device=device)).path
        for device in devices
    }


@pytest.fixture
def command(fake_cuda: Run) -> Callable[..., dict[str, Any]]:
    """Runs `slm ARGUMENTS`, where {} stands for the bundle: (bundle, arguments) to exit code, output and messages."""

    def run(bundle: Path, *arguments: str, capability: str = "7.5", **variables: str) -> dict[str, Any]:
        ran = fake_cuda("fake_cuda_commands.py", bundle, capability, *arguments, **variables)
        found: dict[str, Any] = json.loads(ran.output.splitlines()[-1])
        return found | {"launches": sum(line.startswith("fake-cuda launch") for line in ran.log)}

    return run


def test_verify_on_cuda_sees_that_nothing_is_computed(command: Run, bundles: dict[str, Path]) -> None:
    done = command(bundles["cuda"], "verify", "{}", "--device", "cuda")
    assert done["code"] == 1 and "error: the bundle does not match the checkpoint" in done["err"], done
    assert done["launches"] > 0
    assert Bundle.open(bundles["cuda"]).manifest.gpu_parity == {}  # nothing is recorded that was not found


def test_verify_on_the_cpu_passes_beside_it(command: Run, bundles: dict[str, Path]) -> None:
    """The control of the test above: the bundle itself is right."""
    done = command(bundles["cuda"], "verify", "{}", "--device", "cpu", "--json")
    assert done["code"] == 0, done
    assert set(json.loads(done["out"])["parity"]) == {"cpu", "cpu, graph as written"}


def test_verify_without_a_device_compares_on_cuda_what_was_exported_for_it(
    command: Run, bundles: dict[str, Path]
) -> None:
    assert command(bundles["cuda"], "verify", "{}")["code"] == 1
    done = command(bundles["cpu"], "verify", "{}", "--json")
    assert done["code"] == 0 and "cuda" not in json.loads(done["out"])["parity"]


def test_a_bundle_for_the_cpu_is_refused_on_cuda(command: Run, home: Path, bundles: dict[str, Path]) -> None:
    asked = ("generate", "{}", "--device", "cuda", "-p", "Once", "--max-new-tokens", "3", "--greedy")
    refused = command(bundles["cpu"], *asked)
    assert refused["code"] == 1 and refused["launches"] == 0
    assert "was exported for the CPU: on CUDA its attention would run on the CPU" in refused["err"]
    assert f"slm export --onnx --device cuda {home / 'checkpoint'}" in refused["err"]
    allowed = command(bundles["cpu"], *asked, "--allow-slow")
    assert "CUDA (attention on the CPU)" in allowed["err"] and allowed["launches"] > 0


def test_a_bundle_for_cuda_is_not(command: Run, bundles: dict[str, Path]) -> None:
    """The control of the test above."""
    done = command(
        bundles["cuda"], "generate", "{}", "--device", "cuda", "-p", "Once", "--max-new-tokens", "3", "--greedy"
    )
    assert " on CUDA, " in done["err"] and "exported for" not in done["err"] and done["launches"] > 0


def test_doctor_runs_a_step_on_cuda_and_sees_that_it_is_wrong(command: Run, bundles: dict[str, Path]) -> None:
    report = json.loads(command(bundles["cuda"], "doctor", "--json")["out"])
    provider = report["providers"][CUDA]
    assert provider["loads"] and not provider["runs"]
    assert "one step differs from the reference by" in provider["error"]
    assert report["providers"]["CPUExecutionProvider"]["runs"]
    assert report["cuda_builds"]["onnxruntime"] == "13.0"
    assert report["driver"]["cuda"] == [13, 0]
    [gpu] = report["driver"]["gpus"]
    assert gpu == {"name": "a fake device", "compute_capability": [7, 5], "memory": 15 << 30}
    said = [found for found in report["findings"] if found["name"] in ("NVIDIA driver", "GPU", "CUDA versions")]
    assert {found["level"] for found in said} == {"ok"}


def test_doctor_names_a_driver_and_a_gpu_that_are_too_old(command: Run, bundles: dict[str, Path]) -> None:
    done = command(bundles["cuda"], "doctor", "--json", capability="7.0", FAKE_CUDA_DRIVER="12080")
    problems = json.loads(done["out"])["problems"]
    assert any("driver is too old" in each and "driver 580 or newer" in each for each in problems), problems
    assert any("compute capability 7.0" in each and "no kernels for it" in each for each in problems), problems


def test_doctor_says_that_there_is_no_driver(command: Run, bundles: dict[str, Path]) -> None:
    done = command(bundles["cuda"], "doctor", "--json", LD_LIBRARY_PATH="", LD_PRELOAD="")
    report = json.loads(done["out"])
    assert not report["providers"][CUDA]["loads"] and "libcuda.so.1" in report["providers"][CUDA]["error"]
    assert any("install the NVIDIA driver, 580 or newer" in each for each in report["problems"])


def test_products_of_float32_do_not_become_tf32(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    options = json.loads(fake_cuda("fake_cuda_options.py", bundles["cuda"], "8.9").output.splitlines()[-1])
    assert options["use_tf32"] == "0"
