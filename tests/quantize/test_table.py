"""A table in 4 bits: rounding against hidden states, sizes, the search, and every kind of bundle."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.config import FULL, ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme, seal
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import graph_tensors
from slm.export.verify import verify_bundle
from slm.quantize import gptq
from slm.quantize.blocks import quantize_nearest
from slm.quantize.decide import decide
from slm.quantize.gptq import quantize_gptq, quantize_table
from slm.quantize.instrumented import InstrumentedLayer, InstrumentedModel, InstrumentedNorm, embedded
from slm.quantize.linears import EMBEDDING, HEAD, Linear, linears_of
from slm.quantize.make import quantize_bundle
from slm.quantize.moments import InputMoments
from slm.quantize.plan import INT4, QuantizationPlan, bytes_of, schemes_of, with_four_bit_tables, with_frequent
from slm.quantize.quality import kl_sum
from slm.quantize.quantizer import quantizer_of
from slm.quantize.results import Report
from slm.quantize.rounding import restored
from slm.quantize.search import Budget, Candidates, Choice
from slm.quantize.settings import Gate, Settings
from slm.quantize.statistics import hidden_moments
from slm.quantize.texts import TokenRows

FOUR = Scheme(bits=4, block_size=64, zero_points=True)  # the model has 64 channels
TOKENS = 64
# float32 sums in another order.
SAME = 1e-4


@pytest.fixture(scope="module")
def text(story_rows: TokenRows) -> TokenRows:
    return story_rows


def two_layers(config: ModelConfig, tied: bool = True) -> ModelConfig:
    layers = {"num_hidden_layers": 2, "layer_types": (FULL, FULL), "tie_word_embeddings": tied}
    return config.model_copy(update=layers)


@pytest.fixture(scope="module")
def checkpoint(trained_checkpoint: Path) -> Path:
    return trained_checkpoint


@pytest.fixture(scope="module")
def source(trained_bundle: Bundle) -> Bundle:
    return trained_bundle


def settings(**options: Any) -> Settings:
    return Settings(**{"precision": "int4", "smooth": False, "cache": "float32", "gate": Gate(None)} | options)


def make(source: Bundle, out: Path, text: TokenRows, **options: Any) -> tuple[Bundle, Report]:
    return quantize_bundle(source, out, text.first(4, TOKENS), settings(**options), None, text.after(4))


def bits(bundle: Bundle, path: str = EMBEDDING) -> int:
    assert bundle.manifest.quantization is not None
    return bundle.manifest.quantization.schemes[path].bits


def test_gptq_is_better_than_searched_scales(source: Bundle, text: TokenRows, tmp_path: Path) -> None:
    """The head's divergence on held-out hidden states. The lookup by the same integers costs a little more than by its own."""
    held_out, (head, *_) = text.first(4, TOKENS), linears_of(source.config)
    weight, model = graph_tensors(source.model_path)[f"{EMBEDDING}.weight"], InstrumentedModel(source, [head])
    hidden = np.concatenate([model.products_inputs(row, [EMBEDDING])[EMBEDDING] for row in held_out.rows])
    with quantizer_of(source, settings(head_bits=4), text.after(4), held_out, Silent(), tmp_path) as quantizer:
        plan = decide(quantizer)
    fitted = restored(plan.rounded[EMBEDDING], with_frequent(plan.schemes[EMBEDDING], 0))
    searched = restored(quantize_nearest(weight, FOUR, search=True), FOUR)
    kl = [kl_sum(hidden @ weight.T, hidden @ each.T) for each in (fitted, searched)]
    assert kl[0] < 0.75 * kl[1], kl
    assert np.square(fitted - weight).sum() < 1.6 * np.square(searched - weight).sum()


@pytest.mark.parametrize("target", ["fused", "portable"])
def test_hidden_states_are_those_of_the_head(checkpoint: Path, source: Bundle, tmp_path: Path, target: Any) -> None:
    if target == "portable":
        source = export_bundle(checkpoint, tmp_path / "portable", ExportOptions(target="portable"))
    head, rows = linears_of(source.config)[0], np.random.default_rng(1).integers(0, 320, (2, 20))
    model = InstrumentedModel(source, [head])
    wanted = np.concatenate([model.products_inputs(row, [EMBEDDING])[EMBEDDING] for row in rows])
    streams = embedded(source, rows)
    for i in range(source.config.num_hidden_layers):
        layer = InstrumentedLayer(source, [linear for linear in linears_of(source.config) if linear.layer == i], i)
        before, streams = streams, [layer.after(row, stream, {}) for row, stream in zip(rows, streams, strict=True)]
    norm = InstrumentedNorm(source)
    found = np.concatenate([norm(stream) for stream in streams])
    np.testing.assert_allclose(found, wanted, atol=SAME * np.abs(wanted).max())
    moments = wanted.T.astype(np.float64) @ wanted
    np.testing.assert_allclose(hidden_moments(norm, head, streams), moments, atol=SAME * np.abs(moments).max())
    if target == "fused":  # negative control: without the last layer
        assert np.abs(np.concatenate([norm(stream) for stream in before]) - wanted).max() > 0.01


