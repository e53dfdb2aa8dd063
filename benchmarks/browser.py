"""Speed and memory of a model in Chromium: slm's page, wllama and transformers.js, with slm's native runtime beside them.

    make bench-browser       installs the peers and runs this with random weights in the 270M shape
    python benchmarks/browser.py [--name gemma --checkpoint DIR] [--file onnx-int8=DIR] [--file q4_k_m.gguf=FILE] [--rounds 5]
    python benchmarks/browser.py --parts memory
    python benchmarks/browser.py --name gemma --checkpoint DIR --only "slm INT8,transformers.js INT8"   # makes what is missing

All contenders have the same checkpoint in their own format, the same prompt, the same number of tokens and of threads. Each
is a tab in one browser; all stay loaded and take turns, so that other work of the machine slows all of them. For memory, each
contender has a browser of its own: the table has the peak of the page's process (VmHWM, and its private part), and its memory
after loading. A contender that cannot start is named and left out. The last line is one JSON object.
"""

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

from browser_files import prepare, size
from peer_files import HOME as LOGS
from peer_files import PEERS
from peers import Contender, Entry, Quiet, about, rounded, shown

from slm.core import sample
from slm.core.manifest import Bundle
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.runtime.bench import Spread
from slm.web import site as site_module
from slm.web.engine_plan import NotSupported
from slm.web.server import SiteServer
from slm.web.site import HEADERS, Site, local_site

PAGES = Path(__file__).with_name("browser_pages").resolve()
MODULES = PEERS / "transformersjs" / "node_modules"
FLAGS = ["--no-sandbox", "--disable-renderer-backgrounding", "--disable-background-timer-throttling"]
PARTS = ("speed", "memory")
# Contenders: the page's script, and the file of the model. `native` is a process, not a page.
CONTENDERS = {
    "slm INT8": ("engine", "onnx-int8"),
    "slm INT4": ("engine", "onnx-int4"),
    "slm INT8 on onnxruntime-web": ("onnxruntime", "onnx-int8"),
    "wllama Q8_0": ("wllama", "q8_0.gguf"),
    "wllama Q4_K_M": ("wllama", "q4_k_m.gguf"),
    "transformers.js INT8": ("transformers", "portable-int8"),
    "native slm INT8": ("native", "onnx-int8"),
    "native slm INT4": ("native", "onnx-int4"),
}
OURS = "slm INT8"
# Between looks at the memory of a process, in seconds.
LOOK_S = 0.02


