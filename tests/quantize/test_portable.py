"""Quantized portable bundles: standard operators that onnxruntime fuses, with the same integers as the fused bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme, seal
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph import (
    float_tensors,
    graph_tensors,
    portable_tensors,
)
from slm.export.graph.blocks import QUANTIZED, SCALE, ZERO_POINTS, dequantize
from slm.export.parity import TOLERANCE
from slm.export.verify import model_of, verify_bundle
from slm.quantize.blocks import quantize_nearest
from slm.quantize.instrumented import InstrumentedLayer, InstrumentedModel, embedded
from slm.quantize.linears import Linear, linears_of
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.statistics import root_mean_squares, second_moments
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

# float32 sums in another order with the same weights. Measured: 6e-6.
SAME_LOGITS = 3e-5
# The tolerance of statistics relative to the largest: attention sums in another order. Measured: 1e-6.
SAME_STATISTICS = 1e-5

KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, smoothed": {"smooth": True, "prefer": "quality"},
    "int4": {"precision": "int4", "prefer": "size"},
    "int4, smoothed": {"precision": "int4", "prefer": "size", "smooth": True},
    "int4, mixed": {"precision": "int4", "smooth": None},
}


def random_text(bundle: Bundle, seed: int = 5, rows: int = 4) -> TokenRows:
    return TokenRows("random", np.random.default_rng(seed).integers(0, bundle.config.vocab_size, (rows, 60)))


def make(source: Bundle, out: Path, **settings: Any) -> Bundle:
    wanted = Settings(**{"gate": Gate(None), "smooth": False} | settings)
    return quantize_bundle(source, out, random_text(source), wanted, None, random_text(source, 6, 8))[0]


@pytest.fixture(scope="module")
def portable(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Returns a portable bundle of the checkpoint of `shared_bundle`."""
    return export_bundle(
        shared_checkpoint, tmp_path_factory.mktemp("portable") / "onnx", ExportOptions(target="portable")
    )


