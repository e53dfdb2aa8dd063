"""The page's downloads in Node: what is stored, continued and checked. The network and the browser's cache are doubles."""

from collections.abc import Callable
from typing import Any

import pytest

Node = Callable[..., Any]

# A site with two files, of which `server` decides how it answers; `cache` is the browser's store by address.
WORLD = """
import crypto from "node:crypto";
import { PART, fetchAll, forget } from "page/store.js";
import { openStore, removeAll } from "page/kept.js";

const digest = (bytes) => crypto.createHash("sha256").update(bytes).digest("hex");
const large = new Uint8Array(2.5 * PART);
for (let i = 0; i < large.length; i++) large[i] = Math.imul(i, 2654435761) >>> 11;
const small = new TextEncoder().encode("small");
const contents = { large, small };
const entry = (each) => ({ bytes: each.length, sha256: digest(each) });
const files = Object.fromEntries(Object.entries(contents).map(([name, each]) => [name, entry(each)]));

const cache = new Map();
const server = { asked: [], sends: contents, cutAfter: Infinity, cuts: Infinity, ranges: true, chunk: 1 << 17, status: null };
const browser = { full: Infinity, quota: Infinity, secure: true };
const used = () => [...cache.values()].reduce((sum, each) => sum + each.length, 0);
globalThis.caches = {
  open: async () => ({
    match: async (url) => (cache.has(url) ? new Response(cache.get(url)) : undefined),
    keys: async () => [...cache.keys()].map((url) => ({ url })),
    delete: async (url) => cache.delete(url),
    put: async (url, response) => {
      const content = new Uint8Array(await response.arrayBuffer());
      if (used() + content.length > browser.full) throw new DOMException("full", "QuotaExceededError");
      cache.set(url, content);
    },
  }),
  delete: async () => cache.clear(),
};
Object.defineProperty(globalThis, "navigator", {
  configurable: true,
  value: { storage: { estimate: async () => ({ quota: browser.quota, usage: used() }) } },
});
globalThis.fetch = async (url, { headers = {}, signal } = {}) => {
  const name = new URL(url).pathname.split("/").pop();
  const range = server.ranges && headers.Range ? Number(/^bytes=(\\d+)-$/.exec(headers.Range)[1]) : null;
  server.asked.push([name, headers.Range ?? null]);
  if (server.down) throw new TypeError("Failed to fetch");
  if (server.status) return new Response("no", { status: server.status });
  const content = server.sends[name];
  let at = range ?? 0;
  const last = server.cuts-- > 0 ? at + server.cutAfter : Infinity;
  const body = new ReadableStream({
    async pull(to) {
      await new Promise(setImmediate);
      if (signal?.aborted) return to.error(signal.reason);
      if (at >= last) return to.error(new TypeError("network error"));
      if (at >= content.length) return to.close();
      to.enqueue(content.slice(at, at + server.chunk));
      at += server.chunk;
    },
  });
  const bytes = `bytes ${range}-${content.length - 1}/${content.length}`;
  return new Response(body, range === null ? { status: 200 } : { status: 206, headers: { "Content-Range": bytes } });
};
const equal = (found) => Object.entries(contents).every(([name, each]) => digest(found[name]) === digest(each));
const failed = ({ name, message, hint = null }) => ({ name, message, hint });
const failure = (promise) => promise.then(() => null, failed);
// Loads until some bytes are there.
const part = (until) => {
  const stop = new AbortController();
  const told = ({ loaded }) => loaded > until && stop.abort();
  return failure(fetchAll(files, told, undefined, { signal: stop.signal }));
};
const entries = () => [...cache.keys()].map((url) => /[^/]*$/.exec(url)[0]);
const print = (found) => console.log(JSON.stringify(found));
"""


@pytest.fixture
def run(in_node: Node, vendor: None) -> Callable[[str], Any]:
    return lambda program: in_node(WORLD + program)


