"""Quantized bundles for WebGPU in Chromium with a GPU that is a program (SwiftShader), in float32: it has no float16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import slm
from slm.core import manifest as manifest_module
from slm.core.manifest import seal
from slm.export import bundle as bundle_module
from slm.export.graph.formats import FloatFormat
from slm.export.graph.fused import Fused
from slm.quantize import decide
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from tests.peers.pages import Tab, served, site_of

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_bundle_for_webgpu(
    open_tab: Callable[..., Tab],
    bundles: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Any,
    precision: Literal["int8", "int4"],
) -> None:
    """Past the window too. Products take weights in blocks of 8 or 4 bits, the table in blocks of 8 bits, on the GPU."""
    begin = Fused.__init__

    def in_float32(self: Fused, weights: Any, device: Any = "cpu", cache: Any = "float32") -> None:
        begin(self, weights, device, "float32")
        self.dtype = ir.DataType.FLOAT

    monkeypatch.setattr(Fused, "__init__", in_float32)
    monkeypatch.setattr(bundle_module, "_operators", lambda *_: Fused(FloatFormat(), "webgpu"))
    monkeypatch.setattr(decide, "on_device", lambda schemes, _: schemes)
    monkeypatch.setattr(bundle_module, "prove", lambda *_: None)
    monkeypatch.setattr(manifest_module, "_check_graph", lambda *_: None)  # slm writes no such graph
    exported = bundle_module.export_bundle(
        bundles.home / "checkpoint", tmp_path / "webgpu", bundle_module.ExportOptions(device="webgpu")
    )
    seal(exported.path, exported.manifest.model_copy(update={"precision": "float32"}))
    text = TokenRows("random", np.random.default_rng(0).choice(np.arange(32, 127), (4, 60)))
    settings = Settings(gate=Gate(None), precision=precision)
    made = quantize_bundle(exported, tmp_path / precision, text, settings, None, text)[0]
    graph = onnx.load(made.model_path, load_external_data=False).graph
    [table] = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert {each.name: each.i for each in table.attribute if each.name == "bits"} == {"bits": 8}
    with served(site_of(made.path)) as server:
        tab = open_tab(server.url, browser=gpu).ready().set(greedy=True, new_tokens=40)
        assert tab.found["device"] == "WebGPU"
        model = slm.load(made.path)
        for prompt in ("Once", "Once upon a time there was a dog and it was"):
            assert tab.text(prompt) == model.generate(prompt, max_new_tokens=40, temperature=0)


def test_a_gpu_without_float16(
    open_tab: Callable[..., Tab],
    bundles: Any,
    tmp_path: Path,
    gpu: Any,
) -> None:
    """INT4 as `slm quantize` writes it for WebGPU computes in float16: the page runs it on the processor, and says why."""
    exported = bundle_module.export_bundle(
        bundles.home / "checkpoint", tmp_path / "webgpu", bundle_module.ExportOptions(device="webgpu")
    )
    text = TokenRows("random", np.random.default_rng(0).choice(np.arange(32, 127), (4, 60)))
    made = quantize_bundle(exported, tmp_path / "int4", text, Settings(gate=Gate(None), precision="int4"), None, text)[
        0
    ]
    with served(site_of(made.path)) as server:
        tab = open_tab(server.url, browser=gpu).ready().set(greedy=True, new_tokens=20)
        assert (tab.found["device"], tab.found["precision"]) == ("WebAssembly", "int4")
        assert "slower than on a GPU: the GPU has no float16" in str(tab.page.text_content("#where"))
        assert tab.text("Once upon a time") != ""
