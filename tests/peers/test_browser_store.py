"""Downloads of the page in Chromium: interrupted, damaged, without room, in two tabs, and removed."""

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from slm.core.manifest import Bundle, seal
from slm.runtime import shipped
from slm.web.server import SiteServer, _Handler
from slm.web.site import Site, local_site
from tests.peers.pages import NEW_TOKENS, Tab, generated, short_prompt
from tests.serving import running

pytestmark = pytest.mark.peer

WEIGHTS = "model/onnx/model_quantized.onnx_data"
# Bytes that make the shipped bundle's weights so large that the page asks before it loads them.
PADDING = 40_000_000
# Seconds for each MB of the weights from a slow server.
SLOW_S = 0.1


class Unreliable(SiteServer):
    """A server that closes connections within the weights, counts ranges, and knows no ranges if it is told so."""

    def __init__(self, site: Site) -> None:
        self.cut_after: list[int] = []  # bytes after which the next answers with weights end
        self.asked: list[str | None] = []  # the ranges of weights that were asked for
        self.ranges = True
        self.seconds = 0.0  # for each MB of weights
        super().__init__(site, "127.0.0.1", 0)
        self.RequestHandlerClass = Cutting


class Cutting(_Handler):
    server: Unreliable

    def do_GET(self) -> None:
        if self.path != f"/{WEIGHTS}":
            super().do_GET()
            return
        self.server.asked.append(self.headers.get("Range"))
        if not self.server.ranges:
            del self.headers["Range"]
        whole, left = self.wfile, self.server.cut_after.pop(0) if self.server.cut_after else 1 << 40
        seconds = self.server.seconds

        class Counting:
            def write(self, content: bytes) -> None:
                nonlocal left
                if content.startswith(b"HTTP/1.1"):
                    whole.write(content)
                    return
                time.sleep(seconds)
                whole.write(content[:left])
                left -= len(content)
                if left <= 0:
                    raise ConnectionAbortedError

            def flush(self) -> None:
                whole.flush()

        self.wfile = Counting()  # type: ignore[assignment]
        try:
            super().do_GET()
        finally:
            self.wfile = whole


def unreliable(site: Site) -> AbstractContextManager[Unreliable]:
    return running(Unreliable(site))