def test_the_first_visit_stores_and_the_second_asks_nobody(run: Callable[[str], Any]) -> None:
    found = run("""
    const told = [];
    const first = await fetchAll(files, (each) => told.push(each));
    const asked = server.asked.splice(0);
    const second = await fetchAll(files);
    const lengths = await (await openStore()).lengths(files);
    print({ equal: equal(first.contents) && equal(second.contents), kept: [first.kept, second.kept], asked,
      again: server.asked, entries: entries(), last: told.at(-1), lengths,
      rises: told.every((each, i) => i === 0 || each.loaded >= told[i - 1].loaded) });
    """)
    total = 5 * (1 << 21) + 5
    assert found["equal"] and found["kept"] == [True, True] and found["rises"]
    assert found["asked"] == [["large", None], ["small", None]] and found["again"] == []
    assert found["entries"] == ["0-4194304", "4194304-8388608", "8388608-10485760", "0-5"]
    assert found["last"] == {"loaded": total, "total": total, "fetched": total, "full": False}
    assert found["lengths"] == {"large": total - 5, "small": 5}


def test_the_place_of_a_file_is_the_callers(run: Callable[[str], Any]) -> None:
    """As on a shared memory, at any offset; what lies around it is not touched."""
    found = run("""
    const memory = new WebAssembly.Memory({ initial: 200, maximum: 300, shared: true });
    const place = (name, bytes) => (name === "large" ? new Uint8Array(memory.buffer, 4096, bytes) : null);
    const results = [];
    for (const _ of ["from the site", "from the store"]) {
      new Uint8Array(memory.buffer).fill(7);
      const { contents: got } = await fetchAll(files, undefined, place);
      const all = new Uint8Array(memory.buffer);
      results.push([equal(got), got.large.buffer === memory.buffer, all[4095], all[4096 + large.length]]);
    }
    const wrong = await failure(fetchAll(files, undefined, () => new Uint8Array(3)));
    print({ results, wrong, asked: server.asked.length });
    """)
    assert found["results"] == [[True, True, 7, 7]] * 2 and found["asked"] == 2
    assert found["wrong"]["message"] == "the place for large has another size"


def test_an_interrupted_download_continues(run: Callable[[str], Any]) -> None:
    found = run("""
    [server.cutAfter, server.cuts] = [3 << 20, 3];
    const { contents: got, kept } = await fetchAll(files);
    print({ equal: equal(got), kept, asked: server.asked, entries: entries() });
    """)
    assert found["equal"] and found["kept"]
    assert found["asked"] == [
        ["large", None],
        *(["large", f"bytes={n * 3 << 20}-"] for n in (1, 2, 3)),
        ["small", None],
    ]


def test_another_visit_continues(run: Callable[[str], Any]) -> None:
    found = run("""
    const at = [];
    const paused = await part(5e6);
    const stored = await (await openStore()).lengths(files);
    server.asked.length = 0;
    const { contents: got, kept } = await fetchAll(files, ({ loaded, fetched }) => at.push([loaded, fetched]));
    print({ paused: paused.name, stored, equal: equal(got), kept, asked: server.asked, fetched: at.at(-1)[1] });
    """)
    stored = found["stored"]["large"]
    assert found["paused"] == "AbortError" and 5e6 < stored < 6e6  # also what was not a whole part
    assert found["equal"] and found["kept"] and found["asked"] == [["large", f"bytes={stored}-"], ["small", None]]
    assert found["fetched"] == 5 * (1 << 21) + 5 - stored


def test_a_server_without_ranges_begins_again(run: Callable[[str], Any]) -> None:
    found = run("""
    server.ranges = false;
    [server.cutAfter, server.cuts] = [5 << 20, 1];
    const { contents: got, kept } = await fetchAll(files);
    print({ equal: equal(got), kept, asked: server.asked });
    """)
    assert found["equal"] and found["kept"]
    assert found["asked"] == [["large", None], ["large", f"bytes={5 << 20}-"], ["small", None]]


