"""The page of `slm web` in Debian's Chromium: the text of `slm generate`, offline, on a phone; and talking to `slm serve`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import slm
from slm.core import manifest as manifest_module
from slm.core.manifest import Bundle, seal
from slm.export import bundle as bundle_module
from slm.export.graph.formats import FloatFormat
from slm.export.graph.fused import Fused
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import shipped
from slm.runtime.decoder import OnnxDecoder
from slm.web.server import SiteServer
from slm.web.site import SITE_FILE
from tests.peers.pages import (
    ANSWER_TOKENS,
    NEW_TOKENS,
    Tab,
    generated,
    long_prompt,
    served,
    short_prompt,
    site_of,
    talk,
)
from tests.serving import running

pytestmark = pytest.mark.peer

# Logits, of up to 5, that activations rounded to 8 bits do not tell apart.
TIE = 0.05


def test_the_text_of_slm_generate_to_the_byte(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=NEW_TOKENS)
    assert tab.found["isolated"] and tab.found["threads"] >= 1 and tab.found["kept"]
    for prompt in (short_prompt(), long_prompt()):
        text = tab.text(prompt)
        assert f"{prompt}{text}\n".encode() == generated(prompt, "--greedy")
        assert tab.run["tokens"] == NEW_TOKENS and tab.run["reason"] == "length" and tab.run["tokensPerSecond"] > 0
    assert tab.run["memory"]["runtime"] > 5e6 and 0 < tab.run["memory"]["caches"] < 5e6


def test_another_weight_or_setting_gives_another_text(
    open_tab: Callable[..., Tab], story_site: SiteServer, tmp_path: Path
) -> None:
    """The control, and that chance is the seed's."""
    expected = generated(short_prompt(), "--greedy").decode()
    altered = tmp_path / "altered"
    shutil.copytree(shipped.model_path(), altered)
    weights = altered / "onnx" / "model_quantized.onnx_data"
    content = bytearray(weights.read_bytes())
    content[2_000_000:2_100_000] = reversed(content[2_000_000:2_100_000])
    weights.write_bytes(content)
    seal(altered, Bundle.open(shipped.model_path()).manifest)
    with served(site_of(altered)) as server:
        other = open_tab(server.url).ready().set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt())
    assert f"{short_prompt()}{other}\n" != expected
    tab = open_tab(story_site.url).ready().set(temperature=1.2, seed=5, new_tokens=NEW_TOKENS)
    drawn = tab.text(short_prompt())
    assert f"{short_prompt()}{drawn}\n" != expected
    assert tab.text(short_prompt()) == drawn
    assert tab.set(temperature=1.2, seed=6).text(short_prompt()) != drawn


def test_without_a_network(open_tab: Callable[..., Tab]) -> None:
    with served(site_of(shipped.model_path())) as server:
        tab = open_tab(server.url).ready()
        before = tab.set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt())
        tab.page.evaluate("navigator.serviceWorker.ready.then(() => 1)")
    asked = len(tab.requests)
    tab.page.reload()
    assert tab.ready().set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt()) == before
    assert f"{short_prompt()}{before}\n".encode() == generated(short_prompt(), "--greedy")
    assert not any("/model/" in url or url.endswith(".wasm") for url in tab.requests[asked:])
    tab.page.click("#remove")
    tab.page.locator("#kept", has_text="stored files are deleted").wait_for()
    assert tab.page.evaluate("caches.keys()") == []
    with pytest.raises(Exception, match="ERR_CONNECTION_REFUSED"):  # the control: there is nobody
        tab.page.reload()


CLICK = "document.getElementById('stop').click()"
ESCAPE = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))"


def test_the_stop_button_and_the_keys(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url).ready().set(temperature=2, seed=1, top_k=0, top_p=1, new_tokens=900)
    for how in (CLICK, ESCAPE):
        run = tab.stopped(short_prompt(), how)
        assert run["reason"] == "stopped" and 0 < run["tokens"] < 100
    tab.page.fill("#prompt", long_prompt())
    tab.page.press("#prompt", "Control+Enter")  # and it goes on writing afterwards
    tab.page.locator("#log .new", has_text=re.compile(r"\w{3}")).wait_for()
    tab.page.keyboard.press("Escape")


