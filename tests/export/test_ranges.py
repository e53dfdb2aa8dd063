"""Models whose activations overflow float16: products that stay in float32, rejected models, and negative controls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.ranges import LARGEST_FLOAT16, MARGIN, scan_ranges
from slm.runtime.decoder import OnnxDecoder

MakeModel = Callable[..., CausalLM]


def loud(model: CausalLM, layer: int, product: str, factor: float) -> CausalLM:
    """Returns the model with one much larger projection. The norm after its block hides the change from other layers."""
    with torch.no_grad():
        model.get_submodule(f"model.layers.{layer}.{product}").weight.mul_(factor)
    return model


@pytest.fixture
def saved(config: ModelConfig, make_model: MakeModel, tokenizer: Tokenizer) -> Callable[[str, float], Path]:
    """Saves a checkpoint with one projection multiplied by a factor."""

    def save(product: str, factor: float) -> Path:
        path = Path(f"checkpoint-{product}")
        save_checkpoint(path, loud(make_model(config), 1, product, factor), tokenizer, {})
        return path

    return save


def test_what_fits_is_float16(shared_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(device="cuda"))
    ranges = bundle.manifest.ranges
    assert ranges is not None and ranges.float32 == ()
    assert len(ranges.largest) == 4 * bundle.config.num_hidden_layers + 1
    assert 0 < max(ranges.largest.values()) * MARGIN < LARGEST_FLOAT16
    assert bundle.manifest.precision == "float16" and bundle.model_path.name == "model_fp16.onnx"
    assert {layer.dtype for layer in bundle.manifest.cache} == {"float16"}
    assert {layer.slack for layer in bundle.manifest.cache} == {0}


@pytest.mark.parametrize(
    ("product", "kept"),
    [
        ("mlp.down_proj", {"model.layers.1.mlp.down_proj"}),
        ("self_attn.o_proj", {"model.layers.1.self_attn.o_proj"}),
        # The output of one product is the input of the next.
        ("mlp.up_proj", {"model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj"}),
        ("self_attn.q_proj", {"model.layers.1.self_attn.qkv_proj"}),
    ],
)
def test_what_would_overflow_stays_float32(
    saved: Callable[[str, float], Path], monkeypatch: pytest.MonkeyPatch, product: str, kept: set[str]
) -> None:
    checkpoint = saved(product, 3e5)
    bundle = export_bundle(checkpoint, Path("b"), ExportOptions(device="cuda"))  # export verifies it against PyTorch
    assert bundle.manifest.ranges is not None and set(bundle.manifest.ranges.float32) == kept
    assert bundle.manifest.parity is not None and bundle.manifest.parity.largest < 0.05

    def careless(*args: object) -> object:
        return scan_ranges(*args).model_copy(update={"float32": ()})  # type: ignore[arg-type]

    monkeypatch.setattr("slm.export.ranges.scan_ranges", careless)
    with pytest.raises(SlmError, match=r"differ by (inf|nan)|beyond float16"):
        export_bundle(checkpoint, Path("c"), ExportOptions(device="cuda"))


def test_caches_that_would_overflow_are_refused(saved: Callable[[str, float], Path]) -> None:
    checkpoint = saved("self_attn.v_proj", 3e5)
    with pytest.raises(SlmError, match="attention values reach"):
        export_bundle(checkpoint, Path("b"), ExportOptions(device="cuda"))
    assert not Path("b").exists()


def test_the_text_decides(shared_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Something else entirely, 1234567890! " * 40, encoding="utf-8")
    ours = export_bundle(shared_checkpoint, tmp_path / "a", ExportOptions(device="cuda")).manifest.ranges
    theirs = export_bundle(
        shared_checkpoint, tmp_path / "b", ExportOptions(device="cuda", text=tmp_path / "text.txt")
    ).manifest.ranges
    assert ours is not None and theirs is not None
    assert theirs.text.endswith("text.txt") and theirs.largest != ours.largest
    (tmp_path / "text.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SlmError, match="too little text"):
        export_bundle(shared_checkpoint, tmp_path / "c", ExportOptions(device="cuda", text=tmp_path / "text.txt"))


def test_webgpu_keeps_whole_caches(shared_checkpoint: Path, tmp_path: Path) -> None:
    bundle: Bundle = export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(device="webgpu"))
    assert {layer.window for layer in bundle.manifest.cache} == {None}
    decoder = OnnxDecoder(bundle)
    decoder.read(np.arange(40).tolist())
    assert all(array.shape[2] >= 40 for array in decoder.buffers._buffers.values())  # type: ignore[union-attr]


def test_the_portable_target_has_no_devices(shared_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="does not support cuda"):
        export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(target="portable", device="cuda"))
