"""The page's benchmark in Chromium."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from slm.web.server import SiteServer
from tests.peers.pages import Tab, served, site_of

pytestmark = pytest.mark.peer


def results(tab: Tab) -> dict[str, Any]:
    tab.page.click("#bench-start")
    tab.page.locator("#bench-status", has_text="Done.").wait_for(timeout=120_000)
    found: dict[str, Any] = json.loads(tab.page.input_value("#bench-json"))
    return found


def test_the_benchmark_on_a_phone(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url, width=360, permissions=["clipboard-read", "clipboard-write"]).ready()
    tab.page.click("#measure")
    tab.page.locator("#bench-start:visible").wait_for()
    for usual in ("#ask", "#settings", "#figures", "#log"):
        assert tab.page.locator(usual).is_hidden()
    found = results(tab)
    assert found["slm_bench"] == 1 and found["model"]["name"] == "stories" and found["isolated"]
    assert "Chrome" in found["browser"] and found["processors"] >= 1 and found["gpu"] is None
    (result,) = found["results"]
    assert result["backend"] == "WebAssembly" and result["threads"] >= 1 and result["load_ms"] > 0
    assert len(result["tokens_per_s"]) == len(result["ttft_ms"]) == 3 and min(result["tokens_per_s"]) > 1
    assert result["memory_bytes"] > 5e6 and result["from_store"]
    row = str(tab.page.locator("#bench-table tr").nth(1).inner_text())
    assert row.startswith("WebAssembly, ") and " ms" in row and " MB" in row
    assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    tab.page.click("#bench-copy")
    tab.page.locator("#bench-status", has_text="Copied").wait_for()
    assert json.loads(tab.page.evaluate("navigator.clipboard.readText()")) == found
    tab.page.click("text=Back to the model")
    tab.ready()


def test_stopping_the_benchmark(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(f"{story_site.url}?bench")
    tab.url = story_site.url
    tab.page.click("#bench-start")
    tab.page.click("#bench-stop")
    tab.page.locator("#bench-status", has_text="Stopped.").wait_for(timeout=30_000)
    assert tab.page.locator("#bench-start:enabled").count() == 1
    assert len(results(tab)["results"][0]["tokens_per_s"]) == 3


def test_backends_that_are_missing_are_named(
    open_tab: Callable[..., Tab],
    bundles: Any,
    tmp_path: Any,
    gpu: Any,
) -> None:
    """A bundle for a GPU with float16, in a browser with a GPU that has none."""
    from slm.export.bundle import ExportOptions, export_bundle

    made = export_bundle(bundles.home / "checkpoint", tmp_path / "webgpu", ExportOptions(device="webgpu"))
    with served(site_of(made.path)) as server:
        tab = open_tab(f"{server.url}?bench", browser=gpu)
        tab.url = server.url
        found = results(tab)
        processor, graphics = found["results"]
        assert processor["engine"] == "onnxruntime-web" and len(processor["tokens_per_s"]) == 3
        # Chromium without its flags offers its software GPU, or none.
        assert graphics["problem"] in (
            "this browser offers no GPU (WebGPU)",
            "the GPU has no float16, which the model needs",
        )
        assert found["gpu"]["float16"] is False and found["gpu"]["architecture"] == "swiftshader"