def test_a_phone(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    for scheme in ("light", "dark"):
        tab = open_tab(story_site.url, width=360, color_scheme=scheme, reduced_motion="reduce").ready().set(greedy=True)
        tab.text("W" * 200)
        assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= 360
        small = """[...document.querySelectorAll("button, summary")].filter((each) => each.checkVisibility())
            .map((each) => each.getBoundingClientRect()).filter((box) => box.height < 40 || box.right > 360).length"""
        assert tab.page.evaluate(small) == 0
        unnamed = """[...document.querySelectorAll("input, textarea, select, progress")]
            .filter((each) => !each.labels.length).map((each) => each.id)"""
        assert tab.page.evaluate(unnamed) == []


def test_a_touch_screen(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    """Names no keys, and does not open the keyboard over an answer; a desktop returns to the field."""
    for touch in (True, False):
        tab = (
            open_tab(story_site.url, width=390, has_touch=touch, is_mobile=touch).ready().set(greedy=True, new_tokens=4)
        )
        assert tab.page.locator("#keys").is_visible() != touch
        tab.text(short_prompt())
        assert tab.page.evaluate("document.activeElement.id === 'prompt'") != touch


def test_each_mode_keeps_its_paragraphs(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=4)
    tab.text(short_prompt())
    tab.page.check("input[value=talk]")
    assert tab.page.text_content("#log") == ""
    tab.text("Who is there?")
    said = str(tab.page.text_content("#log"))
    assert "Who is there?" in said and short_prompt() not in said
    tab.page.check("input[value=continue]")
    assert str(tab.page.text_content("#log")).startswith(short_prompt())
    tab.text("A dog")
    tab.page.check("input[value=talk]")
    assert tab.page.text_content("#log") == said
    tab.page.click("#clear")
    tab.page.check("input[value=continue]")
    assert tab.page.text_content("#log") == ""


def test_a_talk(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    """Turn by turn what `slm chat` answers, special tokens in what is said included."""
    lines = talk()
    options = ["--greedy", "--json", "--max-new-tokens", str(ANSWER_TOKENS)]
    command = [sys.executable, "-m", "slm", "chat", *options]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8", timeout=120)
    expected = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=ANSWER_TOKENS)
    tab.page.check("input[value=talk]")
    assert "trained on plain text" in str(tab.page.text_content("#note"))
    assert [tab.text(line) for line in lines] == expected and len(expected) == 3
    tab.page.click("#clear")
    assert tab.text(lines[0]) == expected[0]


def test_what_was_altered_on_the_way_is_refused(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    site = site_of(shipped.model_path())
    assert site.files  # which fixes what site.json says
    name = "model/onnx/model_quantized.onnx_data"
    content = bytearray(site.read(name))
    content[1_000_000] ^= 1
    for broken, message in ((bytes(content), "was altered"), (bytes(content[:-1]), "bytes instead of")):
        site.files[name] = broken
        with served(site) as server:
            tab = open_tab(server.url)
            said = tab.problem()
            assert said.startswith(name) and message in said and "reload" in said
            assert tab.page.locator("#load:visible").count() == 1 and tab.page.locator("#write").is_disabled()
    del site.files[name]
    with served(site) as server:
        tab = open_tab(server.url)
        assert "(404)" in tab.problem()
        site.files[name] = site.contents[name]
        tab.page.click("#load")
        tab.ready()
    site.files[SITE_FILE] = site.read(SITE_FILE)[:-5]
    with served(site) as server:
        assert open_tab(server.url).problem().startswith("site.json is damaged: make the site again")


def test_a_newer_site_is_offered(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    with served(site_of(shipped.model_path(), "old")) as server:
        tab = open_tab(server.url).ready()
        tab.page.evaluate("navigator.serviceWorker.ready.then(() => 1)")
        port = server.server_address[1]
    with served(site_of(shipped.model_path(), "new"), port):
        tab.page.reload()
        tab.page.wait_for_function("document.title === 'old · slm'", timeout=20_000)  # what it has works at once
        tab.page.click("#renew", timeout=20_000)
        tab.page.locator("#name", has_text="new").wait_for(timeout=20_000)
        tab.ready()
        assert len(tab.page.evaluate("caches.keys()")) == 2  # the page's and the files'


def test_a_host_without_headers(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    """What --out writes, in a directory of a plain file server: one thread at first, and it says so.

    From the second time on the service worker gives the page the headers that it lacks.
    """
    expected = generated(short_prompt(), "--greedy").decode()
    site_of(shipped.model_path()).write(tmp_path / "some" / "site")
    plain = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with running(ThreadingHTTPServer(("127.0.0.1", 0), plain)) as server:
        tab = open_tab(f"http://127.0.0.1:{server.server_address[1]}/some/site/").ready()
        assert not tab.found["isolated"] and tab.found["threads"] == 1
        assert "one thread is all there is" in str(tab.page.text_content("#where"))
        assert f"{short_prompt()}{tab.set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt())}\n" == expected
        assert set(tab.page.evaluate("caches.keys()")) >= {"slm files /some/site/"}
        tab.page.reload()
        assert tab.ready().found["isolated"]
        assert f"{short_prompt()}{tab.set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt())}\n" == expected


@pytest.mark.parametrize(
    "name", ["float32", "int8", "int8 caches", "int4", "portable", "portable int8", "portable int4"]
)
def test_other_bundles(open_tab: Callable[..., Tab], bundles: Any, name: str, tmp_path: Path) -> None:
    """With 8-bit weights as they are with activations in floats: WebAssembly's products round them to 16 bits at most.

    With 4-bit weights each token is one that onnxruntime finds as likely as any, up to a tie: random weights make many.
    """
    if name == "int4":
        text = TokenRows("random", np.random.default_rng(0).choice(np.arange(32, 127), (4, 60)))
        settings = Settings(gate=Gate(None), precision="int4", prefer="size")
        path = quantize_bundle(bundles.bundles["float32"], tmp_path / "int4", text, settings, None, text)[0].path
    else:
        path = bundles.path(name)
    model = slm.load(path)
    if name.startswith("int8"):
        model = slm.load(float_activations(path, tmp_path / "exact"), trust=True)
    elif name.startswith("portable int"):
        model.decoder = OnnxDecoder(Bundle.open(path), optimize=False)
    with served(site_of(path)) as server:
        tab = open_tab(server.url).ready().set(greedy=True, new_tokens=60)
        for prompt in ("Once", "Once upon a time there was a dog and it was"):
            text = tab.text(prompt)
            if name != "int4":
                assert text == model.generate(prompt, max_new_tokens=60, temperature=0)
                continue
            ids = [*model.tokenizer.encode(prompt), *tab.run["ids"]]
            logits = model.decoder.logits(np.array([ids], np.int64))[0, -len(tab.run["ids"]) - 1 : -1]
            behind = logits.max(axis=1) - logits[np.arange(len(logits)), tab.run["ids"]]
            assert tab.run["ids"] and behind.max() < TIE


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_bundle_for_webgpu(
    open_tab: Callable[..., Tab],
    bundles: Any,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Any,
) -> None:
    """In float32, on a GPU that is a program (SwiftShader), with caches that stay there; it has no numbers of 16 bits.

    So in float16, as such bundles are written, the processor does it.
    """
    if precision == "float32":

        def operators(*_: Any) -> Fused:
            made = Fused(FloatFormat(), "webgpu", "float32")
            made.dtype = ir.DataType.FLOAT
            return made

        monkeypatch.setattr(bundle_module, "_operators", operators)
        monkeypatch.setattr(bundle_module, "prove", lambda *_: None)
        monkeypatch.setattr(manifest_module, "_check_graph", lambda *_: None)  # slm writes no such graph
    exported = bundle_module.export_bundle(
        bundles.home / "checkpoint", tmp_path / "webgpu", bundle_module.ExportOptions(device="webgpu")
    )
    if precision == "float32":
        seal(exported.path, exported.manifest.model_copy(update={"precision": "float32"}))
    with served(site_of(exported.path)) as server:
        tab = open_tab(server.url, browser=gpu).ready().set(greedy=True, new_tokens=40)
        assert tab.found["device"] == {"float32": "WebGPU", "float16": "WebAssembly"}[precision]
        assert ("the GPU has no float16" in str(tab.page.text_content("#where"))) == (precision == "float16")
        model = slm.load(bundles.path("float32") if precision == "float32" else exported.path)
        for prompt in ("Once", "Once upon a time there was a dog and it was"):
            assert tab.text(prompt) == model.generate(prompt, max_new_tokens=40, temperature=0)


def float_activations(path: Path, copy: Path) -> Path:
    """Copies a bundle and has its products round no activations."""
    shutil.copytree(path, copy)
    bundle = Bundle.open(copy)
    graph = onnx.load(bundle.model_path, load_external_data=False)
    levels = [each for node in graph.graph.node for each in node.attribute if each.name == "accuracy_level"]
    assert levels
    for level in levels:
        level.i = 0
    onnx.save(graph, bundle.model_path)
    seal(copy, bundle.manifest)
    return copy


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_page_of_slm_serve(open_tab: Callable[..., Tab], key: str | None) -> None:
    """It asks the server, wants its key, and fetches nothing of a model."""
    command = [sys.executable, "-m", "slm", "serve", "--port", "0", "--name", "stories"]
    environment = os.environ | {"COLUMNS": "200"} | ({} if key is None else {"SLM_API_KEYS": key})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (http\S+/)v1", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        tab = open_tab(url)
        if key is not None:
            assert "requires an API key" in str(tab.page.locator("#where", has_text="key").text_content())
            tab.page.fill("#key", "wrong")
            tab.page.press("#key", "Tab")
            assert "missing or wrong" in tab.problem()
            tab.page.fill("#key", key)
            tab.page.press("#key", "Tab")
        tab.ready().set(greedy=True, new_tokens=NEW_TOKENS)
        assert f"{short_prompt()}{tab.text(short_prompt())}\n".encode() == generated(short_prompt(), "--greedy")
        assert tab.run["tokens"] == NEW_TOKENS
        tab.page.check("input[value=talk]")
        assert tab.set(greedy=True, new_tokens=20).text("Who is there?") != ""
        tab.page.check("input[value=continue]")
        tab.set(temperature=2, top_k=0, top_p=1, seed=3, new_tokens=900)
        run = tab.stopped(short_prompt(), CLICK)
        assert run["reason"] == "stopped" and len(str(tab.page.text_content("#log .new"))) < 2000
        assert not any("/model/" in each or "/vendor/" in each for each in tab.requests)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        tab.begin(short_prompt())
        assert "still running" in tab.problem()
    finally:
        process.kill()
        process.wait()
