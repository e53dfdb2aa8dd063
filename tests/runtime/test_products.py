"""8-bit products on CPUs that add two of them in 16 bits: the trial of the CPU, and older bundles without the limit."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from slm.cli.sampling import warn_of_saturation
from slm.core.grid import PAIR_LIMIT, pair_sums
from slm.core.manifest import Bundle
from slm.export.graph import graph_tensors
from slm.quantize import plan
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import products, session
from slm.runtime.decoder import OnnxDecoder

Rows = np.ndarray


@pytest.fixture(scope="module")
def rows(shared_bundle: Bundle) -> Rows:
    found: Rows = np.random.default_rng(5).integers(0, shared_bundle.config.vocab_size, (4, 60))
    return found


def dynamic(source: Bundle, out: Path, rows: Rows) -> Bundle:
    settings = Settings(dynamic=True, smooth=False, cache="float32", gate=Gate(None))
    return quantize_bundle(source, out, TokenRows("random", rows), settings, None, TokenRows("random", rows))[0]


@pytest.fixture(scope="module")
def older(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> Bundle:
    """A bundle as older versions wrote it."""
    layer = plan.INT8_DYNAMIC.layer.model_copy(update={"reduced": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "INT8_DYNAMIC", plan.replace(plan.INT8_DYNAMIC, layer=layer))
        return dynamic(shared_bundle, tmp_path_factory.mktemp("older") / "b", rows)


def test_the_trial_is_a_product_of_extremes() -> None:
    model = onnx.load_from_string(products.product_of_extremes())
    onnx.checker.check_model(model, full_check=True)
    x = np.full((2, 64), 255, np.uint8)
    (sums,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert sums.tolist() == [[64 * 255 * 127]] * 2
    assert 2 * 255 * 127 > (1 << 15) - 1  # a sum of two products in 16 bits would saturate


@pytest.mark.parametrize(("sums", "saturate"), [(64 * 255 * 127, False), (32 * ((1 << 15) - 1), True)])
def test_the_trial_tells_whether_products_saturate(monkeypatch: pytest.MonkeyPatch, sums: int, saturate: bool) -> None:
    class Session:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert feeds["x"].min() == 255
            return [np.array([[sums]], np.int32)]

    monkeypatch.setattr(products.ort, "InferenceSession", Session)
    assert products.products_saturate.__wrapped__() is saturate


def test_an_older_bundle_is_rounded_again(older: Bundle, monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    exact = OnnxDecoder(older, threads=1).logits(rows) if not products.products_saturate() else None
    monkeypatch.setattr(products, "products_saturate", lambda: True)
    limited = products.limited_weights(older)
    stored = graph_tensors(older.model_path)
    assert len(limited) == 2 * 16 and limited.keys() <= stored.keys()
    above = 0
    for name, value in limited.items():
        assert value.dtype == stored[name].dtype and value.shape == stored[name].shape
        if name.endswith("weight_quantized"):
            above += pair_sums(stored[name].T.astype(int)).max() > PAIR_LIMIT
            assert pair_sums(value.T.astype(int)).max() <= PAIR_LIMIT
            scales = name.replace("weight_quantized", "weight_scale")
            before, after = stored[name] * stored[scales], value * limited[scales]
            assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)
    assert above  # the control: the file's weights are above the limit
    found = OnnxDecoder(older, threads=1).logits(rows)
    if exact is not None:
        assert 0 < np.abs(found - exact).max() < 0.5 * exact.std()


def test_the_command_line_warns_of_it(
    older: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for saturate, warned in ((False, False), (True, True)):
        monkeypatch.setattr(products, "products_saturate", lambda: saturate)  # noqa: B023
        warn_of_saturation(OnnxDecoder(older, threads=1))
        said = capsys.readouterr().err
        assert ("warning: the 8-bit products of this bundle would saturate" in said) == warned


def test_replaced_weights_are_those_that_are_multiplied(
    older: Bundle, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    """With all scales of zero, every token has the same logits whatever came before it."""
    monkeypatch.setattr(products, "products_saturate", lambda: True)
    zeros = {name: 0 * value for name, value in products.limited_weights(older).items()}
    monkeypatch.setattr(session, "limited_weights", lambda bundle: zeros)
    logits = OnnxDecoder(older, threads=1).logits(np.stack([rows[0], rows[0][::-1]]))
    np.testing.assert_allclose(logits[0], logits[1][::-1], atol=1e-4)


def test_a_new_bundle_is_opened_as_it_is(
    shared_bundle: Bundle, tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = dynamic(shared_bundle, tmp_path / "b", rows)
    before = OnnxDecoder(bundle, threads=1).logits(rows)
    monkeypatch.setattr(products, "products_saturate", lambda: True)
    assert not products.saturates(bundle) and products.limited_weights(bundle) == {}
    np.testing.assert_array_equal(OnnxDecoder(bundle, threads=1).logits(rows), before)
    schemes = bundle.manifest.quantization.schemes.values()  # type: ignore[union-attr]
    assert sum(scheme.reduced for scheme in schemes) == sum(scheme.dynamic for scheme in schemes) == 16
    stored = graph_tensors(bundle.model_path)
    for name in stored:
        if name.endswith("weight_quantized") and stored[name].dtype == np.int8:
            assert pair_sums(stored[name].T.astype(int)).max() <= PAIR_LIMIT


def test_other_bundles_need_no_trial(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "products_saturate", lambda: pytest.fail("tried"))
    assert not products.saturates(shared_bundle)