@pytest.fixture(scope="module")
def large_site(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site of the model that ships, with more bytes after its weights, which nothing reads."""
    path = tmp_path_factory.mktemp("large") / "bundle"
    shutil.copytree(shipped.model_path(), path)
    with (path / WEIGHTS.removeprefix("model/")).open("ab") as file:
        file.write(bytes(range(256)) * (PADDING // 256))
    seal(path, Bundle.open(shipped.model_path()).manifest)
    return local_site(Bundle.open(path), "large")


def keys(tab: Tab) -> list[str]:
    """The entries of the page's store."""
    found = tab.page.evaluate("""(async () => {
        const found = [];
        for (const name of await caches.keys()) {
            if (!name.startsWith("slm files")) continue;
            for (const { url } of await (await caches.open(name)).keys()) found.push(new URL(url).pathname);
        }
        return found;
    })()""")
    return list(map(str, found))


def works(tab: Tab) -> bool:
    text = tab.ready().set(greedy=True, new_tokens=NEW_TOKENS).text(short_prompt())
    return f"{short_prompt()}{text}\n".encode() == generated(short_prompt(), "--greedy")


def test_a_connection_that_breaks_is_continued(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        server.cut_after = [9_000_000, 5_000_000]
        tab = open_tab(server.url)
        tab.page.click("#load")
        assert works(tab) and tab.found["kept"]
        first, second, third = server.asked
        assert first is None and second is not None and third is not None
        starts = [int(each.removeprefix("bytes=").removesuffix("-")) for each in (second, third)]
        assert 0 < starts[0] <= 9_000_000 and starts[0] < starts[1] <= 14_000_000
        tab.page.reload()
        assert works(tab) and len(server.asked) == 3


def test_a_closed_tab_is_continued_by_the_next(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        server.cut_after = [22_000_000] + [0] * 9
        server.seconds = SLOW_S  # so that a busy browser has read what was sent before the end
        tab = open_tab(server.url)
        tab.page.click("#load")
        said = tab.problem()
        server.seconds = 0
        assert re.match(rf"{WEIGHTS} broke off after [\d,]+ bytes: check the network, then continue", said)
        assert "are stored in this browser" in str(tab.page.text_content("#progress-text"))
        kept = sum(
            int(end) - int(start) for start, end in (re.findall(r"/(\d+)-(\d+)$", each)[0] for each in keys(tab))
        )
        least = 22_000_000 - (8 << 20)  # all but the last part, of 4 MiB, and what a broken connection does not deliver
        assert kept > least
        server.cut_after.clear()
        server.asked.clear()
        tab.page.close()
        tab.page = tab.context.new_page()
        tab.page.goto(server.url)
        tab.page.locator("#load", has_text="Continue").click()
        assert works(tab) and tab.found["kept"]
        assert len(server.asked) == 1 and least < int(str(server.asked[0])[6:-1]) <= 22e6
        # The control: a server without ranges sends all of it.
        tab.page.click("#remove")
        tab.page.locator("#kept", has_text="deleted").wait_for()
        assert keys(tab) == [] and tab.page.evaluate("caches.keys()") == []
        server.ranges = False
        server.cut_after = [9_000_000]
        tab.page.reload()
        tab.page.locator("#load", has_text="Load the model").click()
        assert works(tab) and len(server.asked) == 3


def test_pausing_and_continuing(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        server.seconds = SLOW_S
        tab = open_tab(server.url)
        tab.page.click("#load")
        line = str(tab.page.locator("#progress-text", has_text=re.compile("[34]. MB of .* left")).text_content())
        assert re.fullmatch(r"Loading: [\d.]+ MB of 4\d MB · [\d.]+ MB/s · \d+ s left", line), line
        tab.page.click("#pause")
        tab.page.locator("#load", has_text="Continue").wait_for()
        assert tab.page.locator("#problem").is_hidden() and tab.page.locator("#pause").is_hidden()
        server.asked.clear()
        tab.page.click("#load")
        assert works(tab) and tab.found["kept"]
        assert len(server.asked) == 1 and server.asked[0] is not None


def test_a_damaged_store_is_repaired(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        tab = open_tab(server.url)
        tab.page.click("#load")
        assert works(tab) and server.asked == [None]
        tab.page.evaluate("""(async () => {
            const cache = await caches.open((await caches.keys()).find((name) => name.startsWith("slm files")));
            const [request] = (await cache.keys()).filter(({ url }) => /-4[0-9]{7}$/.test(url));
            const content = new Uint8Array(await (await cache.match(request)).arrayBuffer());
            content[1000] ^= 1;
            await cache.put(request, new Response(content));
        })()""")
        tab.page.reload()
        assert works(tab) and server.asked == [None, None]
        tab.page.reload()
        assert works(tab) and server.asked == [None, None]


def test_a_full_disk(open_tab: Callable[..., Tab], large_site: Site) -> None:
    """Both where the browser says so before, and where it does not, as Chromium."""
    grants = "navigator.storage.estimate = async () => ({ quota: 9e6, usage: 1e6 });"
    weights = json.loads(large_site.read("site.json"))["files"][WEIGHTS]["sha256"]
    with unreliable(large_site) as server:
        limit = {"origin": server.url.rstrip("/"), "quotaSize": 20_000_000}
        for script, before, after in (
            (grants, r"The browser grants 8\.0 MB and the model needs 4\d MB: it will work but not be stored\.", None),
            ("", None, r"The browser's storage is full: the model will work but not be stored\."),
        ):
            tab = open_tab(server.url)
            tab.page.add_init_script(script)
            tab.context.new_cdp_session(tab.page).send("Storage.overrideQuotaForOrigin", limit)
            tab.page.reload()
            tab.page.locator("#load:visible").wait_for()
            if before:
                assert re.fullmatch(before, str(tab.page.locator("#storage:visible").text_content()))
            else:
                assert tab.page.locator("#storage").is_hidden()
            tab.page.click("#load")
            assert works(tab) and not tab.found["kept"]
            assert after is None or re.fullmatch(after, str(tab.page.text_content("#storage")))
            assert tab.page.text_content("#pause") == "Cancel" and tab.page.locator("#remove").is_hidden()
            assert "needs the network next time" in str(tab.page.text_content("#kept"))
            assert not any(weights in each for each in keys(tab))  # a part of a file would only take room


def test_two_tabs_at_once(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        server.seconds = SLOW_S
        first = open_tab(server.url)
        second = Tab.__new__(Tab)
        second.__dict__ |= first.__dict__ | {"page": first.context.new_page()}
        second.page.goto(server.url)
        first.page.click("#load")
        first.page.locator("#progress-text", has_text="MB/s").wait_for(timeout=30_000)
        second.page.click("#load")
        second.page.locator("#progress-text", has_text="another tab").wait_for(timeout=30_000)
        assert works(first) and works(second)
        assert first.found["kept"] and second.found["kept"] and server.asked == [None]
        ranges = [re.findall(r"/(\w+)/(\d+)-(\d+)$", each)[0] for each in keys(first)]
        for sha256 in {each[0] for each in ranges}:
            parts = sorted((int(start), int(end)) for found, start, end in ranges if found == sha256)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(parts)), parts


def test_a_store_of_an_older_version(open_tab: Callable[..., Tab], large_site: Site) -> None:
    """Which had one entry for each file; those of the site are used and others are removed."""
    entries = json.loads(large_site.read("site.json"))["files"]
    with unreliable(large_site) as server:
        tab = open_tab(server.url)
        tab.page.evaluate(
            """async ([name, sha256]) => {
            const cache = await caches.open("slm files /");
            await cache.put(`/stored/${sha256}`, await fetch(name));
            await cache.put(`/stored/${"0".repeat(64)}`, new Response("older"));
        }""",
            [WEIGHTS, entries[WEIGHTS]["sha256"]],
        )
        server.asked.clear()
        tab.page.reload()
        tab.page.click("#load")
        assert works(tab) and tab.found["kept"] and server.asked == []
        assert f"/stored/{entries[WEIGHTS]['sha256']}" in keys(tab) and not any("0" * 64 in each for each in keys(tab))


def test_too_little_memory_is_one_line(open_tab: Callable[..., Tab], large_site: Site) -> None:
    with unreliable(large_site) as server:
        tab = open_tab(server.url, service_workers="block")
        tab.page.locator("#load:visible").wait_for()
        module = large_site.read("store.js").decode()
        wanted = "new Uint8Array(file.bytes)"
        assert wanted in module
        tab.page.context.route(
            "**/store.js",
            lambda route: route.fulfill(
                body=module.replace(wanted, "new Uint8Array(2 ** 40)"), content_type="text/javascript"
            ),
        )
        tab.page.reload()
        tab.page.click("#load")
        assert tab.problem().startswith("there is not enough memory for the model: close other tabs")
        assert tab.page.locator("#load:visible").count() == 1


def test_a_page_without_encryption_checks_hashes(chromium: Any) -> None:
    """It has no crypto.subtle, no store and no threads, and works; an altered file is refused."""
    site = local_site(Bundle.open(shipped.model_path()), "stories")
    assert site.files
    flags = ["--no-sandbox", "--host-resolver-rules=MAP stories.test 127.0.0.1"]
    browser = chromium.browser_type.launch(executable_path=shutil.which("chromium"), args=flags)
    try:
        with running(SiteServer(site, "127.0.0.1", 0, ["stories.test"])) as server:
            url = f"http://stories.test:{server.server_address[1]}/"
            tab = Tab(browser, url)
            assert tab.page.evaluate("[globalThis.caches, crypto.subtle].every((each) => each === undefined)")
            assert works(tab) and not tab.found["kept"] and tab.found["threads"] == 1
            content = bytearray(site.read(WEIGHTS))
            content[1_000_000] ^= 1
            site.files[WEIGHTS] = bytes(content)
            tab.close()
            tab = Tab(browser, url)  # without the HTTP cache of the first
            assert tab.problem().startswith(f"{WEIGHTS} was altered (SHA-256 differs)")
            tab.close()
    finally:
        browser.close()


def test_files_on_the_disk_are_served_in_pieces(large_site: Site, tmp_path: Path) -> None:
    name = WEIGHTS
    whole = large_site.read(name)
    assert b"".join(large_site.pieces(name, 3, len(whole) - 5, 1 << 20)) == whole[3:-5]
