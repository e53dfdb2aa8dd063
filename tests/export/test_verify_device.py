"""Verification on devices: `slm verify --device`, the record in the manifest, and its display."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.cli import following
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, amend, parity_devices
from slm.core.progress import Silent
from slm.export import parity as compared
from slm.export import verify as module
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.verify import record_parity, verify_bundle
from slm.runtime.session import DeviceUnavailable

Slm = Callable[..., Any]


@pytest.fixture(scope="module")
def made(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a bundle for CUDA, which tests must not change."""
    return export_bundle(shared_checkpoint, tmp_path_factory.mktemp("made") / "cuda", ExportOptions(device="cuda")).path


@pytest.fixture
def bundle(made: Path) -> Bundle:
    """Returns a copy of the bundle as ./b."""
    shutil.copytree(made, "b")
    return Bundle.open(Path("b"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Replaces CUDA with the CPU, and returns the list of comparisons: (device, whether optimized)."""
    asked: list[tuple[str, bool]] = []
    check = module.check_parity

    def check_parity(*arguments: Any, device: str = "cpu", optimize: bool = True, **named: Any) -> Any:
        *arguments_, device = arguments if len(arguments) > 4 else (*arguments, device)
        asked.append((device, optimize))
        return check(*arguments_, optimize=optimize, **named)

    monkeypatch.setattr(module, "check_parity", check_parity)
    for place in (module, __import__("slm.runtime.placement", fromlist=["placement"])):
        monkeypatch.setattr(place, "check_available", lambda device: None)
    return asked


def test_the_graph_is_compared_with_and_without_optimizations(
    bundle: Bundle, shared_checkpoint: Path, gpu: list[tuple[str, bool]]
) -> None:
    found = verify_bundle(bundle, shared_checkpoint, Silent(), "cuda")
    assert gpu == [("cuda", True), ("cuda", False)]
    assert list(found.parity) == ["cuda", "cuda, graph as written"] and found.weights == 42


def test_on_the_cpu_alone(bundle: Bundle, shared_checkpoint: Path, gpu: list[tuple[str, bool]]) -> None:
    found = verify_bundle(bundle, shared_checkpoint, Silent(), "cpu")
    assert gpu == [("cpu", True), ("cpu", False)] and list(found.parity) == ["cpu", "cpu, graph as written"]


def test_without_a_device_both(bundle: Bundle, shared_checkpoint: Path, gpu: list[tuple[str, bool]]) -> None:
    assert set(gpu) == set() and set(verify_bundle(bundle, shared_checkpoint, Silent()).parity) == {
        "cuda", "cuda, graph as written", "cpu", "cpu, graph as written",
    }  # fmt: skip


def test_without_a_device_a_bundle_for_the_cpu_is_not_run_on_cuda(
    shared_bundle: Bundle, shared_checkpoint: Path, gpu: list[tuple[str, bool]]
) -> None:
    assert list(verify_bundle(shared_bundle, shared_checkpoint, Silent()).parity) == ["cpu", "cpu, graph as written"]
    slow = verify_bundle(shared_bundle, shared_checkpoint, Silent(), allow_slow=True)
    assert "cuda" in slow.parity


def test_a_gpu_that_does_not_start_is_an_error_only_when_it_is_named(
    bundle: Bundle, shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.runtime.session.available_devices", lambda: ["cpu", "cuda"])
    with pytest.raises(DeviceUnavailable, match="could not start"):
        verify_bundle(bundle, shared_checkpoint, Silent(), "cuda")
    noted: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "note", noted.append)
    assert "cuda" not in verify_bundle(bundle, shared_checkpoint, progress).parity
    assert any("skipping CUDA" in note for note in noted)


def test_another_result_on_cuda_is_named(
    bundle: Bundle, shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that is right on the CPU and wrong on the GPU fails, such as one with wrongly fused norms."""
    difference = compared._Difference(0.3, 0.01)
    with pytest.raises(
        SlmError, match=r"not match the checkpoint on CUDA: logits differ by 0\.3 \(whole\), limit 5e-02"
    ) as caught:
        compared._check({"whole": difference}, 0.05, "cuda")
    assert "slm verify --device cpu" in str(caught.value.hint)
    compared._check({"whole": replace(difference, logits=0.01)}, 0.05, "cuda")
    with pytest.raises(SlmError, match="caches differ by nan"):
        compared._check({"whole": compared._Difference(0.01, float("nan"))}, 0.05, "cuda")


def test_what_is_recorded_and_shown(slm: Slm, bundle: Bundle, gpu: list[tuple[str, bool]]) -> None:
    assert parity_devices(bundle.manifest) == ["cpu"]
    shown = " ".join(slm("info", "b").out.split())
    assert "cpu; not verified on cuda (slm verify --device cuda, on a GPU)" in shown
    result = slm("verify", "b", "--device", "cuda", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["recorded"] and set(report["parity"]) == {"cuda", "cuda, graph as written"}
    assert "generate" in report["next"]  # does not suggest verify again
    again = Bundle.open(Path("b"))  # its files still match the manifest
    assert parity_devices(again.manifest) == ["cpu", "cuda"]
    assert again.manifest.model_copy(update={"gpu_parity": {}}) == bundle.manifest
    assert again.manifest.gpu_parity["cuda"].runtime.startswith("onnxruntime ")
    info = json.loads(slm("info", "b", "--json").out)
    assert info["parity_devices"] == ["cpu", "cuda"] and info["gpu_parity"]["cuda"]["tokens"] == 48
    assert "not verified" not in " ".join(slm("info", "b").out.split())


def test_the_cpu_alone_changes_no_file(slm: Slm, bundle: Bundle, gpu: list[tuple[str, bool]]) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    assert slm("verify", "b", "--device", "cpu").code == 0
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_bundle_that_cannot_be_written_to_is_verified_all_the_same(
    bundle: Bundle, shared_checkpoint: Path, gpu: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    found = verify_bundle(bundle, shared_checkpoint, Silent(), "cuda")
    monkeypatch.setattr(module, "amend", refuse)
    assert not record_parity(bundle, found)


def test_export_says_what_it_has_not_proved(
    slm: Slm, shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = slm("export", "--onnx", shared_checkpoint, "--device", "cuda", "--out", "e", "--json")
    report = json.loads(result.out)
    assert report["parity_devices"] == ["cpu"]
    assert report["parity_missing"].endswith("slm verify e --device cuda")
    assert report["next"] == "slm verify e --device cuda"
    result = slm("export", "--onnx", shared_checkpoint, "--device", "cuda", "--out", "e")
    assert "Verified on the CPU only. The bundle is not verified on CUDA" in result.err
    assert "next (on a machine with an NVIDIA GPU; this one has none): slm verify e --device cuda\n" in result.err
    monkeypatch.setattr(following, "_has_gpu", lambda: True)  # the control
    following.next_step("slm verify e --device cuda")
    following.next_step("slm quantize --int8 'a --device cuda'")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["next: slm verify e --device cuda", "next: slm quantize --int8 'a --device cuda'"]
    result = slm("export", "--onnx", shared_checkpoint, "--device", "webgpu", "--out", "w")
    assert "not verified on WebGPU" in result.err
    report = json.loads(slm("export", "--onnx", shared_checkpoint, "--out", "c", "--json").out)
    assert report["parity_devices"] == ["cpu"] and report["parity_missing"] is None


def test_what_is_quantized_is_not_proved_by_what_its_source_was(slm: Slm, shared_bundle: Bundle) -> None:

    shutil.copytree(shared_bundle.path, "f")
    assert shared_bundle.manifest.parity is not None
    amend(Path("f"), shared_bundle.manifest.model_copy(update={"gpu_parity": {"cuda": shared_bundle.manifest.parity}}))
    result = slm("quantize", "--int8", "f", "--out", "q", "--max-kl", "10")
    assert result.code == 0, result.err
    assert parity_devices(Bundle.open(Path("q")).manifest) == []