@pytest.fixture(scope="module")
def made(portable: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Returns a quantized bundle of each kind."""
    home = tmp_path_factory.mktemp("made")
    return {name: make(portable, home / name.replace(", ", "-"), **settings) for name, settings in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_standard_operators_alone(made: dict[str, Bundle], kind: str) -> None:
    bundle = made[kind]
    onnx.checker.check_model(bundle.model_path, full_check=True)
    model = onnx.load(bundle.model_path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    names = [t.name for t in model.graph.initializer if bundle.config.vocab_size in t.dims]
    parts = ("weight_quantized", "weight_scale")
    assert sorted(names) == [f"model.embed_tokens.{part}" for part in parts]  # the lookup and the head share one table
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization.accuracy_level == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_and_its_predictions(made: dict[str, Bundle], shared_checkpoint: Path, kind: str) -> None:
    """The graph as written is within the float32 tolerance with equal greedy tokens; the fused graph within a larger one."""
    found = verify_bundle(made[kind], shared_checkpoint, Silent()).parity
    exact = found["cpu, graph as written"]
    assert exact.largest < TOLERANCE < found["cpu"].largest
    assert exact.greedy_tokens_equal == 32


def changed(bundle: Bundle, out: Path, change: Callable[[ir.Model], None]) -> Bundle:
    model = ir.load(bundle.model_path)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    change(model)
    (out / "onnx").mkdir(parents=True)
    path = out / bundle.manifest.model
    ir.save(model, path, external_data=f"{path.name}_data")
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_bytes((bundle.path / name).read_bytes())
    return seal(out, bundle.manifest)


def a_scale(model: ir.Model) -> None:
    """Increases one scale of one channel by 10 %."""
    value = model.graph.initializers["model.layers.2.mlp.down_proj.weight_scale"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0, 7] *= np.float32(1.1)
    value.const_value = ir.tensor(array, name=value.name)


def blocks_along_the_outputs(model: ir.Model) -> None:
    """Rotates the products' blocks by one, which keeps every shape."""
    for name, value in model.graph.initializers.items():
        if name.endswith(".weight_scale") and "embed" not in name:
            assert value.const_value is not None
            value.const_value = ir.tensor(np.roll(value.const_value.numpy(), 1, axis=1), name=name)


@pytest.mark.parametrize("change", [a_scale, blocks_along_the_outputs], ids=lambda change: change.__name__)
def test_a_wrong_scale_is_noticed(
    made: dict[str, Bundle], shared_checkpoint: Path, tmp_path: Path, change: Callable[[ir.Model], None]
) -> None:
    """Negative control."""
    with pytest.raises(SlmError, match="the bundle does not match the checkpoint"):
        verify_bundle(changed(made["int8"], tmp_path / "wrong", change), shared_checkpoint, Silent())


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_reference_evaluator(made: dict[str, Bundle], tmp_path: Path, kind: str) -> None:
    """ONNX's reference evaluator matches PyTorch with the dequantized weights. Negative control: a wrong scale."""
    bundle = made[kind]
    ids = np.random.default_rng(3).integers(4, bundle.config.vocab_size, (2, 40))
    with torch.inference_mode():
        wanted = model_of(bundle)(torch.from_numpy(ids)).numpy()
    wrong = changed(bundle, tmp_path / "wrong", a_scale)
    off = []
    for each in (bundle, wrong):
        model = onnx.load(each.model_path)
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for value in model.graph.input:
            if value.name.startswith("past_key_values"):
                dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
                feeds[value.name] = np.zeros((2, dims[1], 0, dims[3]), np.float32)
        logits = ReferenceEvaluator(model).run(["logits"], feeds)[0]
        off.append(float(np.abs(logits - wanted).max()))
    assert off[0] < SAME_LOGITS < 10 * SAME_LOGITS < off[1]


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_fuses_every_product(made: dict[str, Bundle], tmp_path: Path, kind: str) -> None:
    """After optimization, only the lookup still dequantizes weights. The unoptimized graph has all the operators."""
    products = len(linears_of(made[kind].config))  # four a layer, and the head
    for level, fused in (("ORT_ENABLE_ALL", products), ("ORT_DISABLE_ALL", 0)):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / f"{level}.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(made[kind].model_path, options, providers=["CPUExecutionProvider"])
        nodes = [node.op_type for node in ir.load(tmp_path / f"{level}.onnx").graph]
        assert nodes.count("MatMulNBits") == fused
        assert nodes.count("DequantizeLinear") == products + 1 - fused


def test_the_integers_are_the_fused_bundles(made: dict[str, Bundle], shared_bundle: Bundle, tmp_path: Path) -> None:
    other = make(shared_bundle, tmp_path / "fused")
    ours, theirs = made["int8"].manifest.quantization, other.manifest.quantization
    assert ours is not None and theirs is not None and ours.schemes == theirs.schemes
    first, second = (float_tensors(each.model_path, ours.schemes) for each in (made["int8"], other))
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    finer = float_tensors(made["int8, smoothed"].model_path, made["int8, smoothed"].manifest.quantization.schemes)  # type: ignore[union-attr]
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.abs(first[name] - finer[name]).max() > 0  # negative control: a smaller block size


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 96])  # even and odd numbers of blocks
def test_columns_stand_for_the_same_weights(bits: Any, zero_points: bool, columns: int) -> None:
    scheme = Scheme(bits=bits, block_size=32, zero_points=zero_points)
    weight = np.random.default_rng(0).normal(0.1, 1, (24, columns)).astype(np.float32)
    arrays = quantize_nearest(weight, scheme)
    wanted = dequantize(arrays[QUANTIZED], arrays[SCALE], arrays.get(ZERO_POINTS), scheme)
    for path, shape in (("x", (columns, 24)), ("model.embed_tokens", (24, columns))):
        blocks = {f"{path}.{part}": array for part, array in arrays.items()} | {"norm.weight": weight[0]}
        turned = portable_tensors(blocks, {path: scheme})
        assert set(turned) == set(blocks) and turned["norm.weight"] is blocks["norm.weight"]
        assert turned[f"{path}.{QUANTIZED}"].shape == shape
        points = turned[f"{path}.{ZERO_POINTS}"] if zero_points else None
        found = dequantize(turned[f"{path}.{QUANTIZED}"], turned[f"{path}.{SCALE}"], points, scheme)
        np.testing.assert_array_equal(found, wanted)
    other = scheme.model_copy(update={"zero_points": not zero_points})
    if bits == 8:  # negative control: integers read with the other sign
        assert (
            portable_tensors(blocks, {path: other})[f"{path}.{QUANTIZED}"].dtype != turned[f"{path}.{QUANTIZED}"].dtype
        )


