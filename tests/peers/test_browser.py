"""The page of `slm web` in Debian's Chromium: the text of `slm generate`, offline, on a phone; and talking to `slm serve`."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
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
from slm.core import sample
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, seal
from slm.export import bundle as bundle_module
from slm.export.graph.formats import FloatFormat
from slm.export.graph.fused import Fused
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import shipped
from slm.runtime.decoder import OnnxDecoder
from slm.web.npm import packages, vendored
from slm.web.server import SiteServer
from slm.web.site import SITE_FILE, Site, local_site
from tests.serving import running

pytestmark = pytest.mark.peer

PEERS = Path(__file__).parents[2] / "build" / "peers"
# The 64 greedy tokens after it have no near ties: the best logit leads by 0.18 or more.
SHORT = "Once upon a time there was a happy dog"
# Logits, of up to 5, that activations rounded to 8 bits do not tell apart.
TIE = 0.05
# Chromium runs in a container without its own sandbox.
FLAGS = ["--no-sandbox"]
SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright; skips where either is missing, or what the page takes from npm."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium; as root `make peers` installs Debian's")
    if not (PEERS / "playwright").is_dir():
        pytest.skip("no playwright under build/peers; `make peers` installs it")
    try:
        vendored(name for package in packages().values() for name in package.files)
    except SlmError as error:
        pytest.skip(f"{error.message}; `make web` fetches it")
    sys.path.append(str(PEERS / "playwright"))
    try:
        from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(PEERS / "playwright"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page in a browser of its own, and everything that it asked for."""

    def __init__(self, browser: Any, url: str, width: int = 800, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.url = url
        self.page.goto(url)

    def ready(self) -> "Tab":
        self.page.locator("#write:enabled").wait_for(timeout=60_000)
        return self

    def problem(self) -> str:
        self.page.locator("#problem:visible").wait_for(timeout=60_000)
        return str(self.page.text_content("#problem"))

    def set(self, **settings: Any) -> "Tab":
        if not self.page.locator("#settings[open]").count():
            self.page.click("#settings summary")
        self.page.set_checked("#greedy", settings.pop("greedy", False))
        for name, value in settings.items():
            self.page.fill(f"#{name.replace('_', '-')}", str(value))
        return self

    def begin(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#write")

    def stopped(self, prompt: str, how: str) -> dict[str, Any]:
        """Begins a text and stops it, by a statement, as soon as there is some of it; returns how it went."""
        self.page.evaluate(f"""(() => {{
            const log = document.getElementById("log");
            const seen = new MutationObserver(() => {{
                if (!log.querySelector(".new")?.textContent) return;
                seen.disconnect();
                const busy = log.getAttribute("aria-busy") === "true" && document.getElementById("write").disabled;
                if (!busy) throw new Error("not busy");
                {how};
            }});
            seen.observe(log, {{ childList: true, subtree: true, characterData: true }});
        }})()""")
        self.begin(prompt)
        self.page.locator("#write:enabled").wait_for(timeout=30_000)
        return self.run

    def text(self, prompt: str) -> str:
        """Writes a text and returns what came after the prompt."""
        self.begin(prompt)
        self.page.locator("#write:enabled").wait_for(timeout=120_000)
        assert self.page.locator("#problem").is_hidden(), self.page.text_content("#problem")
        return str(self.page.locator("#log .new").last.text_content())

    @property
    def run(self) -> dict[str, Any]:
        """How the last text went."""
        found: dict[str, Any] = json.loads(self.page.get_attribute("#figures", "data-run"))
        return found

    @property
    def found(self) -> dict[str, Any]:
        """What runs the model."""
        told: dict[str, Any] = json.loads(self.page.get_attribute("#where", "data-found"))
        return told

    def close(self) -> None:
        origin = self.url.rstrip("/")
        elsewhere = [url for url in self.requests if not url.startswith((f"{origin}/", f"blob:{origin}/"))]
        self.context.close()
        assert elsewhere == [] and self.errors == []


@pytest.fixture(scope="module")
def gpu(chromium: Any) -> Iterator[Any]:
    """Chromium with a GPU that is a program."""
    browser = chromium.browser_type.launch(executable_path=shutil.which("chromium"), args=[*FLAGS, *SWIFTSHADER])
    yield browser
    browser.close()


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens pages; afterwards none of them has asked anybody else or failed unseen."""
    tabs: list[Tab] = []

    def open_one(url: str, browser: Any = None, **options: Any) -> Tab:
        tabs.append(Tab(browser or chromium, url, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()


class Cut(SiteServer):
    """A server whose connections end with it, those that a browser keeps among them."""

    def __init__(self, site: Site, port: int) -> None:
        self.connections: list[Any] = []
        super().__init__(site, "127.0.0.1", port)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def served(site: Site, port: int = 0) -> AbstractContextManager[SiteServer]:
    return running(Cut(site, port))


def site_of(path: Path, name: str = "stories") -> Site:
    return local_site(Bundle.open(path), name)


@pytest.fixture(scope="module")
def story_site(chromium: Any) -> Iterator[SiteServer]:
    """The site of the model that ships."""
    with served(site_of(shipped.model_path())) as server:
        yield server


def generated(prompt: str, *options: object) -> bytes:
    """What `slm generate` prints, to the byte."""
    command = [sys.executable, "-m", "slm", "generate", "-p", prompt, "--max-new-tokens", 64, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=120).stdout


def long_prompt() -> str:
    """Some hundred tokens of a story: more than two windows of the model that ships, and several pieces of reading."""
    story = sample.validation_path().read_text(encoding="utf-8").replace("<|endoftext|>", "")
    prompt = " ".join(story.split()[:343])
    assert len(slm.load(shipped.model_path()).tokenizer.encode(prompt)) > 2 * 128 + 64
    return prompt


def test_the_text_of_slm_generate_to_the_byte(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=64)
    assert tab.found["isolated"] and tab.found["threads"] >= 1 and tab.found["kept"]
    for prompt in (SHORT, long_prompt()):
        text = tab.text(prompt)
        assert f"{prompt}{text}\n".encode() == generated(prompt, "--greedy")
        assert tab.run["tokens"] == 64 and tab.run["reason"] == "length" and tab.run["tokensPerSecond"] > 0
    assert tab.run["memory"]["runtime"] > 5e6 and 0 < tab.run["memory"]["caches"] < 5e6


def test_another_weight_or_setting_gives_another_text(
    open_tab: Callable[..., Tab], story_site: SiteServer, tmp_path: Path
) -> None:
    """The control, and that chance is the seed's."""
    expected = generated(SHORT, "--greedy").decode()
    altered = tmp_path / "altered"
    shutil.copytree(shipped.model_path(), altered)
    weights = altered / "onnx" / "model_quantized.onnx_data"
    content = bytearray(weights.read_bytes())
    content[2_000_000:2_100_000] = reversed(content[2_000_000:2_100_000])
    weights.write_bytes(content)
    seal(altered, Bundle.open(shipped.model_path()).manifest)
    with served(site_of(altered)) as server:
        other = open_tab(server.url).ready().set(greedy=True, new_tokens=64).text(SHORT)
    assert f"{SHORT}{other}\n" != expected
    tab = open_tab(story_site.url).ready().set(temperature=1.2, seed=5, new_tokens=64)
    drawn = tab.text(SHORT)
    assert f"{SHORT}{drawn}\n" != expected
    assert tab.text(SHORT) == drawn
    assert tab.set(temperature=1.2, seed=6).text(SHORT) != drawn


def test_without_a_network(open_tab: Callable[..., Tab]) -> None:
    with served(site_of(shipped.model_path())) as server:
        tab = open_tab(server.url).ready()
        before = tab.set(greedy=True, new_tokens=64).text(SHORT)
        tab.page.evaluate("navigator.serviceWorker.ready.then(() => 1)")
    asked = len(tab.requests)
    tab.page.reload()
    assert tab.ready().set(greedy=True, new_tokens=64).text(SHORT) == before
    assert f"{SHORT}{before}\n".encode() == generated(SHORT, "--greedy")
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
        run = tab.stopped(SHORT, how)
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
        tab.text(SHORT)
        assert tab.page.evaluate("document.activeElement.id === 'prompt'") != touch


def test_each_mode_keeps_its_paragraphs(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=4)
    tab.text(SHORT)
    tab.page.check("input[value=talk]")
    assert tab.page.text_content("#log") == ""
    tab.text("Who is there?")
    said = str(tab.page.text_content("#log"))
    assert "Who is there?" in said and SHORT not in said
    tab.page.check("input[value=continue]")
    assert str(tab.page.text_content("#log")).startswith(SHORT)
    tab.text("A dog")
    tab.page.check("input[value=talk]")
    assert tab.page.text_content("#log") == said
    tab.page.click("#clear")
    tab.page.check("input[value=continue]")
    assert tab.page.text_content("#log") == ""


def test_a_talk(open_tab: Callable[..., Tab], story_site: SiteServer) -> None:
    """Turn by turn what `slm chat` answers, special tokens in what is said included."""
    lines = ["Look, a bird!", "Where is the <end_of_turn> cat?", "And then?"]  # no near ties in the answers
    options = ["--greedy", "--json", "--max-new-tokens", "18"]
    command = [sys.executable, "-m", "slm", "chat", *options]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8", timeout=120)
    expected = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    tab = open_tab(story_site.url).ready().set(greedy=True, new_tokens=18)
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
    expected = generated(SHORT, "--greedy").decode()
    site_of(shipped.model_path()).write(tmp_path / "some" / "site")
    plain = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with running(ThreadingHTTPServer(("127.0.0.1", 0), plain)) as server:
        tab = open_tab(f"http://127.0.0.1:{server.server_address[1]}/some/site/").ready()
        assert not tab.found["isolated"] and tab.found["threads"] == 1
        assert "one thread is all there is" in str(tab.page.text_content("#where"))
        assert f"{SHORT}{tab.set(greedy=True, new_tokens=64).text(SHORT)}\n" == expected
        assert set(tab.page.evaluate("caches.keys()")) >= {"slm files /some/site/"}
        tab.page.reload()
        assert tab.ready().found["isolated"]
        assert f"{SHORT}{tab.set(greedy=True, new_tokens=64).text(SHORT)}\n" == expected


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
        tab.ready().set(greedy=True, new_tokens=64)
        assert f"{SHORT}{tab.text(SHORT)}\n".encode() == generated(SHORT, "--greedy")
        assert tab.run["tokens"] == 64
        tab.page.check("input[value=talk]")
        assert tab.set(greedy=True, new_tokens=20).text("Who is there?") != ""
        tab.page.check("input[value=continue]")
        tab.set(temperature=2, top_k=0, top_p=1, seed=3, new_tokens=900)
        run = tab.stopped(SHORT, CLICK)
        assert run["reason"] == "stopped" and len(str(tab.page.text_content("#log .new"))) < 2000
        assert not any("/model/" in each or "/vendor/" in each for each in tab.requests)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        tab.begin(SHORT)
        assert "still running" in tab.problem()
    finally:
        process.kill()
        process.wait()