def main() -> None:
    """Runs the parts, prints tables in Markdown, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="270m-shape", help="directory of the model under bench-results/browser")
    parser.add_argument("--checkpoint", type=Path, help="[default: random weights in the 270M shape]")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="a file that exists already")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="seconds to wait for quiet, in all")
    parser.add_argument("--only", default=",".join(CONTENDERS), metavar="NAMES", help="contenders, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="[default: %(default)s]")
    parser.add_argument("--wllama", type=Path, default=PEERS / "wllama/node_modules/@wllama/wllama", metavar="DIR")
    args = parser.parse_args()
    given = {name: Path(path) for name, _, path in (each.partition("=") for each in args.file)}
    files = {"checkpoint", *(file for _, file in CONTENDERS.values())}
    wanted, parts = args.only.split(","), args.parts.split(",")
    for option, names, known in (("--only", wanted, CONTENDERS), ("--parts", parts, PARTS), ("--file", given, files)):
        if unknown := set(names) - set(known):
            parser.error(f"{option}: unknown: {', '.join(sorted(unknown))}. Known: {', '.join(sorted(known))}")
    LOGS.mkdir(parents=True, exist_ok=True)
    home = prepare(args.name, args.checkpoint, given, {CONTENDERS[each][1] for each in wanted})
    entries = {name: CONTENDERS[name] for name in wanted if (home / CONTENDERS[name][1]).exists()}
    missing = {name: f"no file {CONTENDERS[name][1]}" for name in wanted if name not in entries}
    for name, reason in missing.items():
        print(f"{name} is missing: {reason}", file=sys.stderr)
    if not entries:
        raise SystemExit("no contender has its file")
    found: dict[str, Any] = about(args) | {"model": args.name, "chromium": "", "missing": missing}
    with ExitStack() as stack:
        browsers = stack.enter_context(chromium())
        world = World(home, args, stack.enter_context(files_server(home, args.wllama)))
        found["files"] = {name: world.size(kind, file) for name, (kind, file) in entries.items()}
        if "speed" in parts:
            found |= speed(entries, world, browsers, args, found["missing"])
        if "memory" in parts:
            found["memory"] = memory(entries, world, browsers, found)
    print(json.dumps(found))


class World:
    """Where the pages of contenders are."""

    def __init__(self, home: Path, args: argparse.Namespace, files: str) -> None:
        self.home, self.args, self.files = home, args, files
        self.site = cache(self._site)

    def _site(self, file: str, engine: bool) -> Site:
        return slm_site(self.home / file, engine=engine)

    def size(self, kind: str, file: str) -> int:
        """Returns the bytes of the model's files that a contender reads; those that slm's page downloads."""
        if kind not in ("engine", "onnxruntime"):
            return size((self.home / file).resolve())
        site = self.site(file, kind == "engine")
        return sum(site.entries[name].bytes for name in site.fields["model"]["files"])

    @contextmanager
    def page(self, kind: str, file: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yields the address of a contender's page, its script and what the script is told."""
        told = {"model": f"/models/{file}", "threads": self.args.threads, "context": 1024}
        if kind in ("wllama", "transformers"):
            yield f"{self.files}/", f"{self.files}/pages/{kind}.js", told
            return
        with served(self.site(file, kind == "engine")) as url:
            yield f"{url}?bench", f"{url}browser.js", told


def slm_site(path: Path, *, engine: bool) -> Site:
    """Returns the site of a bundle, with slm's engine or onnxruntime-web, and with the script that takes turns."""
    unsupported = patch.object(site_module, "engine_plan", side_effect=NotSupported("by the benchmark"))
    with ExitStack() as stack:
        if not engine:
            stack.enter_context(unsupported)
        site = local_site(Bundle.open(path), path.name)
    return Site(site.fields, {**site.contents, "browser.js": PAGES / "slm.js"})


@contextmanager
def served(site: Site) -> Iterator[str]:
    """Serves slm's page."""
    with SiteServer(site, "127.0.0.1", 0) as server, running(server):
        yield server.url


@contextmanager
def files_server(home: Path, wllama: Path) -> Iterator[str]:
    """Serves the peers' packages, models and pages, with the headers that threads need."""
    roots = {
        "pages": PAGES,
        "models": home,
        "wllama": wllama / "esm",
        "transformers": MODULES / "@huggingface/transformers/dist",
        "ort": MODULES / "onnxruntime-web/dist",
    }

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {
            ".mjs": "text/javascript",
            ".wasm": "application/wasm",
        }

        def translate_path(self, path: str) -> str:
            first, _, rest = path.split("?")[0].lstrip("/").partition("/")
            root = roots.get(first)
            return str(PAGES / "none" if root is None or ".." in rest else root / rest)

        def do_GET(self) -> None:
            if self.path != "/":
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>peers</title>")

        def end_headers(self) -> None:
            for name in ("Cross-Origin-Opener-Policy", "Cross-Origin-Embedder-Policy", "Cross-Origin-Resource-Policy"):
                self.send_header(name, HEADERS[name])
            super().end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler)) as server, running(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def running(server: Any) -> Iterator[None]:
    """Runs a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def chromium() -> Iterator[Callable[[], Any]]:
    """Yields a function that starts Debian's Chromium."""
    program = shutil.which("chromium")
    if program is None or not (PEERS / "playwright").is_dir():
        raise SystemExit("Debian's chromium and build/peers/playwright are needed; as root make peers installs both")
    sys.path.append(str(PEERS / "playwright"))
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]

    with sync_playwright() as playwright:
        yield partial(playwright.chromium.launch, executable_path=program, args=FLAGS)


