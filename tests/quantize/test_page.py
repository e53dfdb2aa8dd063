"""The HTML reports are complete and self-contained, plots stay in their frames, and figures match the measurements."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from slm.core.manifest import Bundle
from slm.core.report_plots import Bar, Point, Range, bars, points, ranges
from slm.quantize.make import quantize_bundle
from slm.quantize.page import report_page
from slm.quantize.results import PAGE_FILE, Report
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from tests.html_pages import checked


def drawn(svg: str) -> ElementTree.Element:
    """Parses a plot and checks that all elements are within its frame."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(value) for value in root.attrib["viewBox"].split())
    for each in root.iter():
        at = each.attrib
        if each.tag == "rect":
            assert 0 <= float(at["x"]) <= float(at["x"]) + float(at["width"]) <= width + 0.1
            assert 0 <= float(at["y"]) <= float(at["y"]) + float(at["height"]) <= height
        elif each.tag == "text":
            letters = len(each.text or "") * 6
            left = float(at["x"]) - {"start": 0, "middle": letters / 2, "end": letters}[at["text-anchor"]]
            assert left >= -1 and left + letters <= width + 1 and 0 < float(at["y"]) <= height, each.text
        elif each.tag == "circle":
            assert 4 <= float(at["cx"]) <= width - 4 and 4 <= float(at["cy"]) <= height - 4
    return root


@pytest.fixture(scope="module")
def made(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Report]:
    text, calibration = (TokenRows("random", np.random.default_rng(seed).integers(0, 320, (4, 60))) for seed in (5, 6))
    settings = Settings(precision="int4", smooth=True, gate=Gate(None))
    return quantize_bundle(shared_bundle, tmp_path_factory.mktemp("page") / "int4", text, settings, None, calibration)