def table_and_moments() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(300, 64))
    return rng.normal(size=(100, 64)).astype(np.float32), (hidden.T @ hidden).astype(np.float32)


def test_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = table_and_moments()
    whole = quantize_gptq(weight, InputMoments.of(moments), FOUR)
    monkeypatch.setattr(gptq, "_TABLE_ROWS", 7)
    for name, array in quantize_table(weight, moments, FOUR, lookup=False).items():
        np.testing.assert_array_equal(array, whole[name])


def test_a_lookup_has_less_error_of_its_own() -> None:
    """The error of rows falls and the error of logits rises, each by no more than expected of a compromise."""
    weight, moments = table_and_moments()
    before = moments.copy()
    errors = []
    for lookup in (False, True):
        off = restored(quantize_table(weight, moments, FOUR, lookup), FOUR) - weight
        errors.append((float(np.square(off).sum()), float(np.einsum("nk,kl,nl->", off, moments, off))))
    assert errors[1][0] < 0.9 * errors[0][0] and errors[0][1] < errors[1][1]
    np.testing.assert_array_equal(moments, before)  # the caller's array does not change


def test_sizes_and_one_table(source: Bundle, text: TokenRows, tmp_path: Path) -> None:
    eight, at_8 = make(source, tmp_path / "8", text, head_bits=8, prefer="size")
    four, report = make(source, tmp_path / "4", text, head_bits=4, prefer="quality")
    config = source.config
    assert four.manifest.quantization is not None
    scheme = four.manifest.quantization.schemes[EMBEDDING]
    assert with_frequent(scheme, 0) == FOUR and 0 < scheme.frequent <= config.vocab_size // 4
    frequent = scheme.frequent * (config.hidden_size + 4 + 8)  # integers, a scale, and the id
    assert report.parts["embedding and head"] == FOUR.bytes(config.vocab_size, config.hidden_size) + frequent
    assert report.parts["embedding and head"] < 0.8 * at_8.parts["embedding and head"]
    assert bits(eight) == 8 and bits(four) == 4
    graph = ir.load(four.model_path).graph
    tables = {name for name, value in graph.initializers.items() if value.shape and config.vocab_size in value.shape}
    assert tables == {f"{EMBEDDING}.weight_{part}" for part in ("quantized", "scale", "zero_points")}
    scale = graph.initializers[f"{EMBEDDING}.weight_scale"]
    users = [node for node, _ in scale.uses()]
    assert {node.op_type for node in users} == {"GatherBlockQuantized", "MatMulNBits"}  # the lookup and the head
    assert {node.attributes["bits"].value for node in users} == {4}


def test_defaults(source: Bundle) -> None:
    """Eight bits without a target, also with --prefer quality; four bits for the smallest size."""
    assert settings().tables == settings(prefer="quality").tables == "eight"
    assert settings(prefer="size").tables == "four"
    assert settings(target_bytes=1).tables == settings(target_kl_nats=0.1).tables == "search"
    for bits, tables in ((4, "four"), (8, "eight")):
        assert settings(head_bits=bits, target_bytes=1, prefer="size").tables == tables
    assert replace(settings(prefer="size"), precision="int8").tables == "eight"


def test_the_search_uses_the_table(source: Bundle, text: TokenRows, tmp_path: Path) -> None:
    def chosen(**options: Any) -> int:
        with quantizer_of(source, settings(**options), text.after(4), text, Silent(), tmp_path) as quantizer:
            plan = decide(quantizer)
            assert plan.sensitivity[EMBEDDING] > 0
            return plan.schemes[EMBEDDING].bits

    searched = {"method": "searched"}  # quick
    assert chosen(target_bytes=1 << 30, **searched) == 8
    assert chosen(target_bytes=1 << 30, head_bits=4, **searched) == 4
    assert chosen(target_kl_nats=10.0, **searched) == 4
    assert chosen(target_kl_nats=1e-6, **searched) == 8


def test_a_target_size_that_eight_bits_exceed(source: Bundle, text: TokenRows, tmp_path: Path) -> None:
    """A size below that of layers in 4 bits and a table in 8 bits is possible, and a smaller one is rejected."""
    linears = linears_of(source.config)
    with quantizer_of(source, settings(), text, text, Silent(), tmp_path) as quantizer:
        eight = quantizer.bytes(QuantizationPlan(schemes_of(linears, INT4), "gptq"))
    with pytest.raises(SlmError, match="the weights take at least"):
        make(source, tmp_path / "none", text, target_bytes=eight - 3000, head_bits=8, block_size=32)
    with pytest.raises(SlmError, match="the weights take at least"):
        make(source, tmp_path / "none", text, target_bytes=20_000)
    assert not (tmp_path / "none").exists()
    made, report = make(source, tmp_path / "made", text, target_bytes=eight - 3000, block_size=32)
    assert bits(made) == 4 and report.bytes_after <= eight - 3000
    assert report.tensors[0].path == EMBEDDING and report.tensors[0].harm_nats is not None


