"""Bundles of models that were trained on a grid: quantization keeps it, and says so where it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.cli.following import after_bundle
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.nn.decoder import TorchDecoder
from slm.core.nn.fake_quant import fake_quantize, round_weights
from slm.core.qat import GRIDS, QatPrecision
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import float_tensors, graph_tensors
from slm.quantize.make import quantize_bundle
from slm.quantize.quality import kl_sum
from slm.quantize.results import Report
from slm.quantize.settings import Settings
from slm.quantize.texts import TokenRows
from slm.quantize.trained import contradiction, trained_for
from slm.runtime.decoder import OnnxDecoder
from tests.progress import Notes

MakeModel = Callable[[ModelConfig], CausalLM]

# Float sums in another order flip a few roundings of activations. Measured: up to 2e-5; another grid differs by more than 2e-3.
SAME_KL = 1e-4
# Rounding a rounded weight again finds its scale from rounded values. Measured: 1e-7; another grid moves weights by 5e-3.
SAME_WEIGHTS = 1e-6


def bundle_of(model: CausalLM, precision: QatPrecision, at: Path, tokenizer: Tokenizer) -> Bundle:
    """Returns the float32 bundle of a model that is recorded as trained for a precision."""
    save_checkpoint(at / "checkpoint", model, tokenizer, {"qat": GRIDS[precision].model_dump(mode="json")})
    return export_bundle(at / "checkpoint", at / "onnx")


@pytest.fixture(scope="module")
def bundles(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A float32 bundle with rounded weights for each precision, and one whose weights were not rounded; not to be changed."""
    made = {}
    for name in ("int8", "int4", "moved"):
        precision: QatPrecision = "int8" if name == "int8" else "int4"
        model = load_checkpoint(shared_checkpoint)
        if name != "moved":
            round_weights(model, GRIDS[precision])
        made[name] = bundle_of(model, precision, tmp_path_factory.mktemp(name), Tokenizer.load(shared_checkpoint))
    return made


def text_of(bundle: Bundle, seed: int = 5) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (4, 60)))


def make(source: Bundle, **settings: Any) -> tuple[Bundle, Report, list[str]]:
    notes = Notes()
    made, report = quantize_bundle(
        source, Path("made"), text_of(source), Settings(**settings), notes, text_of(source, 6)
    )
    return made, report, notes.lines


def divergence(model: CausalLM, bundle: Bundle) -> float:
    """Returns the KL divergence of a bundle's predictions from those of a PyTorch model, in nats a token."""
    ours, theirs, rows = OnnxDecoder(bundle), TorchDecoder(model), text_of(bundle).rows
    total = 0.0
    for row in rows:
        ours.reset()
        total += kl_sum(theirs.logits(row[None])[0], ours.step(row[None], keep=0)[0])
    return total / rows.size


@pytest.mark.parametrize("precision", GRIDS)
def test_the_bundle_predicts_what_the_trained_model_predicted(
    bundles: dict[str, Bundle], shared_checkpoint: Path, precision: QatPrecision
) -> None:
    made, report, notes = make(bundles[precision], precision=precision)
    # The model as training saw it: the weights before rounding, with fake quantization.
    assert divergence(fake_quantize(load_checkpoint(shared_checkpoint), GRIDS[precision]), made) < SAME_KL
    assert max(each.error for each in report.tensors) < SAME_WEIGHTS
    assert any(
        note.startswith(f"the model was trained for {precision.upper()}: its weights keep that grid") for note in notes
    )
    assert report.settings["trained_for"] == precision and report.settings["smoothing"] is None
    quantization = made.manifest.quantization
    assert quantization is not None and quantization.method == "nearest" and quantization.smoothing is None
    assert {scheme.bits for path, scheme in quantization.schemes.items() if ".layers." in path} == {
        GRIDS[precision].layers.bits
    }


def test_another_grid_or_unrounded_weights_predict_something_else(
    bundles: dict[str, Bundle], shared_checkpoint: Path
) -> None:
    """The controls of the test above."""
    trained = fake_quantize(load_checkpoint(shared_checkpoint), GRIDS["int4"])
    other, _, _ = make(bundles["int4"], precision="int4", block_size=16, method="nearest", smooth=False, prefer="size")
    assert divergence(fake_quantize(load_checkpoint(shared_checkpoint), GRIDS["int8"]), other) > 10 * SAME_KL
    unrounded, _, _ = make(bundles["moved"], precision="int4")
    assert divergence(trained, unrounded) > 10 * SAME_KL
    eight, _, _ = make(bundles["moved"], precision="int8")
    assert divergence(trained, eight) > 10 * SAME_KL