@pytest.mark.parametrize("answer", ["bytes 5-10/11", "bytes 0-9/9", "", None])
def test_a_wrong_range_is_not_used(run: Callable[[str], Any], answer: str | None) -> None:
    """A server that sends another range than the one that was asked for, or 416 (None)."""
    reply = (
        'new Response("no", { status: 416 })'
        if answer is None
        else f'new Response("wrong", {{ status: 206, headers: {{ "Content-Range": "{answer}" }} }})'
    )
    found = run(f"""
    [server.cutAfter, server.cuts] = [5 << 20, 1];
    const right = globalThis.fetch;
    globalThis.fetch = (url, options) => (options.headers?.Range ? Promise.resolve({reply}) : right(url, options));
    const {{ contents: got }} = await fetchAll(files);
    print({{ equal: equal(got), asked: server.asked }});
    """)
    assert found["equal"] and found["asked"] == [["large", None], ["large", None], ["small", None]]


def test_a_server_that_gives_up(run: Callable[[str], Any]) -> None:
    found = run("""
    globalThis.setTimeout = new Proxy(setTimeout, { apply: (to, self, [f, ms]) => to(f, ms > 1e4 ? ms : 0) });
    server.ranges = false;
    server.cutAfter = 3 << 20;
    const cut = await failure(fetchAll(files));
    const times = server.asked.length;
    server.status = 503;
    const busy = await failure(fetchAll(files));
    server.status = 404;
    const missing = await failure(fetchAll({ small: files.small }));
    [server.status, server.down] = [null, true];
    const away = await failure(fetchAll({ small: files.small }));
    print({ cut, times, busy, missing, away });
    """)
    assert found["cut"]["message"] == "large broke off after 3,145,728 bytes" and 3 <= found["times"] <= 6
    assert found["busy"]["message"] == "large broke off after 3,145,728 bytes"
    assert found["missing"]["message"] == "small could not be fetched (404)"
    assert found["away"]["message"] == "small could not be fetched" and "cannot be reached" in found["away"]["hint"]


def test_altered_files_are_refused_and_not_stored(run: Callable[[str], Any]) -> None:
    found = run("""
    const altered = large.slice();
    altered[large.length - 1] ^= 1;
    const results = [];
    for (const sent of [altered, large.slice(1), new Uint8Array(large.length + 1)]) {
      server.sends = { ...contents, large: sent };
      results.push([await failure(fetchAll(files)), entries().filter((each) => each.startsWith("0-4"))]);
      await removeAll();
    }
    server.sends = contents;
    print({ results, equal: equal((await fetchAll(files)).contents) });
    """)
    (altered, left), (short, _), (long, _) = found["results"]
    assert altered["message"] == "large was altered (SHA-256 differs)" and left == []
    assert "10,485,759 bytes instead of 10,485,760" in short["message"] and "reload" in short["hint"]
    assert long["message"] == "large has more than 10,485,760 bytes" and found["equal"]


def test_a_stored_byte_that_changed_is_found_and_fetched_again(run: Callable[[str], Any]) -> None:
    found = run("""
    await fetchAll(files);
    const results = [];
    for (const damage of [
      (url) => { cache.get(url)[99] ^= 4; },
      (url) => cache.set(url, cache.get(url).slice(0, 1000)),
      (url) => cache.set(url, new Uint8Array(PART + 1)),
      (url) => cache.set(url, new Uint8Array(0)),
      (url) => cache.delete(url),
    ]) {
      server.asked.length = 0;
      damage([...cache.keys()].find((url) => url.endsWith("/4194304-8388608")));
      const { contents: got, kept } = await fetchAll(files);
      const repaired = await fetchAll(files);
      results.push([equal(got), kept, equal(repaired.contents), server.asked.map(([name]) => name)]);
    }
    print(results);
    """)
    assert [each[:3] for each in found] == [[True, True, True]] * 5
    assert all(set(each[3]) == {"large"} and len(each[3]) <= 3 for each in found), found


