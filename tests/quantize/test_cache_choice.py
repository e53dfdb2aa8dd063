"""The type of caches is chosen by a measurement of attention."""

from pathlib import Path

import numpy as np
import pytest

from slm.core.contract import CacheType
from slm.core.manifest import Bundle
from slm.quantize import cache_choice, decide
from slm.quantize.cache_choice import attention_times, faster
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows

TEXT = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))


def test_times_of_both_types(shared_bundle: Bundle, tmp_path: Path) -> None:
    times = attention_times(shared_bundle, tmp_path)
    assert set(times) == {"float32", "int8"}
    assert all(0 < seconds < 1 for seconds in times.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("int8", "chosen"), [(0.5, "int8"), (0.94, "int8"), (0.99, "float32"), (2.0, "float32")])
def test_int8_must_be_clearly_faster(int8: float, chosen: CacheType) -> None:
    assert faster({"float32": 1.0, "int8": int8}) == chosen


@pytest.mark.parametrize(
    ("settings", "int8", "chosen"),
    [
        ({}, 0.5, "int8"),
        ({}, 2.0, "float32"),
        ({"cache": "float32"}, None, "float32"),  # None: nothing is measured
        ({"prefer": "quality"}, None, "float32"),
        ({"prefer": "speed"}, None, "int8"),
    ],
    ids=str,
)
def test_the_measurement_decides_and_is_recorded(
    shared_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    int8: float | None,
    chosen: str,
) -> None:
    def measured(source: Bundle, scratch: Path) -> dict[CacheType, float]:
        assert int8 is not None
        return {"float32": 1e-3, "int8": int8 * 1e-3}

    monkeypatch.setattr(decide, "attention_times", measured)
    given = Settings(smooth=False, gate=Gate(None), **settings)  # type: ignore[arg-type]
    bundle, report = quantize_bundle(shared_bundle, tmp_path / "made", TEXT, given, None, TEXT)
    assert {layer.dtype for layer in bundle.manifest.cache} == {chosen}
    assert report.settings["cache"] == chosen
    expected = None if int8 is None else {"float32": 1000.0, "int8": 1000.0 * int8}
    assert report.settings.get("attention_us") == expected
    assert cache_choice.TYPES == ("float32", "int8")