def test_weights_that_left_the_grid_are_noticed(bundles: dict[str, Bundle]) -> None:
    _, report, notes = make(bundles["moved"], precision="int4")
    assert any(
        "17 of 17 weights are not on that grid (model.embed_tokens); the record is ignored" in note for note in notes
    )
    assert "trained_for" not in report.settings and report.settings["method"] == "gptq"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int8"}, "--int8"),
        ({"dynamic": True}, "--int8-dynamic"),
        ({"precision": "int4", "method": "searched"}, "--method searched"),
        ({"precision": "int4", "smooth": True}, "--smooth"),
        ({"precision": "int4", "block_size": 16}, "--block-size 16"),
        ({"precision": "int4", "prefer": "quality"}, "--prefer quality"),
        ({"precision": "int4", "prefer": "size"}, "--prefer size"),
        ({"precision": "int4", "head_bits": 4}, "--head-bits 4"),
        ({"precision": "int4", "head": "halves"}, "--head halves"),
        ({"precision": "int4", "target_bytes": 10**6}, "--target-size"),
        ({"precision": "int4", "refine": True}, "--refine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_leave_the_grid(options: dict[str, Any], named: str) -> None:
    assert contradiction(Settings(**options), GRIDS["int4"]) == named


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "nearest"},
        {"smooth": False},
        {"block_size": 32},
        {"head_bits": 8},
        {"cache": "int8"},
        {"target_kl_nats": 0.1},
    ],
    ids=str,
)
def test_options_that_keep_the_grid(options: dict[str, Any]) -> None:
    assert contradiction(Settings(precision="int4", **options), GRIDS["int4"]) is None


def test_a_contradiction_is_a_warning_and_is_obeyed(bundles: dict[str, Bundle]) -> None:
    made, report, notes = make(bundles["int4"], precision="int8")
    assert "warning: the model was trained for INT4 (--qat int4); --int8 moves its weights off that grid" in notes
    assert made.manifest.precision == "int8" and "trained_for" not in report.settings


def test_caches_in_8_bits_go_with_the_grid(bundles: dict[str, Bundle]) -> None:
    made, report, _ = make(bundles["int8"], cache="int8")
    assert report.settings["trained_for"] == "int8" and made.manifest.cache[0].dtype == "int8"
    assert max(each.error for each in report.tensors) < SAME_WEIGHTS


def test_a_portable_bundle_keeps_the_grid(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    checkpoint = bundles["int4"].path.parent / "checkpoint"
    portable = export_bundle(checkpoint, tmp_path / "portable", ExportOptions(target="portable"))
    made, report, _ = make(portable, precision="int4")
    assert report.settings["trained_for"] == "int4"
    assert max(each.error for each in report.tensors) < SAME_WEIGHTS
    schemes = made.manifest.quantization.schemes if made.manifest.quantization else {}
    before, after = graph_tensors(portable.model_path), float_tensors(made.model_path, schemes)
    assert set(schemes) <= {name.removesuffix(".weight") for name in before} and set(after) <= set(before)


def test_the_next_step_names_the_precision(bundles: dict[str, Bundle], shared_bundle: Bundle) -> None:
    assert after_bundle(bundles["int4"]).startswith("slm quantize --int4 ")
    assert after_bundle(bundles["int8"]).startswith("slm quantize --int8 ")
    assert after_bundle(shared_bundle).startswith("slm quantize --int8 ")


def test_a_damaged_record_is_an_error(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["int8"].manifest
    assert trained_for(manifest) == GRIDS["int8"]
    provenance = manifest.provenance | {"slm.json": {"qat": {"precision": "int8", "layers": {}, "vocabulary": {}}}}
    damaged = manifest.model_copy(update={"provenance": provenance})
    with pytest.raises(SlmError, match=r"slm\.json is damaged: qat"):
        trained_for(damaged)
    assert trained_for(manifest.model_copy(update={"provenance": {}})) is None
