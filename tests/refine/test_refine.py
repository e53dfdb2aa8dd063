"""Refinement of INT4 bundles by distillation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.core.checkpoint import read_config
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Progress, Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import graph_tensors
from slm.export.verify import verify_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.plan import QuantizationPlan
from slm.quantize.quality import kl_sum
from slm.quantize.quantizer import Quantizer
from slm.quantize.refinement import HELD_BACK_TOKENS, Refinement, Train
from slm.quantize.results import Report
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.refine import training
from slm.refine.student import NORM_RANGE, Student
from slm.refine.training import refine
from slm.runtime.decoder import OnnxDecoder
from slm.steps import quantizing
from tests.conftest import Result
from tests.progress import Notes

# The same integers and scales in PyTorch and in onnxruntime, which sum in different orders; see tests/quantize/test_trained.py.
SAME_KL = 1e-4
TOKENS = 12288


def random_text(bundle: Bundle, seed: int, rows: int) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (rows, 60)))


def make(
    source: Bundle,
    out: Path,
    train: Train = refine,
    notes: Progress | None = None,
    tokens: int = TOKENS,
    **settings: Any,
) -> tuple[Bundle, Report]:
    """Returns a refined bundle, rounded to the nearest before, so that there is much to gain."""
    chosen: dict[str, Any] = {"prefer": "size", "head_bits": 8, "method": "nearest", "smooth": True, "gate": Gate(None)}
    return quantize_bundle(
        source,
        out,
        random_text(source, 5, 4),
        Settings("int4", refine=True, **chosen | settings),
        notes,
        random_text(source, 6, 8),
        refinement=Refinement.on(random_text(source, 7, 240), train, tokens),
    )


@pytest.fixture(scope="module")
def trained(
    shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Report, list[str], Student]:
    """A refined bundle, its report, the notes, and the trained student."""
    notes, students = Notes(), []

    class Kept(Student):
        def __init__(self, quantizer: Quantizer, plan: QuantizationPlan) -> None:
            super().__init__(quantizer, plan)
            students.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Student", Kept)
        patch.setattr(training, "UPDATE_TOKENS", 240)
        bundle, report = make(shared_bundle, tmp_path_factory.mktemp("refined") / "onnx", notes=notes)
    return bundle, report, notes.lines, students[0]


@pytest.fixture(scope="module")
def plain(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle without refinement."""
    return make(shared_bundle, tmp_path_factory.mktemp("plain") / "onnx", lambda quantizer, plan, text, tokens: plan)[0]


def data(bundle: Bundle) -> bytes:
    return bundle.model_path.with_name(f"{bundle.model_path.name}_data").read_bytes()


def keep_whatever(patch: pytest.MonkeyPatch) -> None:
    """Makes the second measurement better than the first."""
    measured = iter([0.2, 0.1])
    patch.setattr(Quantizer, "kl_nats", lambda *_: next(measured))


def test_refinement_reduces_the_divergence_on_held_back_text(
    trained: tuple[Bundle, Report, list[str], Student],
) -> None:
    bundle, report, notes, _ = trained
    found = report.settings["refinement"]
    assert found["kept"] and found["kl_after"] < 0.9 * found["kl_before"]
    assert found["tokens"] == TOKENS and found["held_back"] == 34 * 60 <= HELD_BACK_TOKENS
    assert any(note.startswith("refinement: KL divergence ") and "kept" not in note for note in notes)
    assert report.settings["refine"] is True
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization.refined


