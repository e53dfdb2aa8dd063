"""Tools on the page in Chromium: settings, calls, results, and the ids of prompts. The model's tokens are given."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from slm.core.chat import Message, chat_ids
from slm.core.manifest import Bundle, seal
from slm.core.tokenizer import END_OF_TURN, Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.core.tool_fields import declared
from slm.core.tools import FUNCTION_GEMMA, JSON_STYLE, Call, Style, written
from slm.runtime import shipped
from slm.web.site import Site, local_site
from tests.core.tool_chat_templates import FUNCTION_GEMMA as TEMPLATE
from tests.peers.pages import Tab, served

pytestmark = pytest.mark.peer

TOOLS = """{"tools": [{"name": "set_light", "description": "Sets a light.", "parameters": {"type": "object", "properties":
  {"room": {"type": "string"}, "level": {"type": "number", "maximum": 100.0}}}}, {"name": "now"}]}"""
SET = Call("set_light", {"room": 'the "hall"', "level": 40.0})
NOW = Call("now", {})
# A model whose answers are given. Each prompt goes to the page.
ENGINE = """
const script = %s;
const heard = new BroadcastChannel("prompts");
const PIECE = 128;
export class Engine {
  threads = 1;
  data = null;
  ids = [];
  context = 4096;
  cacheBytes = 0;
  left = [];
  async start() {
    return this;
  }
  reset() {}
  keep() {}
  resume(ids) {
    heard.postMessage(ids);
    this.left = [...script.shift()];
    this.ids = [];
    return 0;
  }
  async step(ids) {
    this.ids = [...this.ids, ...ids];
    const logits = new Float32Array(%d);
    if (ids.length !== PIECE) logits[this.left.shift()] = 1;
    return logits;
  }
}
"""


def scripted(bundle: Bundle, replies: Sequence[str]) -> tuple[Site, Tokenizer]:
    """Returns the site of a bundle whose model gives these replies, and its tokenizer."""
    tokenizer, site = Tokenizer.load(bundle.path), local_site(bundle, "stories")
    end = tokenizer.token_id(END_OF_TURN)
    engine = ENGINE % (json.dumps([[*tokenizer.encode_literal(each), end] for each in replies]), tokenizer.vocab_size)
    return Site(site.fields, {**site.contents, "engine.js": engine.encode()}), tokenizer


def function_gemma(tmp_path: Path) -> Bundle:
    """The model that ships with FunctionGemma's chat template, whose marks its tokenizer spells as plain text."""
    copy = tmp_path / "bundle"
    shutil.copytree(shipped.model_path(), copy)
    file = copy / TOKENIZER_CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return seal(copy, Bundle.open(shipped.model_path()).manifest)


@pytest.mark.parametrize("style", [JSON_STYLE, FUNCTION_GEMMA], ids=["slm's own", "functiongemma"])
def test_calls_and_results(
    open_tab: Callable[..., Tab],
    tmp_path: Path,
    style: Style,
) -> None:
    bundle = Bundle.open(shipped.model_path()) if style is JSON_STYLE else function_gemma(tmp_path)
    replies = [f"Let me see.\n{written([SET, NOW], style)}", "It is on.", written([NOW], style), "Bye."]
    site, tokenizer = scripted(bundle, replies)
    with served(site) as server:
        tab = open_tab(f"http://127.0.0.1:{server.server_address[1]}/").ready().set(greedy=True)
        page = tab.page
        page.evaluate(
            "() => { window.prompts = []; new BroadcastChannel('prompts').onmessage = (event) => prompts.push(event.data); }"
        )
        page.check("input[value=continue]")
        assert page.locator("#tools:visible").count() == 0  # tools belong to chats
        page.check("input[value=talk]")
        page.fill("#tools", "[{}]")
        page.press("#tools", "Tab")
        assert tab.problem().startswith("tool 1 has no name") and page.get_attribute("#tools", "aria-invalid") == "true"
        page.fill("#tools", TOOLS)
        page.press("#tools", "Tab")
        page.locator("#problem").wait_for(state="hidden")
        tab.begin("Light in the hall.")
        page.locator("#results:visible").wait_for()
        assert page.locator("#request:visible").count() == 0 and page.text_content("#write") == "Send results"
        calls = ['set_light(room: "the \\"hall\\"", level: 40.0)', "now()"]
        assert page.locator("#log .call span:last-child").all_text_contents() == calls
        assert page.locator("#log .new").last.text_content() == "Let me see."
        assert page.locator("#result-fields label").all_text_contents() == [f"Result of {each}" for each in calls]
        assert page.evaluate("document.activeElement.id") == "result-0"
        page.fill("#result-0", "done")
        page.fill("#result-1", '{"hour": 9.0}')
        page.press("#result-1", "Control+Enter")
        page.locator("#prompt:visible").wait_for()
        page.locator("#write:enabled").wait_for()
        assert page.locator("#log .new").last.text_content() == "It is on."
        assert page.locator("#log .result span:last-child").all_text_contents() == ["done", '{"hour": 9.0}']
        tab.begin("And now?")
        page.locator("#results:visible").wait_for()
        page.click("#discard")  # the question is dropped with its call
        assert page.locator("#results:visible").count() == 0
        assert tab.text("Thanks.") == "Bye."
        prompts = page.evaluate("prompts")
    talk: list[Message] = [
        {"role": "user", "content": "Light in the hall."},
        {"role": "assistant", "content": "Let me see.", "calls": (SET, NOW)},
        {"role": "tool", "name": "set_light", "content": "done"},
        {"role": "tool", "name": "now", "content": '{"hour": 9.0}'},
        {"role": "assistant", "content": "It is on."},
    ]
    tools = declared(json.loads(TOOLS)["tools"])
    conversations: list[list[Message]] = [
        talk[:1],
        talk[:4],
        [*talk, {"role": "user", "content": "And now?"}],
        [*talk, {"role": "user", "content": "Thanks."}],
    ]
    assert prompts == [chat_ids(tokenizer, each, bundle.stop_token_ids, tools) for each in conversations]


def test_a_page_that_cannot_render_the_template_says_so(
    open_tab: Callable[..., Tab],
) -> None:
    """The site has other ids than the page makes: chats are off, and text can be continued."""
    bundle = Bundle.open(shipped.model_path())
    site, _ = scripted(bundle, ["owl."])
    fields: Any = json.loads(json.dumps(site.fields))
    fields["model"]["turns"]["prompts"][0]["ids"][-1] += 1
    with served(Site(fields, site.contents)) as server:
        tab = open_tab(f"http://127.0.0.1:{server.server_address[1]}/").ready()
        note = str(tab.page.text_content("#note"))
        assert note.startswith("Chats are not available: the page renders the model's chat template differently")
        assert tab.page.locator("input[value=talk]").is_disabled()
        assert tab.set(greedy=True).text("An") == "owl."
