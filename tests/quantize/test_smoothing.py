"""Smoothing: the model computes the same, factors can be recovered and reverted, and a wrong factor is detected."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Silent
from slm.export.graph import FloatFormat, Fused, LazyTensors, build_graph, graph_tensors, save_graph
from slm.export.graph.builder import Array
from slm.export.graph.smoothing import Smoothing, smoothing_between
from slm.quantize.blocks import quantize_nearest
from slm.quantize.instrumented import InstrumentedModel
from slm.quantize.linears import linears_of
from slm.quantize.rounding import restored
from slm.quantize.smoothquant import smoothquant
from slm.quantize.statistics import root_mean_squares
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

# Products with factors are rounded to float32, which has the effect of another order of sums: 1e-6 for logits around 1.
SAME_LOGITS = 2e-5


@pytest.fixture(scope="module")
def found(shared_bundle: Bundle) -> Smoothing:
    config = shared_bundle.config
    layers = [linear for linear in linears_of(config) if linear.layer is not None]
    text = TokenRows("random", np.random.default_rng(5).integers(0, config.vocab_size, (4, 60)))
    rms = root_mean_squares(InstrumentedModel(shared_bundle, layers), layers, text, Silent())
    return smoothquant(graph_tensors(shared_bundle.model_path), config, rms)


def logits_with(bundle: Bundle, tensors: Mapping[str, Array], out: Path) -> Array:
    (out / "onnx").mkdir(parents=True)
    model = build_graph(bundle.config, Fused(FloatFormat()), tensors, bundle.manifest.context)
    save_graph(model, out / "onnx" / "model.onnx")
    rows = np.random.default_rng(7).integers(0, bundle.config.vocab_size, (2, 50))
    return OnnxDecoder(Bundle(out, bundle.manifest, bundle.config), threads=1).logits(rows)


def with_factor(given: Smoothing, name: str, rows: bool, channel: int, factor: float) -> Smoothing:
    """Returns the smoothing with one factor changed on one side only."""
    side = dict(given.rows if rows else given.columns)
    side[name] = side[name].copy()
    side[name][channel] *= np.float32(factor)
    return Smoothing(given.exponent, given.columns if rows else side, side if rows else given.rows)


def test_the_model_computes_the_same(shared_bundle: Bundle, found: Smoothing, tmp_path: Path) -> None:
    tensors = graph_tensors(shared_bundle.model_path)
    plain = logits_with(shared_bundle, tensors, tmp_path / "plain")
    smooth = logits_with(shared_bundle, found.apply(tensors), tmp_path / "smooth")
    np.testing.assert_allclose(smooth, plain, atol=SAME_LOGITS * plain.std() + SAME_LOGITS)
    layer = "model.layers.1"
    for i, (name, rows) in enumerate(
        (
            (f"{layer}.self_attn.qkv_proj.weight", False),
            (f"{layer}.self_attn.o_proj.weight", False),
            (f"{layer}.mlp.down_proj.weight", False),
            (f"{layer}.pre_feedforward_layernorm.weight", True),
        )
    ):
        wrong = with_factor(found, name, rows, 3, 2 ** (1 / 8))
        off = logits_with(shared_bundle, wrong.apply(tensors), tmp_path / f"wrong-{i}") - plain
        assert np.abs(off).max() > 20 * SAME_LOGITS, name


def test_factors_do_something(shared_bundle: Bundle, found: Smoothing) -> None:
    assert len(found.columns) == 4 * 4 and len(found.rows) == 4 * 4  # four products; two products and two norms
    for name, factors in (*found.columns.items(), *found.rows.items()):
        eighths = np.log2(factors) * 8
        np.testing.assert_allclose(eighths, np.rint(eighths), atol=1e-4)
        assert len(set(factors.tolist())) > 2, name
    # queries and keys are not smoothed, because a norm follows their product
    config = shared_bundle.config
    untouched = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    assert (found.rows["model.layers.0.self_attn.qkv_proj.weight"][:untouched] == 1).all()
    # query heads of a group share the factors of their value head
    o = found.columns["model.layers.0.self_attn.o_proj.weight"].reshape(config.num_attention_heads, -1)
    np.testing.assert_array_equal(o[0], o[1])
    assert (o[1] != o[2]).any()


def test_smoothing_evens_activations_out(shared_bundle: Bundle) -> None:
    """Smoothing reduces a channel that is 64 times larger than the others, which a new measurement confirms."""
    config = shared_bundle.config
    layers = [linear for linear in linears_of(config) if linear.layer is not None]
    rms = {linear.path: np.ones(linear.inputs, np.float32) for linear in layers}
    path = "model.layers.0.mlp.gate_up_proj"
    rms[path] = rms[path].copy()
    rms[path][5] = 64
    made = smoothquant(graph_tensors(shared_bundle.model_path), config, rms)
    after = made.activations(f"{path}.weight", rms[path])
    assert after[5] / np.median(after) < 64**0.5 < rms[path][5]
    other = smoothquant(graph_tensors(shared_bundle.model_path), config, rms, exponent=0.0)
    assert other.activations(f"{path}.weight", rms[path])[5] > after[5]


def test_what_was_done_is_undone(shared_bundle: Bundle, found: Smoothing) -> None:
    tensors = graph_tensors(shared_bundle.model_path)
    smooth = found.apply(tensors)
    changed = 0
    for name in tensors:
        np.testing.assert_allclose(found.revert(name, smooth[name]), tensors[name], rtol=1e-6, atol=1e-12)
        changed += bool((smooth[name] != tensors[name]).any())
    assert changed == len({*found.columns, *found.rows})
    name = "model.layers.0.mlp.down_proj.weight"
    wrong = with_factor(found, name, False, 3, 2 ** (1 / 8))
    assert not np.allclose(wrong.revert(name, smooth[name]), tensors[name], rtol=1e-6)


def rounded(tensors: Mapping[str, Array], scheme: Scheme) -> LazyTensors:
    def one(name: str) -> Array:
        array = tensors[name]
        matrix = name.endswith("_proj.weight")
        return restored(quantize_nearest(array, scheme), scheme) if matrix else array

    return LazyTensors({name: (lambda name=name: one(name)) for name in tensors})


@pytest.mark.parametrize("scheme", [Scheme(bits=8, block_size=32), Scheme(bits=4, block_size=32, zero_points=True)],
                         ids=lambda scheme: scheme.name)  # fmt: skip
def test_factors_are_found_exactly(shared_bundle: Bundle, found: Smoothing, scheme: Scheme) -> None:
    tensors = graph_tensors(shared_bundle.model_path)
    after = rounded(found.apply(tensors), scheme)
    told = smoothing_between(tensors, after, shared_bundle.config, found.exponent)
    for side, wanted in ((told.columns, found.columns), (told.rows, found.rows)):
        assert side.keys() == wanted.keys()
        for name, factors in wanted.items():
            np.testing.assert_array_equal(side[name], factors, err_msg=name)
    # Negative control: a wrong factor is detected.
    name = "model.layers.2.mlp.gate_up_proj.weight"
    wrong = with_factor(found, name, True, -1, 2 ** (1 / 8))
    wrong = with_factor(wrong, "model.layers.2.mlp.down_proj.weight", False, -1, 2 ** (1 / 8))
    told = smoothing_between(tensors, rounded(wrong.apply(tensors), scheme), shared_bundle.config, found.exponent)
    assert told.rows[name][-1] == wrong.rows[name][-1] != found.rows[name][-1]


def test_factors_are_found_behind_more_noise(shared_bundle: Bundle, found: Smoothing) -> None:
    """Factors are recovered with noise of a tenth of each row, as from 4-bit GPTQ. Negative control: noise of a half."""
    tensors = graph_tensors(shared_bundle.model_path)
    smooth, rng = found.apply(tensors), np.random.default_rng(0)

    def noisy(name: str, share: float) -> Array:
        if not name.endswith("_proj.weight"):
            return smooth[name]
        size = share * np.sqrt(np.square(smooth[name]).mean(axis=1, keepdims=True))
        changed: Array = (smooth[name] + size * rng.normal(size=smooth[name].shape)).astype(np.float32)
        return changed

    equal = []
    for share in (0.1, 0.5):
        after = {name: noisy(name, share) for name in smooth}
        told = smoothing_between(tensors, after, shared_bundle.config, found.exponent)
        equal.append(all(np.array_equal(told.rows[name], found.rows[name]) for name in found.rows))
    assert equal == [True, False]


def test_without_smoothing_every_factor_is_1(shared_bundle: Bundle) -> None:
    tensors = graph_tensors(shared_bundle.model_path)
    told = smoothing_between(tensors, rounded(tensors, Scheme(bits=8, block_size=32)), shared_bundle.config, 0.6)
    assert all((factors == 1).all() for side in (told.rows, told.columns) for factors in side.values())