def test_both_schemes_of_a_table_are_tried() -> None:
    """A table can have the largest sensitivity per byte and not fit, or the least and be the only one that reaches a limit."""
    linears = [Linear("table", "head", 3000, 128), *[Linear(f"l{i}", "layer", 200, 128, i) for i in range(4)]]
    low = schemes_of(linears, with_four_bit_tables(INT4))
    high = {linear.path: Scheme(bits=8, block_size=64) for linear in linears}
    base, table = bytes_of(linears, low), bytes_of(linears[:1], high) - bytes_of(linears[:1], low)
    layers = bytes_of(linears[1:], high) - bytes_of(linears[1:], low)

    def chosen(harm: float, budget: Budget) -> set[str]:
        harms = {"table": harm} | {f"l{i}": 0.01 for i in range(4)}
        choices = {path: (Choice(low[path], each), Choice(high[path], 0.0)) for path, each in harms.items()}
        schemes = Candidates(linears, low, choices).choose(budget)
        return {path for path in schemes if schemes[path].bits == 8}

    everything, only_layers = {linear.path for linear in linears}, {f"l{i}" for i in range(4)}
    assert chosen(0.3, Budget(bytes=base + layers)) == only_layers
    assert chosen(0.3, Budget(bytes=base + table)) == {"table"}
    assert chosen(0.03, Budget(bytes=base + table)) == only_layers  # together they matter more than the table
    assert chosen(0.03, Budget(bytes=base + table + layers)) == everything
    assert chosen(0.03, Budget(kl_nats=0.03)) == only_layers  # the smaller of two ways to the limit
    assert chosen(0.03, Budget(kl_nats=0.0)) == everything and chosen(0.03, Budget(kl_nats=1.0)) == set()


def altered(bundle: Bundle, out: Path) -> Bundle:
    """Returns a copy with one changed byte of the table."""
    shutil.copytree(bundle.path, out)
    model = ir.load(out / bundle.manifest.model)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        if value.name == f"{EMBEDDING}.weight_quantized":
            array = array.copy()
            array.view(np.uint8).flat[77] ^= 5
        value.const_value = ir.tensor(array, name=value.name, dtype=value.dtype)
    ir.save(model, out / bundle.manifest.model, external_data=f"{bundle.model_path.name}_data")
    return Bundle.open(seal(out, bundle.manifest).path, trust=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verification(checkpoint: Path, source: Bundle, text: TokenRows, tmp_path: Path, device: Any) -> None:
    if device == "cuda":
        source = export_bundle(checkpoint, tmp_path / "onnx", ExportOptions(device=device))
    made, _ = make(source, tmp_path / "made", text, prefer="size", cache=None)
    assert bits(made) == 4
    verify_bundle(made, checkpoint, Silent())
    with pytest.raises(SlmError, match="does not match the checkpoint"):
        verify_bundle(altered(made, tmp_path / "altered"), checkpoint, Silent())


def test_portable_bundles_keep_eight_bits(checkpoint: Path, text: TokenRows, tmp_path: Path) -> None:
    """The standard operator Gather does not take 4-bit integers."""
    source = export_bundle(checkpoint, tmp_path / "onnx", ExportOptions(target="portable"))
    with pytest.raises(SlmError, match="is a portable bundle, which does not support --head-bits 4"):
        make(source, tmp_path / "made", text, head_bits=4)
    assert not (tmp_path / "made").exists()
    assert bits(make(source, tmp_path / "made", text, prefer="size")[0]) == 8


def test_untied_tables_have_integers_of_their_own(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, text: TokenRows, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", make_model(two_layers(config, tied=False)), tokenizer, {})
    source = export_bundle(tmp_path / "c", tmp_path / "onnx")
    made, report = make(source, tmp_path / "made", text, head_bits=4)
    assert bits(made) == bits(made, HEAD) == 4
    verify_bundle(made, tmp_path / "c", Silent())
    errors = {each.path: each.error for each in report.tensors}
    stored, wanted = graph_tensors(made.model_path), graph_tensors(source.model_path)[f"{EMBEDDING}.weight"]
    searched = quantize_nearest(wanted, FOUR, search=True)  # a lookup alone has the least error when rounded so
    np.testing.assert_array_equal(stored[f"{EMBEDDING}.weight_quantized"], searched["weight_quantized"])
    ids = {path: stored[f"{path}.frequent_ids"] for path in (EMBEDDING, HEAD)}
    np.testing.assert_array_equal(ids[EMBEDDING], ids[HEAD])
    assert errors[EMBEDDING] < errors[HEAD]