def test_a_whole_file_of_an_older_version_is_used(run: Callable[[str], Any]) -> None:
    found = run("""
    const url = (sha) => new URL("stored/" + sha, new URL("./", "page/store.js")).href;
    cache.set(url(files.large.sha256), large.slice());
    cache.set(url("0".repeat(64)), small);
    const { contents: got, kept } = await fetchAll(files);
    await forget(files);
    const left = entries();
    cache.get(url(files.large.sha256))[5] ^= 1;
    const again = await fetchAll(files);
    print({ equal: equal(got) && equal(again.contents), kept, asked: server.asked, left, after: entries() });
    """)
    assert found["equal"] and found["kept"]
    assert found["asked"] == [["small", None], ["large", None]]  # the second after the stored one was damaged
    assert len(found["left"]) == 2 and "0" * 64 not in found["left"]
    assert found["after"] == ["0-5", "0-4194304", "4194304-8388608", "8388608-10485760"]


def test_a_browser_without_room(run: Callable[[str], Any]) -> None:
    found = run("""
    const results = [];
    for (const [full, quota] of [[6e6, Infinity], [Infinity, 6e6], [Infinity, 11e6]]) {
      Object.assign(browser, { full, quota });
      const told = [];
      const { contents: got, kept } = await fetchAll({ large: files.large }, (each) => told.push(each.full));
      results.push([digest(got.large) === files.large.sha256, kept, cache.size, told[0], told.at(-1)]);
      await removeAll();
    }
    delete globalThis.caches;
    const { contents: got, kept } = await fetchAll(files);
    print({ results, without: [equal(got), kept] });
    """)
    assert found["results"] == [
        [True, False, 0, False, True],
        [True, False, 0, True, True],
        [True, True, 3, False, False],
    ]
    assert found["without"] == [True, False]


def test_another_tab_that_loads_the_same(run: Callable[[str], Any]) -> None:
    """The second waits for the first and takes what that one stored; if the first ends early, it continues."""
    found = run("""
    const held = new Map();
    navigator.locks = {
      request: async (name, { ifAvailable }, action) => {
        if (ifAvailable && held.has(name)) return action(null);
        while (held.has(name)) await held.get(name);
        const running = Promise.resolve(action({ name }));
        held.set(name, running.catch(() => {}));
        return running.finally(() => held.delete(name));
      },
    };
    const told = [];
    const first = part(6e6);
    const second = await fetchAll(files, (each) => each.waiting && told.push(each));
    const ended = (await first).name;
    const asked = server.asked.splice(0);
    await removeAll();
    const both = await Promise.all([fetchAll(files), fetchAll(files)]);
    print({ ended, told, asked, equal: equal(second.contents) && both.every(({ contents: each }) => equal(each)),
      kept: both.map(({ kept }) => kept), once: server.asked });
    """)
    assert found["ended"] == "AbortError" and found["told"] == [{"waiting": "large"}]
    (first, second, third) = found["asked"]
    assert first == ["large", None] and third == ["small", None]
    assert second[0] == "large" and int(second[1].removeprefix("bytes=").removesuffix("-")) > 6e6 - (1 << 18)
    assert (
        found["equal"] and found["kept"] == [True, True] and sorted(found["once"]) == [["large", None], ["small", None]]
    )


def test_memory_that_cannot_be_had(run: Callable[[str], Any]) -> None:
    found = run("""
    import { asProblem } from "page/problem.js";
    const none = () => { throw new RangeError("Array buffer allocation failed"); };
    const results = [await fetchAll(files, undefined, none).catch(asProblem)];
    for (const said of [
      "WebAssembly.Memory(): could not allocate memory",
      "WebAssembly.Memory.grow(): Maximum memory size exceeded",
      "Out of memory: wasm memory",
      "std::bad_alloc",
      "Invalid typed array length: 99999999999",
    ]) results.push(asProblem(new Error(said)));
    results.push(asProblem(new Error("something else")));
    print(results.map(({ message, hint }) => [message, hint]));
    """)
    *memory, other = found
    assert {message for message, _ in memory} == {"there is not enough memory for the model"}
    assert "smaller model" in memory[0][1] and other[0] == "something else"