class Page:
    """A contender in a tab."""

    START = """async ([script, told]) => {
        const { start } = await import(script);
        const began = performance.now();
        globalThis.contender = await start(told);
        const { threads, about } = globalThis.contender;
        return { threads, about, load_ms: performance.now() - began, isolated: crossOriginIsolated };
    }"""

    def __init__(self, browser: Any, stack: ExitStack, world: World, kind: str, file: str) -> None:
        url, script, told = stack.enter_context(world.page(kind, file))
        context = browser.new_context()
        stack.callback(context.close)
        self.page = context.new_page()
        self.page.set_default_timeout(600_000)
        self.page.goto(url)
        self.start = lambda: self.page.evaluate(self.START, [script, told])
        self.about: dict[str, Any] = {}

    def turn(self, ids: list[int], text: str, new: int) -> dict[str, float]:
        """Takes a turn."""
        told = {"ids": ids, "text": text, "newTokens": new}
        found: dict[str, float] = self.page.evaluate("(told) => globalThis.contender.turn(told)", told)
        return found


def prompt(home: Path, count: int) -> tuple[list[int], str]:
    """Returns a prompt of so many tokens."""
    folders = [path for path in sorted(home.iterdir()) if (path / TOKENIZER_FILE).is_file()]
    if not folders:
        raise SystemExit(f"{home} has no tokenizer: name a --checkpoint or a bundle as --file")
    tokenizer = Tokenizer.load(folders[0])  # all of them have the same one
    ids = tokenizer.encode(sample.validation_path().read_text(encoding="utf-8").replace("<|endoftext|>", ""))[:count]
    return ids, tokenizer.decode(ids)


def speed(
    entries: dict[str, tuple[str, str]],
    world: World,
    browsers: Callable[[], Any],
    args: argparse.Namespace,
    missing: dict[str, str],
) -> dict[str, Any]:
    """Measures prefill and decode in turns."""
    quiet, words = Quiet(args.patience), prompt(world.home, args.prompt)
    taken: dict[str, list[dict[str, float]]] = {}
    told: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        browser = browsers()
        stack.callback(browser.close)
        turns: dict[str, Callable[[], dict[str, float]]] = {}
        for name, (kind, file) in entries.items():
            try:
                if kind == "native":
                    process = Contender(
                        name, Entry("slm", None, str((world.home / file).resolve())), args.threads, 1024
                    )
                    stack.callback(process.stop)
                    turns[name] = partial(native, process, quiet, args)
                    continue
                page = Page(browser, stack, world, kind, file)
                told[name] = page.start()
                page.turn(*words, 2)
                turns[name] = partial(page.turn, *words, args.new)
            except Exception as error:
                missing[name] = str(error).splitlines()[0]
                print(f"{name} is missing: {missing[name]}", file=sys.stderr)
        for round_ in range(args.rounds + 1):
            for name, turn in turns.items():
                taken.setdefault(name, []).append(quiet.take([], turn))
            print(f"round {round_} of {args.rounds}", file=sys.stderr, flush=True)
        version = browser.version
    rows = {name: row(each[1:], args, told.get(name, {})) for name, each in taken.items()}  # the first warmed up
    print(
        f"\n{args.prompt} tokens of prompt, {args.new} new, {args.threads} threads, medians of {args.rounds} (min – max)\n"
    )
    print(
        "| contender | decode, tokens/s | prefill, tokens/s | first token, ms | load, s | file, MB |\n|---|---|---|---|---|---|"
    )
    for name, each in rows.items():
        load = f"{each['load_ms'] / 1e3:.1f}" if "load_ms" in each else ""
        figures = (shown(each[figure], 1) for figure in ("decode_tok_s", "prefill_tok_s", "ttft_ms"))
        print("| " + " | ".join((name, *figures, load, f"{world.size(*entries[name]) / 1e6:.0f}")) + " |")
    found: dict[str, Any] = {"speed": rows, "chromium": version}
    if OURS in rows and len(rows) > 1:
        ours = rows[OURS]["decode_tok_s"]["median"]
        found["ratios"] = {
            name: round(ours / each["decode_tok_s"]["median"], 3) for name, each in rows.items() if name != OURS
        }
        print(f"\n{OURS} decodes at " + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in found["ratios"].items()))
    return found


