"""Instrumented runs: the whole graph and single layers compute the same as the bundle, also with replaced weights."""

from pathlib import Path

import numpy as np
import pytest

from slm.core.manifest import Bundle
from slm.core.progress import Silent
from slm.export.graph import FloatFormat, Fused, LazyTensors, build_graph, graph_tensors, save_graph
from slm.export.graph.builder import Array
from slm.quantize.instrumented import InstrumentedLayer, InstrumentedModel, ResidualStream, embedded
from slm.quantize.linears import EMBEDDING, Linear, linears_of
from slm.quantize.statistics import root_mean_squares, second_moments
from slm.quantize.texts import TokenRows
from slm.runtime.decoder import OnnxDecoder

# float32 sums in another order, because onnxruntime does not prepack weights that are inputs.
SAME = 1e-5
ROW = np.random.default_rng(11).integers(0, 320, 50)


def layers_of(bundle: Bundle) -> list[list[Linear]]:
    linears = linears_of(bundle.config)
    return [[linear for linear in linears if linear.layer == i] for i in range(bundle.config.num_hidden_layers)]


def normed(stream: ResidualStream, bundle: Bundle) -> Array:
    x = stream.x if stream.update is None else stream.x + stream.update
    tensors = graph_tensors(bundle.model_path)
    x = x[0] / np.sqrt(np.square(x[0]).mean(axis=-1, keepdims=True) + bundle.config.rms_norm_eps)
    out: Array = x * tensors["model.norm.weight"] @ tensors["model.embed_tokens.weight"].T
    return out


def with_weights(bundle: Bundle, weights: dict[str, Array], out: Path) -> Bundle:
    """Returns a bundle with the same graph and some replaced weights."""
    stored = graph_tensors(bundle.model_path)
    makers = {name: (lambda name=name: weights.get(name.removesuffix(".weight"), stored[name])) for name in stored}
    (out / "onnx").mkdir(parents=True)
    model = build_graph(bundle.config, Fused(FloatFormat()), LazyTensors(makers), bundle.manifest.context)
    save_graph(model, out / "onnx" / "model.onnx")
    return Bundle(out, bundle.manifest, bundle.config)


def test_whole_rows(shared_bundle: Bundle) -> None:
    model = InstrumentedModel(shared_bundle, linears_of(shared_bundle.config)[1:])
    wanted = OnnxDecoder(shared_bundle).logits(ROW[None])[0]
    np.testing.assert_allclose(model.predictions(ROW), wanted, atol=SAME * wanted.std())
    assert np.abs(model.predictions(np.roll(ROW, 1)) - wanted).max() > 1  # the control


def test_layer_after_layer_is_the_model(shared_bundle: Bundle) -> None:
    wanted = OnnxDecoder(shared_bundle).logits(ROW[None])[0]
    (stream,) = embedded(shared_bundle, ROW[None])
    assert stream.update is None
    for i, linears in enumerate(layers_of(shared_bundle)):
        before, stream = stream, InstrumentedLayer(shared_bundle, linears, i).after(ROW, stream, {})
    found = normed(stream, shared_bundle)
    np.testing.assert_allclose(found, wanted, atol=10 * SAME * wanted.std())
    assert np.abs(normed(before, shared_bundle) - wanted).max() > 0.1  # negative control: one layer is missing


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_exchanged_weights_change_what_they_should(shared_bundle: Bundle, tmp_path: Path, layer: int) -> None:
    linears = linears_of(shared_bundle.config)[1:]
    stored = graph_tensors(shared_bundle.model_path)
    model = InstrumentedModel(shared_bundle, linears)
    plain = model.predictions(ROW)
    for linear in (each for each in linears if each.layer == layer):
        weights = {
            linear.path: np.ascontiguousarray(
                stored[f"{linear.path}.weight"] * np.linspace(0.5, 1.5, linear.inputs, dtype=np.float32)
            )
        }
        wanted = OnnxDecoder(with_weights(shared_bundle, weights, tmp_path / linear.path)).logits(ROW[None])[0]
        np.testing.assert_allclose(model.predictions(ROW, weights), wanted, atol=10 * SAME * wanted.std())
        assert np.abs(wanted - plain).max() > 100 * SAME
    np.testing.assert_array_equal(model.predictions(ROW), plain)  # the replacement does not persist


def test_a_layer_with_exchanged_weights(shared_bundle: Bundle, tmp_path: Path) -> None:
    groups, stored = layers_of(shared_bundle), graph_tensors(shared_bundle.model_path)
    path = groups[1][3].path
    weights = {path: np.ascontiguousarray(stored[f"{path}.weight"][:, ::-1])}
    wanted = OnnxDecoder(with_weights(shared_bundle, weights, tmp_path / "changed")).logits(ROW[None])[0]
    (stream,) = embedded(shared_bundle, ROW[None])
    for i, linears in enumerate(groups):
        stream = InstrumentedLayer(shared_bundle, linears, i).after(ROW, stream, weights if i == 1 else {})
    np.testing.assert_allclose(normed(stream, shared_bundle), wanted, atol=10 * SAME * wanted.std())


def test_what_goes_into_products(shared_bundle: Bundle) -> None:
    """Both kinds of runs return the same inputs, and the first product's input is the norm of the embedding."""
    groups = layers_of(shared_bundle)
    linears = [linear for group in groups for linear in group]
    whole = InstrumentedModel(shared_bundle, linears).products_inputs(ROW, [linear.path for linear in linears])
    (stream,) = embedded(shared_bundle, ROW[None])
    for i, group in enumerate(groups):
        instrumented = InstrumentedLayer(shared_bundle, group, i)
        for path, x in instrumented.inputs(ROW, stream).items():
            assert x.shape == (len(ROW), next(linear.inputs for linear in group if linear.path == path))
            np.testing.assert_allclose(x, whole[path], atol=10 * SAME * max(1, np.abs(x).max()))
        stream = instrumented.after(ROW, stream, {})
    tensors, config = graph_tensors(shared_bundle.model_path), shared_bundle.config
    x = tensors[f"{EMBEDDING}.weight"][ROW] * np.float32(config.hidden_size**0.5)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    x = x * tensors["model.layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(whole[groups[0][0].path], x, atol=10 * SAME)


def test_statistics_are_what_the_definitions_give(shared_bundle: Bundle) -> None:
    group = layers_of(shared_bundle)[0]
    text = TokenRows("random", np.random.default_rng(3).integers(0, 320, (3, 20)))
    model = InstrumentedModel(shared_bundle, group)
    paths = [linear.path for linear in group]
    seen = [model.products_inputs(row, paths) for row in text.rows]
    rms = root_mean_squares(model, group, text, Silent())
    moments = second_moments(
        InstrumentedLayer(shared_bundle, group, 0), group, text, embedded(shared_bundle, text.rows)
    )
    for path in paths:
        x = np.concatenate([each[path] for each in seen]).astype(np.float64)
        np.testing.assert_allclose(rms[path], np.sqrt(np.square(x).mean(axis=0)), rtol=1e-5)
        np.testing.assert_allclose(moments[path], x.T @ x, atol=1e-4 * np.abs(x.T @ x).max())
        np.testing.assert_allclose(np.diagonal(moments[path]), rms[path] ** 2 * text.rows.size, rtol=1e-3, atol=1e-6)
