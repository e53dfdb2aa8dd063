"""`slm verify`: bundles of every kind pass, and bundles of every precision fail with a single error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.config import FULL, SLIDING
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, seal
from slm.core.progress import Silent
from slm.export import verify
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.parity import TOLERANCE
from slm.export.verify import verify_bundle
from slm.quantize import plan
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows

# Settings of the quantized bundles.
QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 smoothed": {"smooth": True},
    "int8 caches": {"cache": "int8"},
    "int8 dynamic": {"dynamic": True, "smooth": True},
    "int4": {"precision": "int4", "prefer": "size", "smooth": True},
    "int4 mixed": {"precision": "int4", "smooth": False},
    "int4 nearest": {"precision": "int4", "prefer": "size", "method": "nearest"},
}
KINDS = ("float32", *QUANTIZED, "portable", "cuda", "webgpu")


@pytest.fixture(scope="module")
def bundles(
    shared_checkpoint: Path, shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Returns a bundle of each kind, all from the same checkpoint."""
    home = tmp_path_factory.mktemp("bundles")
    text, calibration = (
        TokenRows("random", np.random.default_rng(seed).integers(0, shared_bundle.config.vocab_size, (4, 60)))
        for seed in (5, 6)
    )

    def quantized(name: str) -> Bundle:
        settings = Settings(gate=Gate(None), **QUANTIZED[name])
        return quantize_bundle(shared_bundle, home / name.replace(" ", "-"), text, settings, None, calibration)[0]

    return {
        "float32": shared_bundle,
        **{name: quantized(name) for name in QUANTIZED},
        "portable": export_bundle(shared_checkpoint, home / "portable", ExportOptions(target="portable")),
        "cuda": export_bundle(shared_checkpoint, home / "cuda", ExportOptions(device="cuda")),
        "webgpu": export_bundle(shared_checkpoint, home / "webgpu", ExportOptions(device="webgpu")),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_its_checkpoint(bundles: dict[str, Bundle], shared_checkpoint: Path, kind: str) -> None:
    found = verify_bundle(bundles[kind], shared_checkpoint, Silent())
    assert found.weights == 42
    # float16 weights differ by rounding. Integer weights have exactly the recorded error.
    assert (found.weights_off > 0) == (kind in ("cuda", "webgpu"))
    assert {"cpu", "cpu, graph as written"} <= found.parity.keys()
    for parity in found.parity.values():
        assert parity.logits.keys() == {"whole", "chunks", "steps", "batch"}
    if kind in QUANTIZED and kind not in ("int8 caches", "int8 dynamic"):
        assert found.parity["cpu, float activations"].largest < TOLERANCE < found.parity["cpu"].largest


def test_sums_that_saturate_are_noticed(
    shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says that sums of two products fit in 16 bits, and the weights are those of an older version."""
    layer = plan.INT8_DYNAMIC.layer.model_copy(update={"reduced": False})
    monkeypatch.setattr(plan, "INT8_DYNAMIC", plan.replace(plan.INT8_DYNAMIC, layer=layer))
    text = TokenRows("random", np.random.default_rng(5).integers(0, shared_bundle.config.vocab_size, (4, 60)))
    settings = Settings(dynamic=True, smooth=False, cache="float32", gate=Gate(None))
    bundle, _ = quantize_bundle(shared_bundle, tmp_path / "b", text, settings, None, text)
    verify._check_sums(bundle)  # the control: the manifest does not say it
    quantization = bundle.manifest.quantization
    assert quantization is not None
    claimed = {
        path: scheme.model_copy(update={"reduced": scheme.dynamic}) for path, scheme in quantization.schemes.items()
    }
    manifest = bundle.manifest.model_copy(update={"quantization": quantization.model_copy(update={"schemes": claimed})})
    with pytest.raises(SlmError, match="can saturate on CPUs without VNNI, although the manifest excludes it"):
        verify_bundle(seal(bundle.path, manifest), shared_checkpoint, Silent())


def altered(bundle: Bundle, out: Path, change: Callable[[ir.Model], None]) -> Bundle:
    """Returns a copy of the bundle that was sealed again after a change of its graph."""
    shutil.copytree(bundle.path, out)
    model = ir.load(out / bundle.manifest.model)
    for value in model.graph.initializers.values():  # read the data before the file is overwritten
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)  # type: ignore[union-attr]
    change(model)
    ir.save(model, out / bundle.manifest.model, external_data=f"{Path(bundle.manifest.model).name}_data")
    return Bundle.open(
        seal(out, bundle.manifest).path, trust=True
    )  # opens a changed graph, so that verify must find the change


def one_weight(model: ir.Model) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    value = model.graph.initializers.get(f"{name}_quantized") or model.graph.initializers[name]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array.flat[7] += 3 if array.dtype in (np.uint8, np.int8) else array.dtype.type(0.01)
    value.const_value = ir.tensor(array, name=value.name)


def window(model: ir.Model, graphs: tuple[str, ...] = ("slm", "then", "else")) -> None:
    """Shortens the window in some graphs: 8-bit caches have attention in two subgraphs."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if "local_window_size" in node.attributes and node.graph is not None and node.graph.name in graphs:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 15)
        for value in node.inputs:  # the portable graph stores the window as a constant
            if node.op_type == "Less" and value is not None and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() - 1, name=value.name)


def rope_base(model: ir.Model) -> None:
    for kind in (SLIDING, FULL):
        for table in ("cos", "sin", "inv_freq"):
            value = model.graph.initializers.get(f"positions.{kind}_{table}")
            if value is not None and value.const_value is not None:
                array = value.const_value.numpy()
                value.const_value = ir.tensor(np.roll(array, 1, axis=-1), name=value.name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [one_weight, window, rope_base], ids=lambda change: change.__name__)
def test_a_bundle_wrong_in_one_place_fails(
    bundles: dict[str, Bundle],
    shared_checkpoint: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[ir.Model], None],
) -> None:
    bundle = altered(bundles[kind], tmp_path / "altered", change)
    with pytest.raises(SlmError, match="the bundle does not match the checkpoint") as caught:
        verify_bundle(bundle, shared_checkpoint, Silent())
    assert ("down_proj" in caught.value.message) == (change is one_weight)


