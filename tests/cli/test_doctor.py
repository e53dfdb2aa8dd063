"""`slm doctor`: every finding with its advice, whatever is missing or broken."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.cli import nvidia, probes
from slm.cli.console import STDOUT
from slm.cli.nvidia import Driver
from slm.cli.probes import Provider
from slm.core.install import install_hint
from slm.core.machine import Memory

Slm = Callable[..., Any]

DOCTOR = "slm.cli.commands.doctor"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
KEYS = {
    "python",
    "slm",
    "system",
    "cores",
    "cpu_quota",
    "memory",
    "instruction_sets",
    "providers",
    "driver",
    "cuda",
    "cuda_builds",
    "training_dtype",
    "tokenizers_offline",
    "packages",
    "problems",
    "findings",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started: the CPU's provider runs, and there is no NVIDIA driver."""
    monkeypatch.setattr(probes, "step_with", lambda provider: ([CPU], Provider(True, True)))
    monkeypatch.setattr(nvidia, "driver", Driver)


def finding(slm: Slm, name: str) -> dict[str, Any]:
    report = json.loads(slm("doctor", "--json").out)
    [found] = [found for found in report["findings"] if found["name"] == name]
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Every package is installed but onnxruntime-gpu, except for what is changed."""
    found = {"onnxruntime-gpu": None} | {name.replace("_", "-"): version for name, version in changed.items()}
    monkeypatch.setattr(probes, "package_version", lambda name: found.get(name, "1.0"))


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = probes.find_spec
    monkeypatch.setattr(probes, "find_spec", lambda name: None if name in packages else found(name))


def test_the_report_is_one_complete_object(slm: Slm) -> None:
    result = slm("doctor", "--json")
    assert result.err == ""
    report = json.loads(result.out)
    assert result.code == bool(report["problems"])
    assert set(report) == KEYS
    assert report["cores"]["machine"] >= report["cores"]["allowed"] >= report["cores"]["used"] >= 1
    assert report["memory"]["usable"] > 0
    assert report["providers"][CPU] == {"loads": True, "runs": True, "error": None}
    assert "AzureExecutionProvider" not in report["providers"]
    types = report["training_dtype"]
    assert types["presets"].keys() == {"gemma3-270m", "stories-4m", "tiny"} >= types["bfloat16_speedup"].keys()
    assert all(CUDA in problem for problem in report["problems"])  # its libraries need not be there
    for found in report["findings"]:
        assert found.keys() == {"name", "value", "advice", "level"} and found["level"] in ("ok", "note", "problem")


MISSING = {"peft": "train", "gguf": "convert", "transformers": "dev"}


def test_advice_stands_beside_what_was_found(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    versions(monkeypatch, peft=None, gguf=None, transformers=None)
    monkeypatch.setattr(STDOUT, "width", 400)
    result = slm("doctor")
    assert result.code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in result.out.splitlines() if "│" in line]
    rows = {name: (value, advice) for name, value, advice in cells}
    missing = {value: advice for name, value, advice in cells if name == "missing packages"}
    assert missing == {name: install_hint(extra) for name, extra in MISSING.items()}
    assert "tiktoken 1.0" in rows["packages"][0]
    assert (
        result.err
        == "Verdict: ready for generation; import and quantization needs gguf; training and export needs peft.\n"
    )


def test_the_two_onnxruntimes_conflict(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    versions(monkeypatch, onnxruntime_gpu="1.0")
    result = slm("doctor", "--json")
    assert result.code == slm("doctor").code == 1  # a problem; advice alone is 0, as in the test above
    assert "overwrite each other" in json.loads(result.out)["problems"][0]
    assert "problem: onnxruntime and onnxruntime-gpu overwrite each other: uninstall both" in slm("doctor").err


def test_no_onnxruntime_at_all(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, onnxruntime=None)
    without(monkeypatch, "onnxruntime")
    report = json.loads(slm("doctor", "--json").out)
    assert report["providers"] == {}
    assert report["problems"] == [f"no onnxruntime: {install_hint('cpu')}; with an NVIDIA GPU: {install_hint('cuda')}"]
    assert slm("doctor").err.endswith("Verdict: 1 problem, listed above.\n")


def test_what_the_base_installation_brings_is_a_problem_when_missing(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    versions(monkeypatch, jinja2=None)
    report = json.loads(slm("doctor", "--json").out)
    assert report["problems"] == [f"jinja2 is missing: {install_hint()}"]
    assert report["findings"][0]["name"] == "jinja2"  # problems come first


def test_a_provider_that_is_listed_but_does_not_load(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        CPU: Provider(True, True),
        CUDA: Provider(False, False, "libcublasLt.so.12: cannot open shared object file: No such file or directory"),
        TENSORRT: Provider(False, False, "libnvinfer.so.10: cannot open shared object file: No such file or directory"),
    }
    listed = [TENSORRT, CUDA, "AzureExecutionProvider", CPU]
    monkeypatch.setattr(probes, "step_with", lambda provider: (listed, answers[provider]))
    report = json.loads(slm("doctor", "--json").out)
    assert {name: provider["loads"] for name, provider in report["providers"].items()} == {
        CPU: True,
        TENSORRT: False,
        CUDA: False,
    }
    [problem] = report["problems"]  # nothing of slm needs TensorRT
    assert "libcublasLt.so.12" in problem and "LD_LIBRARY_PATH" in problem
    said = finding(slm, TENSORRT)
    assert said["level"] == "note" and "libnvinfer" in said["value"]


def test_a_provider_that_this_onnxruntime_does_not_have_does_not_load() -> None:
    if CUDA in (available := probes.step_with(CPU)[0]):
        pytest.skip("this onnxruntime has CUDA's provider")
    assert CPU in available
    listed, provider = probes.step_with(CUDA)
    assert listed == available and not provider.loads and provider.error


class Done:
    """The result of a process."""

    def __init__(self, returncode: int, stdout: str, stderr: str) -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


LIBRARY = (
    "\x1b[1;31m2026-01-01 10:00:00.1 [E:onnxruntime:Default, provider_bridge_ort.cc:2167 TryGetProviderInfo_CUDA] "
    "/src/provider_bridge_ort.cc:1778 [ONNXRuntimeError] : 1 : FAIL : Failed to load library libproviders_cuda.so "
    "with error: libcudnn.so.9: cannot open shared object file: No such file or directory\x1b[m\n"
    "2026-01-01 10:00:00.2 [W:onnxruntime:Default, pybind.cc:1055] Failed to create CUDAExecutionProvider.\n"
)
ANSWER = {"available": [CUDA, CPU], "loaded": [CPU], "ran": False, "error": None}
FELL_BACK = json.dumps(ANSWER) + "\n"
FAILED = json.dumps(ANSWER | {"loaded": [], "error": "CUDA failure 35: the driver is insufficient"}) + "\n"


@pytest.mark.parametrize(
    ("done", "error"),
    [
        (Done(0, FELL_BACK, LIBRARY), "libcudnn.so.9: cannot open shared object file: No such file or directory"),
        (Done(0, FAILED, ""), "CUDA failure 35: the driver is insufficient"),
        (Done(0, FELL_BACK, ""), "onnxruntime reports no reason"),
        (
            Done(1, "", "Traceback ...\nImportError: libgomp.so.1: no such file\n"),
            "ImportError: libgomp.so.1: no such file",
        ),
        (Done(-11, "", ""), "the process ended with -11"),
        (Done(0, "", ""), "IndexError: list index out of range"),
    ],
)
def test_the_reason_is_found_in_what_onnxruntime_says(monkeypatch: pytest.MonkeyPatch, done: Done, error: str) -> None:
    monkeypatch.setattr(probes.child, "run", lambda *_, **__: done)
    assert probes.step_with(CUDA)[1] == Provider(False, False, error)


@pytest.mark.parametrize("ran", [True, False])
def test_a_provider_that_loads_must_also_compute(slm: Slm, monkeypatch: pytest.MonkeyPatch, ran: bool) -> None:
    answer = {"available": [CUDA, CPU], "loaded": [CUDA, CPU], "ran": ran, "error": None if ran else "differs by 3.9"}
    # What onnxruntime warns of on the way is not the reason.
    monkeypatch.setattr(probes.child, "run", lambda *_, **__: Done(0, json.dumps(answer) + "\n", LIBRARY))
    assert probes.step_with(CUDA)[1] == Provider(True, ran, answer["error"])
    monkeypatch.setattr(nvidia, "driver", Driver)
    problems = json.loads(slm("doctor", "--json").out)["problems"]
    assert any("does not run a step correctly (differs by 3.9)" in problem for problem in problems) != ran


def test_a_provider_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_LOADING_SECONDS", 0.01)
    provider = probes.step_with(CPU)[1]
    assert not provider.loads and "TimeoutExpired" in str(provider.error)


def test_an_onnxruntime_that_cannot_be_imported_is_a_problem(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "step_with", lambda provider: ([], Provider(False, False, "ImportError: libgomp.so.1")))
    [problem] = json.loads(slm("doctor", "--json").out)["problems"]
    assert "libgomp.so.1" in problem and "reinstall onnxruntime" in problem


@pytest.mark.parametrize("name", ["instruction_sets", "memory", "cpu_quota", "usable_cores"])
def test_a_probe_that_fails_takes_nothing_else_down(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None, name: str
) -> None:
    monkeypatch.setattr(f"{DOCTOR}.{name}", lambda: 1 / 0)
    result = slm("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 0 and set(report) == KEYS
    assert any("ZeroDivisionError" in found["value"] for found in report["findings"])
    assert slm("doctor").code == 0


@pytest.mark.parametrize("name", ["cuda", "training_type", "offline"])
def test_a_broken_package_takes_nothing_down(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None, name: str) -> None:
    def broken() -> None:
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(probes, name, broken)
    result = slm("doctor", "--json")
    assert result.code == 0 and "libtorch_cpu.so" in result.out


@pytest.mark.parametrize(
    ("sets", "advice"),
    [
        ({"AVX2": True, "AVX-512F": True, "AVX-512 VNNI": True, "AVX-VNNI": False}, None),
        ({"AVX2": True, "AVX-512F": False, "AVX-512 VNNI": False, "AVX-VNNI": True}, None),
        ({"AVX2": True, "AVX-512F": True, "AVX-512 VNNI": False, "AVX-VNNI": False}, "slower without VNNI"),
        ({"AVX2": True, "AVX-512F": False, "AVX-512 VNNI": False}, "slower without VNNI"),
        ({"AVX2": False, "AVX-512F": False, "AVX-512 VNNI": False, "AVX-VNNI": False}, "without AVX2"),
        ({"NEON": True, "dot product": True, "i8mm": False}, None),
        ({"NEON": True, "dot product": False, "i8mm": False}, "without dot product"),
        ({"NEON": True}, None),
        ({}, None),
    ],
)
def test_what_a_lack_means_for_int8(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None, sets: dict[str, bool], advice: str | None
) -> None:
    monkeypatch.setattr(f"{DOCTOR}.instruction_sets", lambda: sets)
    said = finding(slm, "instruction sets")
    assert (advice is None) == (said["advice"] is None) and (advice or "") in (said["advice"] or "")
    assert said["level"] == ("ok" if advice is None else "note")


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (Memory(64 << 30, 32 << 30, None), None),
        (Memory(64 << 30, 32 << 30, 8 << 30), "11.3 GiB"),
        (Memory(64 << 30, 8 << 30, None), "11.3 GiB"),
        (Memory(512 << 20, 400 << 20, None), "631 MiB"),
        (Memory(None, None, None), None),
    ],
)
def test_memory_under_what_a_thing_needs(
    slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None, room: Memory, advice: str | None
) -> None:
    monkeypatch.setattr(f"{DOCTOR}.memory", lambda: room)
    said = finding(slm, "memory")
    assert (advice is None) == (said["advice"] is None) and (advice or "") in (said["advice"] or "")


def test_the_container_quota_is_said(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(f"{DOCTOR}.cpu_quota", lambda: 0.5)
    said = finding(slm, "cores")
    assert "quota is 0.5" in said["value"] and "more CPU" in said["advice"]


def test_a_cpu_without_bfloat16_trains_in_float32(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("slm.train.precision.bfloat16_instructions", list)
    found = json.loads(slm("doctor", "--json").out)["training_dtype"]
    assert set(found["presets"].values()) == {"float32"} and found["bfloat16_speedup"] == {}
    assert found["why"] == "the CPU has no instructions for bfloat16"


def test_a_cpu_with_bfloat16_is_measured(slm: Slm, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("slm.train.precision.bfloat16_instructions", lambda: ["AVX-512 BF16"])
    monkeypatch.setattr("slm.train.trial._speedup", lambda shape: 2.0 if '"hidden_size":640' in shape else 1.1)
    found = json.loads(slm("doctor", "--json").out)["training_dtype"]
    assert found["presets"] == {"gemma3-270m": "bfloat16 autocast", "stories-4m": "float32", "tiny": "float32"}
    assert found["why"].endswith("with AVX-512 BF16; a layer is faster by 2.0 (gemma3-270m), 1.1 (stories-4m)")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no token, whether the Hub's client is installed or not."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(probes, "_hub", lambda: (tmp_path / "hub", tmp_path / "token"))
    return tmp_path


def test_a_token_is_never_printed(slm: Slm, monkeypatch: pytest.MonkeyPatch, hub: Path, quick: None) -> None:
    assert not probes.offline().hub_token
    (hub / "token").write_text("hf_FromTheFile")
    assert probes.offline().hub_token
    monkeypatch.setenv("HF_TOKEN", "hf_FromTheEnvironment")
    for arguments in (("doctor",), ("doctor", "--json")):
        result = slm(*arguments)
        assert "configured" in result.out
        assert "hf_From" not in result.out + result.err
    (hub / "token").unlink()
    assert probes.offline().hub_token


def test_models_in_the_cache_are_counted(slm: Slm, monkeypatch: pytest.MonkeyPatch, hub: Path, quick: None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = finding(slm, "Hugging Face cache")
    assert said["value"].startswith("0 models") and said["advice"] == "unset HF_HUB_OFFLINE to download"
    for name in ("models--google--gemma-3-270m", "datasets--roneneldan--TinyStories"):
        (hub / "hub" / name).mkdir(parents=True)
    said = finding(slm, "Hugging Face cache")
    assert said["value"].startswith("1 model ") and "HF_HUB_OFFLINE is set" in said["value"] and said["advice"] is None


def test_without_the_hub_client_its_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "huggingface_hub")
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert probes._hub() == (tmp_path / "huggingface" / "hub", tmp_path / "huggingface" / "token")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert probes._hub() == (tmp_path / "home" / "hub", tmp_path / "home" / "token")


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_gpt2_needs_both_of_its_files(
    slm: Slm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, variable: str
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    first, second = probes._GPT2_FILES
    (tmp_path / first).touch()
    assert "TIKTOKEN_CACHE_DIR" in finding(slm, "GPT-2's tokenizer")["advice"]
    (tmp_path / second).touch()
    said = finding(slm, "GPT-2's tokenizer")
    assert said["advice"] is None and str(tmp_path) in said["value"]
    monkeypatch.setenv(variable, "")  # tiktoken keeps nothing then
    assert probes.offline().gpt2_directory is None and not probes.offline().gpt2


def test_gpt2_files_are_found_where_tiktoken_finds_them(gpt2_vocabulary: None, tmp_path: Path) -> None:
    if not any(tmp_path.iterdir()):
        pytest.skip("GPT-2's files are not at hand")
    assert probes.offline().gpt2


def test_an_edge_device_has_only_what_answers(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'huggingface_hub', 'tiktoken', 'transformers', 'safetensors', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "from slm.cli.main import main; main(['doctor', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    report = json.loads(done.stdout)
    assert report["providers"][CPU]["runs"] and report["cuda"]["missing"] == "PyTorch is not installed"
    assert report["training_dtype"]["presets"] == {} and not any(
        "could not" in one["value"] for one in report["findings"]
    )
    assert done.stderr == ""
