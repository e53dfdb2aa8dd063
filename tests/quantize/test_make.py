"""Quantization of a float bundle: the quality check, the figures, and rejected inputs."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import slm
from slm.core import manifest
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.manifest import Bundle, seal
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.progress import Silent
from slm.core.text.tokens import TextSource
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.export.graph import (
    BlockFormat,
    FloatFormat,
    Fused,
    LazyTensors,
    build_graph,
    float_tensors,
    graph_tensors,
    save_graph,
)
from slm.export.graph.builder import Array
from slm.quantize.make import quantize_bundle
from slm.quantize.quality import measure
from slm.quantize.results import REPORT_FILE, Change, Report
from slm.quantize.settings import GATES, Gate, Settings
from slm.quantize.texts import TokenRows, calibration_text, measuring_text
from slm.runtime.decoder import OnnxDecoder

# The kernel and numpy sum in different orders: 1e-6 for logits around 1, through four layers.
SAME_LOGITS = 1e-4
OPEN = Gate(None)


def random_text(bundle: Bundle, seed: int = 5, rows: int = 4) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (rows, 60)))


def make(source: Bundle, out: Path, **options: Any) -> tuple[Bundle, Report]:
    """Quantizes without choices by measurement, each of which takes as long as a quantization, unless a test asks for them."""
    settings = Settings(**{"gate": OPEN, "smooth": False, "cache": "float32"} | options)
    return quantize_bundle(source, out, random_text(source), settings, None, random_text(source, 6, 8))


KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8-smooth": {"smooth": True},
    "int8-dynamic": {"dynamic": True},
    "int8-caches": {"cache": "int8"},
    "int4": {"precision": "int4", "smooth": None},
    "int4-size": {"precision": "int4", "prefer": "size", "head_bits": 8, "smooth": None},
    "int4-nearest": {"precision": "int4", "prefer": "size", "head_bits": 8, "smooth": None, "method": "nearest"},
}


@pytest.fixture(scope="module")
def made(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bundle, Report]]:
    """Returns a bundle of each kind."""
    home = tmp_path_factory.mktemp("made")
    return {name: make(shared_bundle, home / name, **settings) for name, settings in KINDS.items()}


@pytest.fixture(scope="module")
def int8_bundle(made: dict[str, tuple[Bundle, Report]]) -> Bundle:
    return made["int8"][0]


@pytest.mark.parametrize("kind", ["int8", "int8-smooth", "int4"])
def test_the_bundle_multiplies_with_the_restored_weights(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path, kind: str
) -> None:
    """With float activations, the bundle equals a float bundle whose weights were rounded in numpy."""
    bundle = made[kind][0]
    schemes = bundle.manifest.quantization.schemes  # type: ignore[union-attr]
    stored = graph_tensors(bundle.model_path)
    wrong_name = "model.layers.1.mlp.down_proj.weight_scale"

    def scaled(name: str) -> Array:
        values: Array = stored[name].copy()
        if name == wrong_name:
            values[:4] *= np.float32(1.1)  # not all rows: the next norm would cancel a common factor
        return values

    logits = {}
    for name, weights, tensors in (
        ("float", FloatFormat(), float_tensors(bundle.model_path, schemes)),
        ("integers", BlockFormat(schemes, accuracy_level=0), stored),
        ("wrong", BlockFormat(schemes, accuracy_level=0), LazyTensors({n: partial(scaled, n) for n in stored})),
    ):
        out = tmp_path / name
        (out / "onnx").mkdir(parents=True)
        model = build_graph(shared_bundle.config, Fused(weights), tensors, shared_bundle.manifest.context)
        save_graph(model, out / "onnx" / "model.onnx")
        (out / "config.json").write_bytes((shared_bundle.path / "config.json").read_bytes())
        logits[name] = OnnxDecoder(seal(out, shared_bundle.manifest)).logits(random_text(shared_bundle).rows)
    np.testing.assert_allclose(logits["float"], logits["integers"], atol=SAME_LOGITS)
    assert np.abs(logits["wrong"] - logits["integers"]).max() > 10 * SAME_LOGITS  # changes a few scales of one layer


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded(shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], kind: str) -> None:
    bundle, report = made[kind]
    quality, quantization = bundle.manifest.quality, bundle.manifest.quantization
    assert quality is not None and quality.tokens == 240 and quantization is not None
    int4 = kind.startswith("int4")
    assert 0 < quality.kl_nats < (0.2 if int4 else 0.01)
    assert quality.same_top1 > (0.5 if int4 else 0.8) and quality.same_top5 > (0.5 if int4 else 0.9)
    assert quality.perplexity_after == pytest.approx(quality.perplexity_before, rel=0.2 if int4 else 0.02)
    assert bundle.manifest.precision == ("int4" if int4 else "int8") and bundle.manifest.parity is None
    assert bundle.model_path.name == ("model_q4.onnx" if int4 else "model_quantized.onnx")
    # The report matches the manifest and the files.
    written = read_json(bundle.path / REPORT_FILE, "report")
    assert written["change"]["kl_nats"] == quality.kl_nats == report.change.kl_nats
    assert report.bytes_after == bundle.model_bytes == sum(report.parts.values())
    assert report.bytes_before == shared_bundle.model_bytes > report.bytes_after
    assert {each.path for each in report.tensors} == set(quantization.schemes) == set(quantization.errors)
    assert quantization.method == {"int8": "nearest", "int4": "gptq"}.get(
        kind[:4] if "nearest" not in kind else "", "nearest"
    )
    assert all(each.error == quantization.errors[each.path] for each in report.tensors)
    assert len(report.divergence.equal) == 4 and min(report.speeds.decode) > 0
    assert (quantization.smoothing is not None) == (report.settings["smoothing"] is not None)
    if kind == "int8-smooth":
        assert quantization.smoothing is not None
    assert report.worst[0].snr_db == min(each.snr_db for each in report.tensors if each.snr_db is not None)


def test_gptq_is_better_than_nearest(made: dict[str, tuple[Bundle, Report]]) -> None:
    kl = {kind: report.change.kl_nats for kind, (_, report) in made.items()}
    assert kl["int4-size"] < 0.8 * kl["int4-nearest"], kl
    assert kl["int8"] < 0.1 * kl["int4-size"], kl


def test_the_change_is_what_the_definitions_give(shared_bundle: Bundle, int8_bundle: Bundle) -> None:
    text = random_text(shared_bundle)
    change = measure(OnnxDecoder(shared_bundle), OnnxDecoder(int8_bundle), text, Silent())
    p, q = (
        np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        for x in (OnnxDecoder(b).logits(text.rows).astype(np.float64) for b in (shared_bundle, int8_bundle))
    )
    assert change.kl_nats == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)
    assert change.same_top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    five = [np.argsort(each, axis=-1)[..., -5:].reshape(-1, 5) for each in (p, q)]
    shared = [len(set(one) & set(other)) / 5 for one, other in zip(*(each.tolist() for each in five), strict=True)]
    assert change.same_top5 == pytest.approx(np.mean(shared)) and change.same_top5 < 1
    likelihood = np.take_along_axis(q[:, :-1], text.rows[:, 1:, None], -1)
    assert change.perplexity_after == pytest.approx(np.exp(-np.log(likelihood).mean()), rel=1e-5)
    assert change.perplexity_after != change.perplexity_before


def test_a_bundle_against_itself_does_not_change(shared_bundle: Bundle) -> None:
    decoders = OnnxDecoder(shared_bundle), OnnxDecoder(shared_bundle)
    change = measure(*decoders, random_text(shared_bundle), Silent())
    assert change.kl_nats == 0 and change.same_top1 == change.same_top5 == 1
    assert change.perplexity_before == change.perplexity_after


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_and_head_are_stored_once(made: dict[str, tuple[Bundle, Report]], kind: str) -> None:
    bundle = made[kind][0]
    graph = ir.load(bundle.model_path).graph
    tables = [n for n, v in graph.initializers.items() if v.shape and bundle.config.vocab_size in tuple(v.shape)]
    assert sorted(tables) == ["model.embed_tokens.weight_quantized", "model.embed_tokens.weight_scale"]


def test_the_untied_head_is_quantized_too(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    untied = config.model_copy(update={"tie_word_embeddings": False})
    save_checkpoint(tmp_path / "c", make_model(untied), tokenizer, {})
    source = export_bundle(tmp_path / "c", tmp_path / "onnx")
    bundle, report = make(source, tmp_path / "int8")
    assert "lm_head.weight_quantized" in ir.load(bundle.model_path).graph.initializers
    assert report.change.kl_nats < 0.01 and report.tensors[-1].path == "lm_head"


def test_smaller_blocks_are_more_exact(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path
) -> None:
    finer, coarse = make(shared_bundle, tmp_path / "b", block_size=16), made["int8"]
    assert all(
        fine.error < each.error
        for fine, each in zip(finer[1].tensors, coarse[1].tensors, strict=True)
        if "layers" in fine.path
    )


def test_the_gate_refuses_and_writes_nothing(shared_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match=r"KL divergence .* least accurate layers: model\.") as caught:
        make(shared_bundle, tmp_path / "b", gate=Gate(1e-7))
    assert caught.value.hint is not None and "--prefer quality" in caught.value.hint and "--max-kl" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_gate() -> None:
    change = Change(10, 0.01, 1.0, 1.0, 10.0, 10.3)
    assert Gate(None).refuses(change) is None and Gate(0.01).refuses(change) is None
    assert "limit 0.009" in str(Gate(0.009).refuses(change))
    assert Gate(None, 0.031).refuses(change) is None
    assert "increase 3.0%" in str(Gate(None, 0.029).refuses(change))
    for nothing in (Change(10, float("nan"), 1.0, 1.0, 10.0, 10.3), Change(10, 0.01, 1.0, 1.0, 10.0, float("nan"))):
        assert Gate(0.02, 0.5).refuses(nothing) is not None  # NaN is rejected


def test_a_broken_quantizer_does_not_pass_the_default_gate(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm.quantize import rounding

    right = rounding.quantize_nearest

    def off_by_one(*arguments: Any) -> dict[str, Array]:
        arrays = right(*arguments)
        return arrays | {"weight_quantized": np.roll(arrays["weight_quantized"], 1, axis=-1)}

    monkeypatch.setattr(rounding, "quantize_nearest", off_by_one)
    with pytest.raises(SlmError, match="quality check failed: KL divergence"):
        make(shared_bundle, tmp_path / "b", gate=GATES["int8"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def uneven(
    shared_checkpoint: Path, shared_bundle: Bundle, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Returns the same model with one input channel of every layer's products a few hundred times larger than the others."""

    home = tmp_path_factory.mktemp("uneven")
    model, config = load_checkpoint(shared_checkpoint), shared_bundle.config
    state = model.state_dict()  # the model's own tensors
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm, products in (
            ("input_layernorm", [f"self_attn.{p}_proj" for p in "qkv"]),
            ("pre_feedforward_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            state[f"{layer}.{norm}.weight"][9] = (1 + state[f"{layer}.{norm}.weight"][9]) * 300 - 1
            for product in products:
                state[f"{layer}.{product}.weight"][:, 9] /= 300
    save_checkpoint(home / "c", model, tokenizer, {})
    return export_bundle(home / "c", home / "onnx")


def test_a_bad_setting_is_stopped_and_smoothing_makes_it_a_good_one(uneven: Bundle, tmp_path: Path) -> None:
    """A token with one much larger channel has a bad common scale. Smoothing fixes it."""
    with pytest.raises(SlmError, match="quality check failed: KL divergence"):
        make(uneven, tmp_path / "b", dynamic=True, gate=GATES["int8"])
    assert list(tmp_path.iterdir()) == []
    bundle, report = make(uneven, tmp_path / "b", dynamic=True, smooth=None, gate=GATES["int8"])  # by measurement
    assert report.settings["smoothing"] and bundle.manifest.quantization.smoothing  # type: ignore[union-attr]
    assert report.change.kl_nats < 0.01


def test_dynamic_rows_do_not_depend_on_each_other(made: dict[str, tuple[Bundle, Report]]) -> None:
    """The result of a row does not depend on other rows, because each token has its own scale."""
    bundle = made["int8-dynamic"][0]
    decoder = OnnxDecoder(bundle, threads=1)
    rows = random_text(bundle).rows
    together = decoder.logits(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(decoder.logits(row[None])[0], together[i])
    changed = decoder.logits(np.concatenate([rows[:3], rows[:1]]))
    np.testing.assert_array_equal(changed[:3], together[:3])
    assert (changed[3] != together[3]).any()  # the control


def test_one_scale_a_tensor_would_be_noticed(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the previous test: with one scale for all rows, rows depend on each other."""
    from slm.export.graph import formats
    from slm.export.graph.builder import Op, Value, fused

    def one_scale(self: formats.DynamicLinear, op: Op, x: Value) -> Value:
        largest = op.Max(op.ReduceMax(op.Abs(x), keepdims=1), 1e-9)
        middle = op.Constant(value=ir.tensor(np.array(128, np.uint8)))
        rounded = op.QuantizeLinear(op.Div(x, largest), 1 / 127, middle)
        return op.Mul(
            fused(op).MatMulIntegerToFloat(rounded, self.weight_quantized, 1 / 127, self.weight_scale, middle), largest
        )

    monkeypatch.setattr(formats.DynamicLinear, "forward", one_scale)
    monkeypatch.setattr(manifest, "_check_graph", lambda *_: None)  # which would notice first
    bundle, report = make(shared_bundle, tmp_path / "b", dynamic=True)
    assert report.change.kl_nats > 1.5 * made["int8-dynamic"][1].change.kl_nats
    decoder, rows = OnnxDecoder(bundle, threads=1), random_text(bundle).rows
    assert any((decoder.logits(row[None])[0] != decoder.logits(rows)[i]).any() for i, row in enumerate(rows))


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-caches", "int4"])
def test_same_input_same_bytes(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path, kind: str
) -> None:
    first, second = made[kind][0], make(shared_bundle, tmp_path / "again", **KINDS[kind])[0]
    timed = {name for name in first.manifest.files if name.startswith("report.")}  # seconds and speeds
    assert timed
    for name, entry in first.manifest.files.items():
        assert name in timed or second.manifest.files[name] == entry, name


def test_mixed_precision_keeps_a_target_size(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path
) -> None:
    least = made["int4-size"][1].bytes_after
    target = least + 30_000
    bundle, report = make(shared_bundle, tmp_path / "b", precision="int4", head_bits=8, target_bytes=target)
    assert least < report.bytes_after <= target
    bits = {scheme.bits for path, scheme in bundle.manifest.quantization.schemes.items() if "layers" in path}  # type: ignore[union-attr]
    assert bits == {4, 8}
    assert report.change.kl_nats < made["int4-size"][1].change.kl_nats
    tried = {each.path: each.harm_nats for each in report.tensors if each.harm_nats is not None}
    assert len(tried) == 16 and max(tried.values()) > 0
    with pytest.raises(SlmError, match="the weights take at least"):
        make(shared_bundle, tmp_path / "c", precision="int4", head_bits=8, target_bytes=least // 2)
    assert not (tmp_path / "c").exists()


def test_mixed_precision_keeps_a_divergence(
    shared_bundle: Bundle, made: dict[str, tuple[Bundle, Report]], tmp_path: Path
) -> None:
    coarse = made["int4-size"][1]
    target = coarse.change.kl_nats / 2
    bundle, report = make(shared_bundle, tmp_path / "b", precision="int4", head_bits=8, target_kl_nats=target)
    assert report.change.kl_nats <= target
    bits = {scheme.bits for path, scheme in bundle.manifest.quantization.schemes.items() if "layers" in path}  # type: ignore[union-attr]
    assert bits == {4, 8}
    _, loose = make(shared_bundle, tmp_path / "c", precision="int4", head_bits=8, target_kl_nats=9.0)
    assert loose.bytes_after < coarse.bytes_after < report.bytes_after  # blocks of 64 are smaller still


def test_what_cannot_be_quantized_is_refused(
    shared_bundle: Bundle, portable_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(SlmError, match="is already int8"):
        make(int8_bundle, tmp_path / "b")
    with pytest.raises(SlmError, match="the block size 128") as caught:
        make(shared_bundle, tmp_path / "b", block_size=128)
    assert caught.value.hint == "use --block-size 64"
    with pytest.raises(SlmError, match="is the bundle to quantize"):
        make(shared_bundle, shared_bundle.path)
    with pytest.raises(SlmError, match="portable bundle"):
        make(portable_bundle, tmp_path / "b", dynamic=True)
    assert not (tmp_path / "b").exists()


def test_files_with_several_names_are_refused_in_a_line(shared_bundle: Bundle, tmp_path: Path) -> None:
    """onnx_ir does not read hard links, which can point to a file that the bundle's owner cannot write."""
    shutil.copytree(shared_bundle.path, tmp_path / "copy")
    (data,) = (tmp_path / "copy").rglob("*_data")
    os.link(data, tmp_path / "other")
    with pytest.raises(SlmError, match=r"cannot read the weights.*hard links"):
        make(Bundle.open(tmp_path / "copy"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers(made: dict[str, tuple[Bundle, Report]], kind: str) -> None:
    model = slm.load(made[kind][0].path)
    assert len(model.generate("The", max_new_tokens=8, temperature=0)) > 0
    assert kind[:4] in model.decoder.description


def test_measuring_text(shared_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One day.\n<|endoftext|>\nThe end.\n<|endoftext|>\n")
    text = measuring_text(shared_bundle, file)
    ids = text.rows[0].tolist()
    tokenizer = Tokenizer.load(shared_bundle.path)
    assert ids == [0, *tokenizer.encode_literal("One day."), 0, *tokenizer.encode_literal("The end.")]
    shipped = measuring_text(shared_bundle, None, tokens=1000)
    assert shipped.rows.shape[1] > shared_bundle.config.sliding_window
    assert shipped.rows.size <= 1000
    file.write_text("  ")
    with pytest.raises(SlmError, match="too little text"):
        measuring_text(shared_bundle, file)


def test_measuring_text_is_the_same_in_every_kind_of_file(shared_bundle: Bundle) -> None:
    Path("a.txt").write_text("One day.\n<|endoftext|>\nThe end.\n")
    Path("a.jsonl").write_text('\ufeff{"text": "One day."}\n{"text": "The end.", "id": 2}\n')
    Path("a.csv").write_text("id,story\n1,One day.\n2,The end.\n")
    plain = measuring_text(shared_bundle, Path("a.txt")).rows
    for cut in (measuring_text, calibration_text):
        assert np.array_equal(cut(shared_bundle, Path("a.jsonl")).rows, plain)
        assert np.array_equal(cut(shared_bundle, TextSource(Path("a.csv"), "story")).rows, plain)


def test_int8_caches_take_a_quarter_and_cost_little(
    shared_bundle: Bundle, int8_bundle: Bundle, made: dict[str, tuple[Bundle, Report]]
) -> None:
    text = random_text(shared_bundle)
    bundle, report = made["int8-caches"]
    assert {layer.dtype for layer in bundle.manifest.cache} == {"int8"}
    assert {spec.dtype for spec in bundle.manifest.inputs if "past" in spec.name} == {"int8"}
    decoders = [OnnxDecoder(each) for each in (int8_bundle, bundle)]
    for decoder in decoders:
        decoder.read(text.rows[0].tolist())
    assert decoders[0].buffers.bytes == 4 * decoders[1].buffers.bytes
    # Measured: 0.0008 nats, and 0.0001 for the weights alone, with random weights and random tokens.
    assert int8_bundle.manifest.quality is not None
    assert int8_bundle.manifest.quality.kl_nats < report.change.kl_nats < 0.01


def test_int8_caches_with_wrong_steps_are_noticed(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm.quantize import decide

    measured = decide.cache_steps
    monkeypatch.setattr(
        decide, "cache_steps", lambda *args: {name: steps / 20 for name, steps in measured(*args).items()}
    )
    with pytest.raises(SlmError, match="quality check failed: KL divergence"):
        make(shared_bundle, tmp_path / "b", cache="int8", gate=GATES["int8"])


def test_a_report_of_an_older_bundle_does_not_stay(shared_bundle: Bundle, tmp_path: Path) -> None:
    """Quantization replaces all files of an existing quantized bundle."""
    first = make(shared_bundle, tmp_path / "b")[1]
    second = make(shared_bundle, tmp_path / "b", precision="int4", prefer="size")[1]
    written = read_json(tmp_path / "b" / REPORT_FILE, "report")
    assert written["bytes_after"] == second.bytes_after < first.bytes_after
    assert not (tmp_path / "b" / "onnx" / "model_quantized.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