@pytest.mark.parametrize("branch", ["then", "else"])
def test_a_wrong_window_in_one_of_two_subgraphs_fails(
    bundles: dict[str, Bundle], shared_checkpoint: Path, tmp_path: Path, branch: str
) -> None:
    """Verification reads tokens in long and in short steps."""
    bundle = altered(bundles["int8 caches"], tmp_path / "altered", lambda model: window(model, (branch,)))
    with pytest.raises(SlmError, match="the bundle does not match the checkpoint"):
        verify_bundle(bundle, shared_checkpoint, Silent())


def test_another_configuration_is_named(shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_checkpoint, tmp_path / "other")
    fields = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-5}))
    with pytest.raises(SlmError, match="rms_norm_eps"):
        verify_bundle(shared_bundle, tmp_path / "other", Silent())


def test_the_command(
    slm: Callable[..., Any], bundles: dict[str, Bundle], shared_checkpoint: Path, tmp_path: Path
) -> None:
    result = slm("verify", bundles["int8"].path, "--against", shared_checkpoint, "--json")
    assert result.code == 0
    figures = json.loads(result.out)
    assert figures["weights"] == 42 and figures["parity"]["cpu"]["tokens"] == 48
    result = slm("verify", bundles["portable"].path)  # the checkpoint still exists
    assert result.code == 0 and "(the checkpoint that the bundle was exported from)" in result.err
    wrong = altered(bundles["int8"], tmp_path / "wrong", rope_base)
    result = slm("verify", wrong.path, "--against", shared_checkpoint)
    assert result.code == 1 and "does not match the checkpoint" in result.err and "Traceback" not in result.err
    result = slm("verify", bundles["float32"].path, "--against", tmp_path / "nowhere")
    assert result.code == 1 and len(result.err.splitlines()) <= 3