def test_the_bundle_predicts_what_the_student_predicts(trained: tuple[Bundle, Report, list[str], Student]) -> None:
    bundle, _, _, student = trained
    student.model.eval()
    rows = random_text(bundle, 11, 4).rows

    @torch.no_grad()
    def divergence() -> float:
        decoder, total = OnnxDecoder(bundle), 0.0
        for row in rows:
            decoder.reset()
            logits = student.hidden(torch.from_numpy(row[None]))[0] @ student.head.T
            total += kl_sum(logits.numpy(), decoder.step(row[None], keep=0)[0])
        return total / rows.size

    assert divergence() < SAME_KL
    norm = student.norms[0].data
    before = norm.clone()
    norm.add_(torch.randn(norm.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    try:
        assert divergence() > 3 * SAME_KL  # another norm
    finally:
        norm.copy_(before)


def test_training_moves_scales_and_norms_and_nothing_else(
    trained: tuple[Bundle, Report, list[str], Student], plain: Bundle
) -> None:
    before, after = (graph_tensors(bundle.model_path) for bundle in (plain, trained[0]))
    assert before.keys() == after.keys()
    moved = {name.rpartition(".")[2] for name in before if not np.array_equal(before[name], after[name])}
    norms = [name for name in before if name.endswith("norm.weight")]
    assert moved == {"weight_scale", "weight"}
    for name in norms:
        change = after[name] / before[name] - 1
        assert 1e-4 < np.abs(change).max() < NORM_RANGE * 1.0001
    table = "model.embed_tokens.weight_scale"
    np.testing.assert_array_equal(before[table], after[table])


def test_verify_knows_that_norms_moved(
    trained: tuple[Bundle, Report, list[str], Student], shared_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(Path(shutil.copytree(trained[0].path, tmp_path / "onnx")))
    verify_bundle(bundle, shared_checkpoint, Silent(), "cpu")
    quantization = bundle.manifest.quantization
    assert quantization is not None and quantization.errors["model.norm"] > 0
    for change in (
        {"errors": quantization.errors | {"model.norm": quantization.errors["model.norm"] * 1.001}},
        {"refined": False},
    ):
        manifest = bundle.manifest.model_copy(update={"quantization": quantization.model_copy(update=change)})
        with pytest.raises(SlmError, match=r"norm\.weight differs"):
            verify_bundle(Bundle(bundle.path, manifest, bundle.config), shared_checkpoint, Silent(), "cpu")


@pytest.mark.parametrize("factor", [1.3, float("nan")])
def test_a_training_that_makes_the_model_worse_is_dropped(
    shared_bundle: Bundle, plain: Bundle, tmp_path: Path, factor: float
) -> None:
    def worse(quantizer: Quantizer, plan: QuantizationPlan, text: TokenRows, tokens: int) -> QuantizationPlan:
        name = "model.norm.weight"
        return replace(plan, norms={name: quantizer.weights[name] * np.float32(factor)})

    notes = Notes()
    bundle, report = make(shared_bundle, tmp_path / "onnx", worse, notes)
    found = report.settings["refinement"]
    assert not found["kept"] and not found["kl_after"] < found["kl_before"]
    assert any(note.endswith("; the weights before are kept") for note in notes.lines)
    assert bundle.manifest.quantization is not None and not bundle.manifest.quantization.refined
    assert data(bundle) == data(plain)


def test_the_same_seed_gives_the_same_bytes(
    shared_bundle: Bundle, plain: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in "ab":
        keep_whatever(monkeypatch)
        made.append(data(make(shared_bundle, tmp_path / name, tokens=1024)[0]))
    assert made[0] == made[1] != data(plain)


def test_an_interrupted_refinement_leaves_nothing(shared_bundle: Bundle, tmp_path: Path) -> None:
    class Interrupting(Silent):
        refining = False

        def start(self, name: str, total: int | None, unit: str) -> None:
            self.refining = name == "refine"

        def advance(self, amount: int = 1, **fields: str) -> None:
            if self.refining:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(shared_bundle, tmp_path / "onnx", notes=Interrupting())
    assert not list(tmp_path.iterdir())


def test_held_back_rows_are_read_by_no_other_step(shared_bundle: Bundle) -> None:
    text = random_text(shared_bundle, 7, 12)
    refinement = Refinement.on(text, refine, TOKENS)
    assert len(refinement.held_back.rows) == 3 and len(refinement.text.rows) == 9
    np.testing.assert_array_equal(np.concatenate([refinement.text.rows, refinement.held_back.rows]), text.rows)
    np.testing.assert_array_equal(refinement.unread(text).rows, refinement.text.rows)
    other = random_text(shared_bundle, 8, 4)
    np.testing.assert_array_equal(refinement.unread(other).rows, other.rows)
    with pytest.raises(SlmError, match="random has too little text for --refine"):
        Refinement.on(text.first(1, 60), refine, TOKENS)


def test_products_on_a_grid_keep_their_scales(shared_bundle: Bundle, tmp_path: Path) -> None:
    """Of a plan with products in 4 and in 8 bits, all are trained but the exact ones."""
    exact, eight, four = (
        f"model.layers.1.{name}" for name in ("mlp.down_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    )
    seen: list[QuantizationPlan] = []

    def train(quantizer: Quantizer, plan: QuantizationPlan, text: TokenRows, tokens: int) -> QuantizationPlan:
        schemes = {**plan.schemes, eight: Scheme(bits=8, block_size=64)}
        mixed = replace(plan.with_schemes(schemes), exact=frozenset({exact}))
        seen.extend([mixed, refine(quantizer, mixed, text, tokens)])
        return plan

    make(shared_bundle, tmp_path / "onnx", train, tokens=512)
    assert seen[1].schemes == seen[0].schemes
    assert {four, eight} <= seen[1].rounded.keys() and exact not in seen[1].rounded


@pytest.mark.parametrize("kind", ["four-bit table", "untied", "halves", "portable", "cuda"])
def test_every_kind_of_bundle_is_refined_and_verified(
    make_model: Callable[[ModelConfig], CausalLM],
    shared_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    checkpoint, settings = (
        shared_checkpoint,
        {"four-bit table": {"head_bits": 4}, "halves": {"head": "halves"}}.get(kind, {}),
    )
    if kind == "untied":
        config = read_config(shared_checkpoint).model_copy(update={"tie_word_embeddings": False})
        checkpoint = tmp_path / "checkpoint"
        save_checkpoint(checkpoint, make_model(config), Tokenizer.load(shared_checkpoint), {})
    options = ExportOptions(
        target="portable" if kind == "portable" else "fused", device="cuda" if kind == "cuda" else "cpu"
    )
    source = export_bundle(checkpoint, tmp_path / "float", options)
    keep_whatever(monkeypatch)
    bundle, report = make(source, tmp_path / "onnx", tokens=512, **{"smooth": kind != "cuda"} | settings)
    assert report.settings["refinement"]["kept"] and len(report.tensors) < len(bundle.manifest.quantization.errors)
    verify_bundle(bundle, checkpoint, Silent(), "cpu")


def test_the_command(
    slm: Callable[..., Result], shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(shared_bundle.path, tmp_path / "onnx")
    options = ("quantize", "--int4", "--prefer", "size", bundle, "--tokens", 512, "--calibration-tokens", 512, "--json")
    done = slm(*options, "--refine", "--refine-tokens", 1024)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["settings"]["refine"] is True and report["settings"]["refinement"]["tokens"] == 1024
    for wrong, message in (
        (("--int8", "--refine"), "--refine requires --int4"),
        (("--sweep", "--refine"), "--sweep tries all settings"),
        (("--int4", "--refine-tokens", 512), "--refine-tokens requires --refine"),
    ):
        refused = slm("quantize", *wrong, bundle)
        assert refused.code == 1 and message in refused.err
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    refused = slm("quantize", "--int4", "--refine", bundle, "--out", tmp_path / "other")
    assert refused.code == 1 and "--refine needs PyTorch" in refused.err and "pip install" in refused.err
    assert not (tmp_path / "other").exists()