def native(process: Contender, quiet: Quiet, args: argparse.Namespace) -> dict[str, float]:
    """Has a process take a turn."""
    answer = process._turn({"read": args.prompt, "new": args.new + 1})
    return {"read_ms": 1e3 * answer["read_s"], "decode_ms": 1e3 * answer["decode_s"], "steps": args.new}


def row(taken: list[dict[str, float]], args: argparse.Namespace, told: dict[str, Any]) -> dict[str, Any]:
    """Returns a contender's figures."""
    return told | {
        "decode_tok_s": rounded(Spread.of([1e3 * turn["steps"] / turn["decode_ms"] for turn in taken])),
        "prefill_tok_s": rounded(Spread.of([1e3 * args.prompt / turn["read_ms"] for turn in taken])),
        "ttft_ms": rounded(Spread.of([turn["read_ms"] for turn in taken])),
    }


def memory(
    entries: dict[str, tuple[str, str]], world: World, browsers: Callable[[], Any], found: dict[str, Any]
) -> dict[str, Any]:
    """Measures what the process of each page takes: at most while it loads and generates, and afterwards; in MB."""
    rows: dict[str, Any] = {}
    for name, (kind, file) in entries.items():
        if kind == "native" or name in found["missing"]:
            continue
        with ExitStack() as stack:
            browser = browsers()
            stack.callback(browser.close)
            try:
                page = Page(browser, stack, world, kind, file)
                before = {pid: private(pid) for pid in renderers(browser)}
                with Watch(browser) as watch:
                    page.start()
                    page.turn(*prompt(world.home, 128), 8)
                    time.sleep(3)  # a garbage collection
                pid = max(watch.peaks, key=lambda each: watch.peaks[each])
            except Exception as error:
                found["missing"][name] = str(error).splitlines()[0]
                continue
            status = fields(pid)
            weights = found["files"][name]
            rows[name] = {
                "peak_mb": round(watch.peaks[pid] / 1e6),
                "peak_with_shared_mb": round(status["VmHWM"] / 1e6),
                "loaded_mb": round(private(pid) / 1e6),
                "empty_page_mb": round(before.get(pid, 0) / 1e6),
                "file_mb": round(weights / 1e6),
                "peak_to_file": round(watch.peaks[pid] / weights, 2),
            }
    print(
        "\n| contender | file, MB | empty page, MB | peak, MB | peak with shared libraries, MB | loaded, MB | peak / file |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, each in rows.items():
        order = ("file_mb", "empty_page_mb", "peak_mb", "peak_with_shared_mb", "loaded_mb", "peak_to_file")
        print(f"| {name} | " + " | ".join(str(each[figure]) for figure in order) + " |")
    return rows


class Watch:
    """Looks at the private memory of a browser's page processes while something runs; the most of each is in `peaks`."""

    def __init__(self, browser: Any) -> None:
        self.peaks: dict[int, int] = {}
        self._pids = renderers(browser)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            for pid in self._pids:
                self.peaks[pid] = max(self.peaks.get(pid, 0), private(pid))


def renderers(browser: Any) -> list[int]:
    """Returns the ids of the processes of pages."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    return [each["id"] for each in processes if each["type"] == "renderer"]


def private(pid: int) -> int:
    """Returns the resident bytes of a process that no file on the disk has: its memory without libraries."""
    found = fields(pid)
    return found.get("RssAnon", 0) + found.get("RssShmem", 0)


def fields(pid: int) -> dict[str, int]:
    """Returns the sizes in /proc/PID/status, in bytes; none if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


if __name__ == "__main__":
    main()
