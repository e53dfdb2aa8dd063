"""Quantized bundles for CUDA, created and measured on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.grid import as_stored
from slm.core.manifest import Bundle, Scheme
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import float_tensors, graph_tensors
from slm.export.verify import verify_bundle
from slm.quantize.blocks import quantize_nearest
from slm.quantize.make import quantize_bundle
from slm.quantize.page import figures
from slm.quantize.plain import plain_bundle
from slm.quantize.results import Report
from slm.quantize.rounding import restored
from slm.quantize.settings import Gate, Prefer, Settings
from slm.quantize.sweep import run_sweep
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

HALF = Scheme(bits=8, block_size=32, half=True)
# Signal-to-noise ratio (dB) of random weights: that of the same schemes with float32 scales, minus 0.5 dB.
FLOORS = {"int8": 42.0, "int4": 16.5}
# Limits of the KL divergence of a random model, in nats. Measured: 0.0002 for INT8, 0.01 for INT4.
KL_LIMITS = {"int8": 0.002, "int4": 0.05}


def random_text(bundle: Bundle, seed: int) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (4, 60)))


def make(source: Bundle, out: Path, **settings: Any) -> tuple[Bundle, Report]:
    chosen = Settings(gate=Gate(None), **settings)
    return quantize_bundle(source, out, random_text(source, 5), chosen, None, random_text(source, 6))


@pytest.fixture(scope="module")
def source(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(shared_checkpoint, tmp_path_factory.mktemp("cuda") / "onnx", ExportOptions(device="cuda"))


@pytest.fixture(scope="module")
def made(source: Bundle) -> dict[str, tuple[Bundle, Report]]:
    return {name: make(source, source.path.with_name(name), precision=name) for name in ("int8", "int4")}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_products_take_float16(made: dict[str, tuple[Bundle, Report]], shared_checkpoint: Path, precision: str) -> None:
    bundle, report = made[precision]
    manifest = Bundle.open(bundle.path).manifest  # opening compares the graph with the plan
    assert (manifest.device, manifest.precision) == ("cuda", precision)
    assert {layer.dtype for layer in manifest.cache} == {"float16"}
    quantization = manifest.quantization
    assert quantization is not None and quantization.accuracy_level == 0 and quantization.smoothing is None
    assert all(scheme.half for scheme in quantization.schemes.values())
    stored = graph_tensors(bundle.model_path)
    assert {array.dtype for name, array in ((n, stored[n]) for n in stored) if name.endswith("weight_scale")} == {
        np.dtype(np.float16)
    }
    nodes = [node.op_type for node in ir.load(bundle.model_path).graph]
    assert nodes.count("MatMulNBits") == 4 * bundle.config.num_hidden_layers + 1
    assert nodes.count("GatherBlockQuantized") == 1 and "FusedMatMul" not in nodes
    assert manifest.quality is not None and manifest.quality.kl_nats < KL_LIMITS[precision]
    assert min(each.snr_db or 0 for each in report.tensors) > FLOORS[precision]
    # The report has no speeds: they are measured on the CPU only.
    assert report.speeds is None and not any("tokens/s" in row[0] for row in figures(report))
    found = verify_bundle(bundle, shared_checkpoint, Silent())
    assert found.weights_off <= 1 and {parity.tolerance for parity in found.parity.values()} == {0.05}


def test_webgpu_stores_8_bits_as_cuda_does(shared_checkpoint: Path) -> None:
    exported = export_bundle(shared_checkpoint, Path("webgpu"), ExportOptions(device="webgpu"))
    bundle, _ = make(exported, Path("q"))
    manifest = Bundle.open(bundle.path).manifest
    assert (manifest.device, manifest.precision, manifest.cache) == ("webgpu", "int8", exported.manifest.cache)
    quantization = manifest.quantization
    assert quantization is not None and quantization.accuracy_level == 0
    assert all(scheme.half for scheme in quantization.schemes.values())
    assert manifest.quality is not None and manifest.quality.kl_nats < KL_LIMITS["int8"]
    found = verify_bundle(bundle, shared_checkpoint, Silent())
    assert found.weights_off <= 1 and {parity.tolerance for parity in found.parity.values()} == {0.05}


def test_verify_sees_another_checkpoint(
    made: dict[str, tuple[Bundle, Report]], make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    bundle, _ = made["int8"]
    model = make_model(bundle.config)
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 0.05
    save_checkpoint(Path("other"), model, tokenizer, {})
    with pytest.raises(SlmError, match="down_proj"):
        verify_bundle(bundle, Path("other"), Silent())


def test_products_that_would_overflow_stay_in_float32(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    model = make_model(config)
    model.model.layers[1].mlp.down_proj.weight.data *= 3e5
    save_checkpoint(Path("c"), model, tokenizer, {})
    source = export_bundle(Path("c"), Path("b"), ExportOptions(device="cuda"))
    assert source.manifest.ranges is not None and source.manifest.ranges.float32
    bundle, _ = make(source, Path("q"), precision="int4", prefer="size")
    assert bundle.manifest.quantization is not None
    schemes, stored = bundle.manifest.quantization.schemes, graph_tensors(bundle.model_path)
    kept = {path for path, scheme in schemes.items() if not scheme.half}
    assert kept == set(source.manifest.ranges.float32)
    assert {stored[f"{path}.weight_scale"].dtype.name for path in kept} == {"float32"}
    found = verify_bundle(Bundle.open(bundle.path), Path("c"), Silent())
    assert all(np.isfinite(parity.largest) for parity in found.parity.values())


def test_the_float32_twin_is_the_same_model(source: Bundle, shared_bundle: Bundle) -> None:
    """The float32 bundle has the weights rounded to float16, and a float32 source is used directly."""
    ids = np.arange(40)[None]
    with plain_bundle(source, source.path.parent) as plain:
        assert plain.path != source.path
        there = plain.path
        np.testing.assert_allclose(OnnxDecoder(plain).logits(ids), OnnxDecoder(source).logits(ids), atol=0.05)
        tensors, theirs = graph_tensors(plain.model_path), float_tensors(source.model_path, {})
        for name in theirs:
            np.testing.assert_array_equal(tensors[name], theirs[name])
    assert not there.exists()
    with plain_bundle(shared_bundle, source.path.parent) as plain:
        assert plain is shared_bundle


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic": True}, "is for CUDA, which does not support --int8-dynamic"),
        ({"cache": "int8"}, "supports float16 caches only, not int8"),
        ({"cache": "float32"}, "supports float16 caches only, not float32"),
        ({"smooth": True}, "smoothed activations could overflow float16"),
    ],
)
def test_what_cuda_does_not_run_is_refused(source: Bundle, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SlmError, match=message):
        make(source, Path("out"), **settings)
    assert not Path("out").exists()


def test_what_was_quantized_and_what_is_for_browsers_is_refused(
    made: dict[str, tuple[Bundle, Report]], source: Bundle, shared_checkpoint: Path
) -> None:
    with pytest.raises(SlmError, match="is already int4"):
        make(made["int4"][0], Path("out"))
    webgpu = export_bundle(shared_checkpoint, Path("webgpu"), ExportOptions(device="webgpu"))
    with pytest.raises(SlmError, match="is for WebGPU, which does not support --head-bits 4"):
        make(webgpu, Path("out"), precision="int4", head_bits=4)
    with pytest.raises(SlmError, match="is for WebGPU, which does not support --int8-dynamic"):
        make(webgpu, Path("out"), dynamic=True)
    text = random_text(source, 5)
    with pytest.raises(SlmError, match="a sweep measures speed on the CPU"):
        run_sweep(source, Path("sweep"), text, {"int8": text, "int4": text}, Silent())
    assert not Path("out").exists() and not Path("sweep").exists()


@pytest.mark.parametrize("prefer", ["auto", "size"])
def test_int4_for_webgpu_keeps_tables_at_8_bits(shared_checkpoint: Path, prefer: Prefer) -> None:
    webgpu = export_bundle(shared_checkpoint, Path("webgpu"), ExportOptions(device="webgpu"))
    bundle, _ = make(webgpu, Path("q"), precision="int4", prefer=prefer)
    assert bundle.manifest.quantization is not None and bundle.manifest.precision == "int4"
    bits = {path: scheme.bits for path, scheme in bundle.manifest.quantization.schemes.items()}
    assert bits.pop("model.embed_tokens") == 8 and 4 in bits.values()


def test_speed_leaves_caches_in_float16(source: Bundle) -> None:
    bundle, report = make(source, Path("fast"), prefer="speed")
    assert {layer.dtype for layer in bundle.manifest.cache} == {"float16"} and report.settings["cache"] == "float16"


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6])
def test_integers_are_chosen_for_the_scales_that_are_stored(size: float) -> None:
    """No error exceeds half a step, also for small weights: below 6e-5, float16 has few digits for a scale."""
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32) * np.float32(size)
    arrays = quantize_nearest(weight, HALF)
    scale = arrays["weight_scale"]
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    off = np.abs(restored(arrays, HALF) - weight).reshape(64, -1, 32)
    assert (off <= 0.502 * scale[..., None]).all()
    # Negative control: scales that are rounded after the integers were chosen.
    plain = HALF.model_copy(update={"half": False})
    arrays = quantize_nearest(weight, plain)
    arrays["weight_scale"] = arrays["weight_scale"].astype(np.float16).astype(np.float32)
    careless = restored(arrays, plain) - weight
    assert np.square(careless).mean() > np.square(off).mean()


def test_scales_keep_their_sign_and_their_type() -> None:
    scales = np.array([0.1, -0.1, 0.0, 4e-8, -4e-8, 8e-8], np.float32)
    found = as_stored(scales, HALF)
    assert found.dtype == np.float32 and (np.sign(found) == np.sign(scales)).all()
    assert (np.abs(found[3:]) >= np.abs(scales[3:])).all()
    np.testing.assert_array_equal(as_stored(scales, HALF.model_copy(update={"half": False})), scales)


def test_half_scales_take_half_the_bytes() -> None:
    full = HALF.model_copy(update={"half": False})
    assert full.bytes(64, 128) - HALF.bytes(64, 128) == 2 * 64 * 4