def layers_of(bundle: Bundle) -> list[list[Linear]]:
    linears = linears_of(bundle.config)
    return [[linear for linear in linears if linear.layer == i] for i in range(bundle.config.num_hidden_layers)]


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= SAME_STATISTICS * np.abs(theirs).max())


def test_statistics_are_the_fused_graphs(portable: Bundle, shared_bundle: Bundle) -> None:
    text, other = random_text(portable, 7, 2), random_text(portable, 8, 2)
    layers = [linear for linear in linears_of(portable.config) if linear.layer is not None]
    ours, theirs = (
        root_mean_squares(InstrumentedModel(each, layers), layers, text, Silent()) for each in (portable, shared_bundle)
    )
    control = root_mean_squares(InstrumentedModel(portable, layers), layers, other, Silent())
    for path, found in ours.items():
        assert alike(found, theirs[path])
        assert not alike(control[path], theirs[path])


def test_layers_are_the_fused_graphs(portable: Bundle, shared_bundle: Bundle) -> None:
    """Moments of each layer match those of the fused graph, with one replaced weight in the layers before it."""
    text = random_text(portable, 7, 2)
    found: list[list[dict[str, np.ndarray]]] = []
    for bundle, least in ((portable, 0.5), (shared_bundle, 0.5), (portable, 1.0)):
        stored = graph_tensors(bundle.model_path)
        streams = embedded(bundle, text.rows)
        moments = []
        for i, linears in enumerate(layers_of(bundle)):
            layer = InstrumentedLayer(bundle, linears, i)
            moments.append(second_moments(layer, linears, text, streams))
            path = linears[0].path
            weights = {path: stored[f"{path}.weight"] * np.linspace(least, 1, linears[0].inputs, dtype=np.float32)}
            streams = [layer.after(row, stream, weights) for row, stream in zip(text.rows, streams, strict=True)]
        found.append(moments)
    ours, theirs, control = found
    for i, moments in enumerate(ours):
        for path, moment in moments.items():
            assert alike(moment, theirs[i][path])
            # Negative control: without the replacement, only the first layer has the same inputs.
            assert alike(control[i][path], theirs[i][path]) == (i == 0)


def test_whole_rows_with_other_weights(portable: Bundle, shared_bundle: Bundle) -> None:
    row = random_text(portable).rows[0]
    linears = linears_of(portable.config)[1:]
    name = linears[2].path
    weights = {name: graph_tensors(portable.model_path)[f"{name}.weight"] * np.float32(0.5)}
    ours, theirs = (InstrumentedModel(each, linears).predictions(row, weights) for each in (portable, shared_bundle))
    np.testing.assert_allclose(ours, theirs, atol=SAME_LOGITS)
    assert np.abs(OnnxDecoder(portable).logits(row[None])[0] - ours).max() > 10 * SAME_LOGITS


def test_an_untied_head(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", make_model(config.model_copy(update={"tie_word_embeddings": False})), tokenizer, {})
    bundle = make(export_bundle(tmp_path / "c", tmp_path / "onnx", ExportOptions(target="portable")), tmp_path / "int8")
    names = {f"{path}.weight_quantized" for path in ("lm_head", "model.embed_tokens")}
    assert names <= ir.load(bundle.model_path).graph.initializers.keys()
    assert verify_bundle(bundle, tmp_path / "c", Silent()).parity["cpu, graph as written"].largest < TOLERANCE


def test_what_needs_onnxruntimes_operators_is_refused(
    slm: Callable[..., Any], portable: Bundle, shared_bundle: Bundle, tmp_path: Path
) -> None:
    for options, what in (
        (["--int8-dynamic"], "--int8-dynamic"),
        (["--int8", "--kv-cache", "int8"], "--kv-cache int8"),
    ):
        result = slm("quantize", portable.path, *options, "--out", tmp_path / "b")
        assert result.code == 1 and f"is a portable bundle, which does not support {what}" in result.err
        assert len(result.err.splitlines()) <= 3 and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_for_speed_caches_stay_as_they_are(portable: Bundle, tmp_path: Path) -> None:
    """`--prefer speed` gives INT8 caches to fused bundles only."""
    bundle = make(portable, tmp_path / "speed", prefer="speed")
    assert {layer.dtype for layer in bundle.manifest.cache} == {"float32"}
