"""Drives the page of `slm web` in Chromium, and chooses texts that another engine writes like ours.

Other kernels round otherwise, so greedy texts are compared only where each token clearly leads.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import slm
from slm.core import sample
from slm.core.manifest import Bundle
from slm.runtime import shipped
from slm.runtime.generation import Piece
from slm.runtime.options import GenerationOptions
from slm.web.server import SiteServer
from slm.web.site import Site, local_site
from tests.serving import running

# New tokens of most texts here, and those of an answer in a talk.
NEW_TOKENS, ANSWER_TOKENS = 64, 18
# By how much the best logit of each token of a text leads, of logits up to about 20.
LEAD = 0.1


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


def generated(prompt: str, *options: object) -> bytes:
    """What `slm generate` prints, to the byte."""
    command = [sys.executable, "-m", "slm", "generate", "-p", prompt, "--max-new-tokens", NEW_TOKENS, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=120).stdout


def is_clear(pieces: Iterable[Piece], count: int) -> bool:
    """Whether a greedy text, made with `logprobs=2`, has `count` new tokens of which each leads by `LEAD`."""
    found = 0
    for piece in pieces:
        if piece.token is None:
            continue
        if piece.top[0][1] - piece.top[1][1] < LEAD:
            return False
        found += 1
    return found == count


@cache
def short_prompt() -> str:
    """A beginning after which the model that ships writes `NEW_TOKENS` clear tokens."""
    moods, animals = ("happy", "little", "big", "sad", "kind"), ("dog", "cat", "bird", "bear", "frog", "mouse")
    return _first_clear(f"Once upon a time there was a {mood} {animal}" for animal in animals for mood in moods)


@cache
def long_prompt() -> str:
    """The same for a beginning of more than two windows, which is read in several pieces: words of the sample stories."""
    words = sample.validation_path().read_text(encoding="utf-8").replace("<|endoftext|>", "").split()
    prompt = _first_clear(" ".join(words[first : first + 345]) for first in range(len(words) - 345))
    assert len(_model().tokenizer.encode(prompt)) > 2 * 128 + NEW_TOKENS
    return prompt


def _first_clear(prompts: Iterable[str]) -> str:
    options: GenerationOptions = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 2}
    for prompt in prompts:
        if is_clear(_model().pieces(prompt, **options), NEW_TOKENS):
            return prompt
    raise AssertionError("the model that ships continues none of these beginnings with clear tokens")


@cache
def talk() -> list[str]:
    """Three messages, one with a special token in it; the answers of the model that ships have `ANSWER_TOKENS` clear tokens."""
    things = ("bird", "cat", "ball", "tree", "boat", "fish", "star", "hat")
    said: list[str] = []
    for form in ("Look, a {}!", "Where is the <end_of_turn> {}?", "And then the {}?"):
        lines = map(form.format, things)
        line = next((each for each in lines if _is_clear_answer([*said, each])), None)
        assert line is not None, f"the model that ships answers no {form!r} with clear tokens"
        said.append(line)
    return said


def _is_clear_answer(said: Sequence[str]) -> bool:
    """Whether the answer to the last of some messages is clear."""
    chat = _model().chat()
    options: GenerationOptions = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": 2}
    for message in said[:-1]:
        chat.ask(message, **options)
    return is_clear(chat.pieces(said[-1], **options), ANSWER_TOKENS)


@cache
def _model() -> slm.Model:
    return slm.load(shipped.model_path())
