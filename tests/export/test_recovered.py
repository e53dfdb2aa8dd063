"""Bundles as checkpoints: the weights that a bundle computes with, under a checkpoint's names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.core.checkpoint import read_info
from slm.core.config import ModelConfig
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.core.weights import Weights
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import checkpoint_tensors, float_tensors
from slm.export.recovered import BundleModel
from slm.interchange.importing import import_model
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows

IDS = np.arange(3, 43) * 7 % 320
# One unit in the last place of 1 + w, through four layers. Measured: 2e-6; 5e-2 if q and k of a layer change places.
ROUNDING = 3e-5


@torch.no_grad()
def logits_of(checkpoint: Path) -> np.ndarray:
    return load_checkpoint(checkpoint)(torch.from_numpy(IDS)[None])[0].numpy()


@pytest.mark.parametrize(
    "options",
    [ExportOptions(), ExportOptions(target="portable"), ExportOptions(adapter_slots=True)],
    ids=["fused", "portable", "slots"],
)
def test_a_float_bundle_gives_its_checkpoint_back(options: ExportOptions, shared_checkpoint: Path) -> None:
    bundle = export_bundle(shared_checkpoint, Path("onnx"), options)
    model = BundleModel(bundle.path)
    done = import_model(model, Path("back"))
    assert (done.kind, done.dtype, done.stored_as, model.notes) == ("bundle", "float32", {"float32": 42}, [])
    np.testing.assert_allclose(logits_of(Path("back")), logits_of(shared_checkpoint), atol=ROUNDING)
    info = read_info(Path("back"))
    assert info["made_by"] == "slm import" and info["imported"]["kind"] == "bundle"


@pytest.mark.parametrize("settings", [{}, {"precision": "int4"}, {"dynamic": True}, {"head": "halves"}], ids=str)
def test_a_quantized_bundle_gives_its_rounded_weights(shared_bundle: Bundle, settings: dict[str, Any]) -> None:
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    bundle, _ = quantize_bundle(shared_bundle, Path("made"), text, Settings(gate=Gate(None), **settings), None, text)
    assert bundle.manifest.quantization is not None
    model = BundleModel(bundle.path)
    done = import_model(model, Path("back"))
    rounded, found, exact = (
        float_tensors(bundle.model_path, bundle.manifest.quantization.schemes),
        checkpoint_tensors(Weights(Path("back")), bundle.config),
        float_tensors(shared_bundle.model_path, {}),
    )
    assert rounded.keys() == found.keys()
    for name in rounded:
        np.testing.assert_allclose(found[name], rounded[name], atol=1e-6)
    assert any(np.abs(found[name] - exact[name]).max() > 1e-4 for name in exact)
    bits = "int4" if settings.get("precision") else "int8"
    assert done.stored_as[bits] >= 16 and done.stored_as["float32"] == 25
    assert model.notes == [f"the weights are the rounded ones of the {bits.upper()} bundle"]


@torch.no_grad()
def test_a_head_of_its_own(config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> None:
    untied = config.model_copy(update={"tie_word_embeddings": False})
    save_checkpoint(Path("c"), make_model(untied), tokenizer, {})
    import_model(BundleModel(export_bundle(Path("c"), Path("onnx")).path), Path("back"))
    np.testing.assert_allclose(logits_of(Path("back")), logits_of(Path("c")), atol=ROUNDING)


def test_the_command(slm: Callable[..., Any], shared_bundle: Bundle) -> None:
    result = slm("import", shared_bundle.path, "--out", "back", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["kind"] == "bundle"
    assert read_info(Path("back"))["imported"]["source"] == str(shared_bundle.path)


def test_a_bundle_that_was_changed_is_rejected(slm: Callable[..., Any], shared_bundle: Bundle) -> None:
    shutil.copytree(shared_bundle.path, "damaged")
    data = Path("damaged/onnx/model.onnx_data")
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    result = slm("import", "damaged", "--out", "back")
    assert result.code == 1 and "Traceback" not in result.err and not Path("back").exists()