def test_the_page_of_a_quantization(made: tuple[Bundle, Report]) -> None:
    bundle, report = made
    assert PAGE_FILE in bundle.manifest.files  # sealed like the other files
    page = (bundle.path / PAGE_FILE).read_text(encoding="utf-8")
    assert page == report_page(report)
    text = checked(page).text
    for figure in (
        f"{report.change.kl_nats:.5f} nats",
        f"{report.change.perplexity_after:.3f}",
        f"{report.speeds.decode_ratio:.2f} ×",
        report.in_words,
        *report.parts,
        *[each.path for each in report.tensors],
        "Sensitivity by layer",
    ):
        assert figure in text, figure
    plots = [drawn(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(plots) == 1 + 4 + 4  # sizes; signal-to-noise ratio and sensitivity of each kind of product
    layers = bundle.config.num_hidden_layers
    assert [len(plot.findall("rect")) for plot in plots] == [4, *[layers] * 8]
    # The height of a bar is proportional to its value.
    for kind, plot in zip(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), plots[1:5], strict=True):
        values = [each.snr_db for each in report.tensors if each.path.endswith(f".{kind}")]
        heights = [float(bar.attrib["height"]) for bar in plot.findall("rect")]
        np.testing.assert_allclose(np.array(heights) / heights[0], np.array(values) / values[0], rtol=0.01)  # type: ignore[operator]


def test_settings_are_words(made: tuple[Bundle, Report]) -> None:
    """Not the fields of `report.json`: counts of products, times and a refinement are different things."""
    refinement = {"tokens": 65536, "held_back": 2048, "kl_before": 0.04, "kl_after": 0.03, "kept": True}
    settings = {
        "products": {"int4": 3},
        "attention_us": {"float32": 12.3, "int8": 8.1},
        "refinement": refinement,
        "smoothing": None,
        "target_bytes": 110_000_000,
    }
    text = checked(report_page(replace(made[1], settings=settings))).text
    for words in (
        "3 × int4",
        "12 µs with float32 caches, 8 µs with int8 caches",
        "65,536 tokens; KL divergence 0.0400 nats before and 0.0300 after, on 2,048 held-back tokens; kept the refined weights",
        "none",
        "110,000,000",
    ):
        assert words in text, words
    settings["refinement"] = refinement | {"kept": False}
    assert "kept the earlier weights" in report_page(replace(made[1], settings=settings))


def test_without_harm_there_is_no_such_part(made: tuple[Bundle, Report]) -> None:
    report = made[1]
    plain = replace(report, tensors=tuple(replace(each, harm_nats=None) for each in report.tensors))
    page = report_page(plain)
    assert "Sensitivity by layer" not in checked(page).text and len(re.findall("<svg", page)) == 5


def test_names_do_no_harm(made: tuple[Bundle, Report]) -> None:
    page = report_page(replace(made[1], source='<script>alert("x")</script>'))
    assert "<script>" not in checked(page).text.replace("<script>alert", "") or "script" not in checked(page).tags
    assert "&lt;script&gt;" in page


def test_bars() -> None:
    root = drawn(bars([Bar("0", 10.0, "ten"), Bar("1", None, "nothing"), Bar("2", 5.0, "five")], "some"))
    first, second = root.findall("rect")
    assert float(first.attrib["height"]) == pytest.approx(2 * float(second.attrib["height"]), abs=0.2)
    assert float(second.attrib["x"]) > float(first.attrib["x"]) + 2 * float(first.attrib["width"])  # the gap
    drawn(bars([Bar(str(i), 0.0, "") for i in range(96)], "many, all of them 0"))
    drawn(bars([], "none"))


def test_ranges() -> None:
    values = [Range("…" + "m" * 36, 1.0, 0.5, 1.0, "100.0% (50.0 to 100.0)"), Range("b <", 0.0, 0.0, 0.0, "0.0%")]
    root = drawn(ranges(values, "scores"))
    first, second = (each for each in root if each.tag == "rect")
    full = 392.0
    assert float(first.attrib["x"]) == pytest.approx(4 + full / 2) and float(first.attrib["width"]) == full / 2
    assert float(second.attrib["width"]) == 1.0  # visible, although it is empty
    assert [float(each.attrib["cx"]) for each in root if each.tag == "circle"] == [396.0, 4.0]


def test_points() -> None:
    given = [
        Point("1", 3.0, 0.1, True, "a"),
        Point("2", 4.0, 0.001, True, "b"),
        Point("3", 3.001, 0.1, False, "beside the first"),
        Point("4", 5.0, 0.0, False, "no divergence at all"),
    ]
    root = drawn(points(given, "MB", "nats", "some"))
    at = {each[0].text: (float(each.attrib["cx"]), float(each.attrib["cy"])) for each in root.findall("circle")}
    assert at["a"][0] < at["b"][0] < at["no divergence at all"][0] and at["a"][1] < at["b"][1]
    assert at["no divergence at all"][1] >= at["b"][1]
    labels = [each.text for each in root.findall("text")]
    assert "3, 1" in labels and "2" in labels  # overlapping points share a label
    assert len(root.findall("polyline")) == 1
    drawn(points([Point("1", 3.0, 0.1, True, "alone")], "MB", "nats", "one"))
    drawn(points([], "MB", "nats", "none"))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_axes_at_any_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    for spread in (1e-3, 1.0, 10.0):
        ys = scale * np.exp(spread * rng.normal(size=20))
        given = [
            Point(str(i), scale * (1 + spread * float(rng.random())), float(y), False, "") for i, y in enumerate(ys)
        ]
        drawn(points(given, "x", "y", "some"))
        drawn(bars([Bar(str(i), float(y), "") for i, y in enumerate(ys)], "some"))


def test_a_page_can_be_copied_away(made: tuple[Bundle, Report], tmp_path: Path) -> None:
    page = (made[0].path / PAGE_FILE).read_text(encoding="utf-8")
    assert str(made[0].path) not in page and str(tmp_path.parent) not in page
