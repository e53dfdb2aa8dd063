"""Makes docs/web.png: the page of the model that ships, after a text.

PYTHONPATH=build/peers/playwright .venv/bin/python tests/peers/scripts/screenshot.py docs/web.png
"""

import shutil
import sys
import threading

from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]

from slm.core.manifest import Bundle
from slm.runtime import shipped
from slm.web.server import SiteServer
from slm.web.site import local_site

with SiteServer(local_site(Bundle.open(shipped.model_path()), "stories"), "127.0.0.1", 0) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 720, "height": 660})
        page.goto(server.url)
        page.locator("#write:enabled").wait_for()
        page.click("#settings summary")
        page.check("#greedy")
        page.fill("#new-tokens", "96")
        page.click("#settings summary")
        page.fill("#prompt", "Once upon a time there was a little owl")
        page.click("#write")
        page.locator("#write:enabled").wait_for()
        page.locator("h1").click()  # the keyboard's focus elsewhere
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.screenshot(path=sys.argv[1])
        browser.close()
    server.shutdown()
    thread.join()
