"""8-bit caches: long steps attend in float32 and round once, short steps attend to the rounded values."""

import numpy as np
import pytest

from slm.core.contract import FEW_TOKENS, SIDES, CacheType
from slm.core.manifest import Bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.cache import KVBuffers, resident_positions
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.memory import Array

IDS = np.random.default_rng(5).integers(0, 320, 60).tolist()
# Both compute the same in float32; sums are added in the same order.
EXACT = 1e-5


@pytest.fixture(scope="module")
def bundles(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[CacheType, Bundle]:
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    home = tmp_path_factory.mktemp("rounded")
    made: dict[CacheType, Bundle] = {}
    for cache in ("int8", "float32"):
        settings = Settings(block_size=32, cache=cache, smooth=False, gate=Gate(None))
        made[cache] = quantize_bundle(shared_bundle, home / cache, text, settings, None, text)[0]
    return made


@pytest.fixture
def bundle(bundles: dict[CacheType, Bundle]) -> Bundle:
    return bundles["int8"]


def cached(decoder: OnnxDecoder, length: int, positions: int) -> list[Array]:
    """Returns the integers of the oldest `positions` positions of global layers, and of those in sliding layers."""
    assert isinstance(decoder.buffers, KVBuffers)
    found = []
    for layer in decoder.bundle.manifest.cache:
        held = resident_positions(layer, length)
        for side in SIDES:
            array = decoder.buffers._buffers[layer.layer, side].read(slice(None), 0, held)  # type: ignore[index]
            assert array.dtype == np.int8
            found.append(array[:, :, : max(0, held - (length - positions))].copy())
    return found


def test_a_long_step_keeps_the_integers_of_earlier_positions(bundle: Bundle) -> None:
    decoder = OnnxDecoder(bundle, threads=1)
    for token in IDS[:8]:
        decoder.read([token])
    before = cached(decoder, 8, 8)
    decoder.read(IDS[8 : 8 + FEW_TOKENS + 1])  # 25 positions: no buffer has moved up
    after = cached(decoder, 8 + FEW_TOKENS + 1, 8)
    assert any(array.any() for array in before)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_long_step_attends_as_with_float32_caches(bundles: dict[CacheType, Bundle]) -> None:
    """With a window of 16, 60 tokens pass it three times."""
    rounded, exact, ones = (OnnxDecoder(bundles[cache], threads=1) for cache in ("int8", "float32", "int8"))
    expected = exact.read_each(IDS)
    np.testing.assert_allclose(rounded.read_each(IDS), expected, atol=EXACT)
    one_by_one = np.array([ones.read([token]) for token in IDS])
    assert np.abs(one_by_one - expected).max() > 100 * EXACT  # negative control: single tokens attend to rounded values


def test_later_long_steps_round_earlier_positions_once(bundles: dict[CacheType, Bundle]) -> None:
    """Three steps of 20 tokens are closer to float32 than single tokens, and not equal to it."""
    several, exact, ones = (OnnxDecoder(bundles[cache], threads=1) for cache in ("int8", "float32", "int8"))
    expected = exact.read_each(IDS)
    in_steps = np.concatenate([several.read_each(IDS[start : start + 20]) for start in range(0, 60, 20)])
    one_by_one = np.array([ones.read([token]) for token in IDS])
    np.testing.assert_allclose(in_steps[:20], expected[:20], atol=EXACT)
    errors = [np.abs(found - expected)[20:].mean() for found in (in_steps, one_by_one)]
    assert EXACT < errors[0] < 0.7 * errors[1]


def test_steps_of_few_tokens_attend_like_single_tokens(bundle: Bundle) -> None:
    """The kernel is the same up to `FEW_TOKENS`, and another one above."""
    few, many, ones = (OnnxDecoder(bundle, threads=1) for _ in range(3))
    expected = [ones.read([token]) for token in IDS[: FEW_TOKENS + 1]]
    assert np.abs(few.read_each(IDS[:FEW_TOKENS]) - expected[:-1]).max() < 1e-5
    assert np.abs(many.read_each(IDS[: FEW_TOKENS + 1]) - expected).max() > 1e-3


def test_a_batch_of_prompts(bundles: dict[CacheType, Bundle]) -> None:
    """Rows without a past take the path of long steps together."""
    rows = np.array([IDS[:24], IDS[24:48]])
    rounded, exact = (OnnxDecoder(bundles[cache], threads=1) for cache in ("int8", "float32"))
    np.testing.assert_allclose(rounded.logits(rows), exact.logits(rows), atol=EXACT)
