"""INT8 by block: the arithmetic against plain numpy, the kernel against the arithmetic, and the gate."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import slm
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.export.graph import LazyTensors, graph_tensors
from slm.export.graph.blocks import dequantize_blocks
from slm.quantize.blocks import quantize_blocks
from slm.quantize.decide import Gate, Settings
from slm.quantize.make import quantize_bundle
from slm.quantize.quality import Text, measure, measuring_text
from slm.runtime.decoder import OnnxDecoder

# 127 levels to each side and weights that spread over their block: measured 47 to 50 dB on normal weights.
SIGNAL_TO_NOISE_DB = 40.0


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_blocks_against_a_plain_loop(block_size: int) -> None:
    values = weight()
    quantized, scale = quantize_blocks(values, block_size)
    assert quantized.dtype == np.uint8 and quantized.shape == (24, 64 // block_size, block_size)
    for n in range(24):
        for b in range(64 // block_size):
            block = values[n, b * block_size : (b + 1) * block_size]
            step = np.float32(max(abs(x) for x in block)) / np.float32(127)
            assert scale[n, b] == step
            assert quantized[n, b].tolist() == [round(float(x / step)) + 128 for x in block]


def test_the_error_is_within_half_a_step() -> None:
    values = weight()
    quantized, scale = quantize_blocks(values, 32)
    error = np.abs(dequantize_blocks(quantized, scale) - values).reshape(24, 2, 32)
    assert (error <= scale[..., None] * 0.5 * (1 + 1e-5)).all()
    noise = 10 * np.log10((values**2).mean() / (error**2).mean())
    assert noise > SIGNAL_TO_NOISE_DB


def test_zero_blocks_and_extremes() -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, 3], values[1, 7] = -5.0, 5.0
    quantized, scale = quantize_blocks(values, 16)
    assert (quantized[0] == 128).all() and scale[0].tolist() == [0, 0]
    assert (quantized[1, 0, 3], quantized[1, 0, 7]) == (1, 255)
    np.testing.assert_array_equal(dequantize_blocks(quantized, scale), values)


@pytest.fixture(scope="module")
def int8_bundle(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("int8") / "onnx-int8"
    return quantize_bundle(shared_bundle, out, random_text(shared_bundle), Settings(gate=Gate(1)))[0]


def random_text(bundle: Bundle) -> Text:
    return Text("random", np.random.default_rng(5).integers(0, bundle.config.vocab_size, (4, 60)))


def test_the_kernels_multiply_with_the_dequantized_weights(
    shared_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path
) -> None:
    """With activations left in float, the INT8 bundle equals a float bundle whose weights were rounded in numpy."""
    from slm.core.manifest import seal
    from slm.export.graph import BlockFormat, FloatFormat, Fused, build_graph, save_graph

    tensors = graph_tensors(shared_bundle.model_path)
    block = int8_bundle.manifest.quantization.block_size  # type: ignore[union-attr]
    assert block == 32

    def rounded(name: str) -> np.ndarray:
        matrix = name.endswith(("_proj.weight", "embed_tokens.weight"))
        return dequantize_blocks(*quantize_blocks(tensors[name], block)) if matrix else tensors[name]

    def scaled(name: str) -> np.ndarray:
        values = exact[name].copy()
        if name == "model.layers.1.mlp.down_proj.weight_scale":
            values[:4] *= np.float32(1.1)  # of all rows alike, the norm that follows would take it back
        return values

    exact = quantized_tensors(tensors, block)
    logits = {}
    for name, weights, source in (
        ("float", FloatFormat(), LazyTensors({n: partial(rounded, n) for n in tensors})),
        ("int8", BlockFormat(8, block, accuracy_level=0), exact),
        ("wrong", BlockFormat(8, block, accuracy_level=0), LazyTensors({n: partial(scaled, n) for n in exact})),
    ):
        out = tmp_path / name
        (out / "onnx").mkdir(parents=True)
        model = build_graph(shared_bundle.config, Fused(weights), source, shared_bundle.manifest.context)
        save_graph(model, out / "onnx" / "model.onnx")
        (out / "config.json").write_bytes((shared_bundle.path / "config.json").read_bytes())
        bundle = seal(out, shared_bundle.manifest)
        logits[name] = OnnxDecoder(bundle).logits(random_text(bundle).rows)
    np.testing.assert_allclose(logits["float"], logits["int8"], atol=1e-4)
    assert np.abs(logits["wrong"] - logits["int8"]).max() > 1e-3  # a few scales of one layer


def test_the_report(shared_bundle: Bundle, int8_bundle: Bundle) -> None:
    quality = int8_bundle.manifest.quality
    assert quality is not None and quality.tokens == 240
    assert 0 < quality.kl_nats < 0.01
    assert quality.same_top1 > 0.8
    assert quality.perplexity_after == pytest.approx(quality.perplexity_before, rel=0.02)
    assert int8_bundle.manifest.precision == "int8" and int8_bundle.manifest.parity is None
    assert int8_bundle.bytes < shared_bundle.bytes
    assert int8_bundle.model_path.name == "model_quantized.onnx"


def test_the_report_is_what_the_definitions_give(shared_bundle: Bundle, int8_bundle: Bundle) -> None:
    text = random_text(shared_bundle)
    change = measure(shared_bundle, int8_bundle, text, Silent())
    p, q = (
        np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        for x in (OnnxDecoder(b).logits(text.rows).astype(np.float64) for b in (shared_bundle, int8_bundle))
    )
    assert change.kl_nats == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert change.same_top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    likelihood = np.take_along_axis(q[:, :-1], text.rows[:, 1:, None], -1)
    assert change.perplexity_after == pytest.approx(np.exp(-np.log(likelihood).mean()))


def test_a_bundle_against_itself_does_not_change(shared_bundle: Bundle) -> None:
    change = measure(shared_bundle, shared_bundle, random_text(shared_bundle), Silent())
    assert change.kl_nats == 0 and change.same_top1 == 1
    assert change.perplexity_before == change.perplexity_after


def test_embedding_and_head_are_stored_once(int8_bundle: Bundle) -> None:
    vocab_size = int8_bundle.config.vocab_size
    graph = ir.load(int8_bundle.model_path).graph
    tables = [n for n, v in graph.initializers.items() if v.shape and vocab_size in tuple(v.shape)]
    assert sorted(tables) == ["model.embed_tokens.weight_quantized", "model.embed_tokens.weight_scale"]


def test_the_untied_head_is_quantized_too(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    untied = config.model_copy(update={"tie_word_embeddings": False})
    save_checkpoint(tmp_path / "c", make_model(untied), tokenizer, {})
    source = export_bundle(tmp_path / "c", tmp_path / "onnx")
    made = quantize_bundle(source, tmp_path / "int8", random_text(source), Settings(gate=Gate(1)))[0]
    assert "lm_head.weight_quantized" in ir.load(made.model_path).graph.initializers
    assert made.manifest.quality is not None and made.manifest.quality.kl_nats < 0.01


def test_smaller_blocks_are_more_exact(shared_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path) -> None:
    made = quantize_bundle(
        shared_bundle,
        tmp_path / "b",
        random_text(shared_bundle),
        Settings(block_size=16, gate=Gate(1)),
    )[0]
    assert made.manifest.quality is not None and int8_bundle.manifest.quality is not None
    assert made.manifest.quality.kl_nats < int8_bundle.manifest.quality.kl_nats


def test_the_gate_refuses_and_writes_nothing(shared_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="moved by") as caught:
        quantize_bundle(
            shared_bundle,
            tmp_path / "b",
            random_text(shared_bundle),
            Settings(gate=Gate(1e-7)),
        )[0]
    assert caught.value.hint is not None and "--block-size 16" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_broken_quantizer_would_not_pass_the_default_gate(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(values: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        quantized, scale = quantize_blocks(values, block_size)
        return np.roll(quantized, 1, axis=-1), scale

    monkeypatch.setattr("slm.quantize.int8.quantize_blocks", off_by_one)
    with pytest.raises(SlmError, match="moved by"):
        quantize_bundle(shared_bundle, tmp_path / "b", random_text(shared_bundle))[0]


def test_same_input_same_bytes(shared_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path) -> None:
    again = quantize_bundle(shared_bundle, tmp_path / "b", random_text(shared_bundle), Settings(gate=Gate(1)))[0]
    assert again.manifest.files == int8_bundle.manifest.files


def test_what_cannot_be_quantized_is_refused(shared_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="int8 already"):
        quantize_bundle(int8_bundle, tmp_path / "b", random_text(shared_bundle))[0]
    with pytest.raises(SlmError, match="blocks of 128") as caught:
        quantize_bundle(
            shared_bundle,
            tmp_path / "b",
            random_text(shared_bundle),
            Settings(block_size=128),
        )[0]
    assert caught.value.hint == "--block-size 32 fits"


def test_it_answers(int8_bundle: Bundle) -> None:
    model = slm.load(int8_bundle.path)
    assert len(model.generate("The", max_new_tokens=8, temperature=0)) > 0
    assert "int8" in model.decoder.description


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


def test_int8_caches_take_a_quarter_and_cost_little(shared_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path) -> None:
    text = random_text(shared_bundle)
    settings = Settings(gate=Gate(1), cache="int8")
    made = quantize_bundle(shared_bundle, tmp_path / "b", text, settings)[0]
    assert {layer.dtype for layer in made.manifest.cache} == {"int8"}
    assert {spec.dtype for spec in made.manifest.inputs if "past" in spec.name} == {"int8"}
    decoders = [OnnxDecoder(bundle) for bundle in (int8_bundle, made)]
    for decoder in decoders:
        decoder.read(text.rows[0].tolist())
    assert decoders[0].buffers.bytes == 4 * decoders[1].buffers.bytes
    assert made.manifest.quality is not None and int8_bundle.manifest.quality is not None
    # Measured 0.0008 against 0.0001 for the weights alone, on random weights and random tokens.
    assert int8_bundle.manifest.quality.kl_nats < made.manifest.quality.kl_nats < 0.01


def test_int8_caches_with_wrong_steps_are_noticed(
    shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm.quantize import int8 as module

    measured = module.cache_steps
    monkeypatch.setattr(
        module, "cache_steps", lambda *args: {name: steps / 20 for name, steps in measured(*args).items()}
    )
    with pytest.raises(SlmError, match="the predictions moved"):
        quantize_bundle(
            shared_bundle,
            tmp_path / "b",
            random_text(shared_bundle),
            Settings(cache="int8"),
        )[0]
