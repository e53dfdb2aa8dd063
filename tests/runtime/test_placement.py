"""Bundles on a device that they were not exported for: rejected with a command that helps, allowed on request, or noted."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.core.contract import Device
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, amend
from slm.export.bundle import ExportOptions, export_bundle
from slm.loading import load, load_ensemble
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.placement import check_placement, conversion_note

Slm = Callable[..., Any]
COMMANDS = {
    "generate": ("generate", "-p", "x"),
    "chat": ("chat",),
    "serve": ("serve", "--port", "0"),
    "bench": ("bench", "--prompt", "4", "--batch", "1", "--rounds", "1"),
    "eval": ("eval",),
    "verify": ("verify",),
}


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists CUDA's provider, which then fails to start."""
    monkeypatch.setattr("slm.runtime.session.available_devices", lambda: ["cpu", "cuda"])


@pytest.fixture(scope="module")
def home(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a bundle of it for the CPU, at paths with a space."""
    home = tmp_path_factory.mktemp("a home")
    shutil.copytree(shared_checkpoint, home / "checkpoint")
    export_bundle(home / "checkpoint", home / "onnx")
    return home


def recorded(bundle: Bundle, out: Path, **fields: Any) -> Bundle:
    """Returns a copy of a bundle with other fields in its manifest; the graph is unchanged."""
    shutil.copytree(bundle.path, out)
    return amend(out, bundle.manifest.model_copy(update=fields))


def test_the_command_in_the_hint_makes_a_bundle_that_passes(home: Path, slm: Slm) -> None:
    with pytest.raises(SlmError, match="exported for the CPU: on CUDA its attention would run on the CPU") as caught:
        load(home / "onnx", device="cuda")
    hint = str(caught.value.hint)
    command, _, other = hint.partition("; ")
    assert shlex.split(command) == ["slm", "export", "--onnx", "--device", "cuda", str(home / "checkpoint")]
    assert "--allow-slow" in other and "allow_slow=True" in other
    result = slm(*shlex.split(command)[1:], "--json")
    assert result.code == 0
    check_placement(Bundle.open(Path(json.loads(result.out)["bundle"])), "cuda")


@pytest.mark.parametrize(("precision", "option"), [("int8", "--int8"), ("int4", "--int4")])
def test_of_a_quantized_bundle_the_hint_quantizes(home: Path, tmp_path: Path, precision: Any, option: str) -> None:
    bundle = Bundle.open(home / "onnx")
    text = TokenRows("random", np.random.default_rng(0).integers(0, bundle.config.vocab_size, (2, 24)))
    made, _ = quantize_bundle(bundle, tmp_path / "q", text, Settings(gate=Gate(None), precision=precision), None, text)
    with pytest.raises(SlmError) as caught:
        load(made.path, device="cuda")
    export, _, quantize = str(caught.value.hint).partition("; ")[0].partition(", then ")
    assert shlex.split(export)[:5] == ["slm", "export", "--onnx", "--device", "cuda"]
    # The second command quantizes the output of the first.
    assert shlex.split(quantize) == ["slm", "quantize", option, str(home / "onnx-cuda")]


def test_the_hint_repeats_what_the_bundle_was_exported_with(home: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(home / "onnx")
    adapter = bundle.manifest.provenance | {"adapter": "my adapter"}
    changed = recorded(bundle, tmp_path / "b", context=100, provenance=adapter)
    with pytest.raises(SlmError) as caught:
        check_placement(changed, "cuda")
    wanted = ["--onnx", "--device", "cuda", str(home / "checkpoint"), "--adapter", "my adapter", "--context", "100"]
    assert shlex.split(str(caught.value.hint).partition("; ")[0])[2:] == wanted


@pytest.mark.parametrize("provenance", [{}, {"checkpoint": "gone"}, {"checkpoint": 3}])
def test_a_checkpoint_that_is_gone_is_not_named(home: Path, tmp_path: Path, provenance: dict[str, Any]) -> None:
    changed = recorded(Bundle.open(home / "onnx"), tmp_path / "b", provenance=provenance, precision="int8")
    with pytest.raises(SlmError) as caught:
        check_placement(changed, "cuda")
    assert str(caught.value.hint).startswith(
        "slm export --onnx --device cuda CHECKPOINT, then slm quantize --int8 BUNDLE;"
    )


@pytest.mark.parametrize(
    ("target", "device"), [("portable", "cpu"), ("fused", "cuda"), ("fused", "webgpu")], ids=lambda each: str(each)
)
def test_what_attends_on_cuda_is_not_refused(
    shared_checkpoint: Path, tmp_path: Path, target: Any, device: Device
) -> None:
    """By the placement that onnxruntime-gpu makes of them (`tests/peers/test_fake_cuda.py`)."""
    check_placement(
        export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(target=target, device=device)), "cuda"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_unless_it_is_allowed(
    home: Path, slm: Slm, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    name, *options = COMMANDS[command]
    arguments = (name, str(home / "onnx"), *options, "--device", "cuda")
    refused = slm(*arguments)
    assert refused.code == 1 and "was exported for the CPU" in refused.err and "Traceback" not in refused.err
    assert "slm export --onnx --device cuda" in refused.err and refused.out == ""
    allowed = slm(*arguments, "--allow-slow")  # fails later, as it must on a machine without CUDA
    assert allowed.code == 1 and "the CUDA provider could not start" in allowed.err


def test_8_bit_caches_are_refused_always(home: Path) -> None:
    """Their attention has one part for the CPU alone and one that CUDA would take."""
    bundle = Bundle.open(home / "onnx")
    rounded = tuple(layer.model_copy(update={"dtype": "int8"}) for layer in bundle.manifest.cache)
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"cache": rounded}), bundle.config)
    for allow_slow in (False, True):
        with pytest.raises(SlmError, match="INT8 caches, which CUDA does not support") as caught:
            check_placement(changed, "cuda", allow_slow)
        assert "slm export --onnx --device cuda" in str(caught.value.hint)
    check_placement(changed, "cpu")


def test_an_ensemble_refuses_too(home: Path) -> None:
    with pytest.raises(SlmError, match="exported for the CPU"):
        load_ensemble([home / "onnx", home / "onnx"], device="cuda")
    with pytest.raises(SlmError, match="the CUDA provider could not start"):
        load_ensemble([home / "onnx", home / "onnx"], device="cuda", allow_slow=True)


def test_without_a_provider_that_is_said_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.runtime.session.available_devices", lambda: ["cpu"])
    with pytest.raises(SlmError, match="no CUDA provider"):
        load(home / "onnx", device="cuda")


@pytest.mark.parametrize(("device", "name"), [("cuda", "CUDA"), ("webgpu", "WebGPU")])
def test_a_bundle_for_a_gpu_on_the_cpu_is_named_slow(
    shared_checkpoint: Path, slm: Slm, device: Device, name: str
) -> None:
    bundle = export_bundle(shared_checkpoint, Path("b"), ExportOptions(device=device))
    result = slm("generate", "b", "-p", "x", "--max-new-tokens", "2", "--draft", "2")
    assert result.code == 0 and f"note: this bundle was exported for {name}" in result.err
    assert shlex.join(["slm", "export", "--onnx", str(shared_checkpoint)]) in result.err
    assert conversion_note(bundle, "cuda") == ""


def test_a_bundle_for_the_cpu_on_the_cpu_is_not(home: Path, slm: Slm) -> None:
    result = slm("generate", str(home / "onnx"), "-p", "x", "--max-new-tokens", "2")
    assert result.code == 0 and "exported for" not in result.err
