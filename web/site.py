"""The files of the site: the page, its dependencies from npm, a bundle, and the index `site.json`.

The page has two modes. In `local` the browser downloads the bundle and runs it. In `server` the page sends requests to its
own server, and downloads nothing else.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slm.core.chat import foreign_template, knows_turns
from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_json, read_text, sha256_file
from slm.core.licence import NOTICE_FILE
from slm.core.manifest import MANIFEST_FILE, Bundle, FileEntry
from slm.core.outputs import check_output
from slm.core.tokenizer import END_OF_TURN, START_OF_TURN, TOKENIZER_FILE, Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.version import __version__
from slm.web.engine_plan import NotSupported, engine_plan, large_note, slow_note
from slm.web.npm import HOME, packages, vendored
from slm.web.turns import page_turns
from slm.web.vocabulary import TABLES_FILE, tokenizer_tables

SITE_FILE = "site.json"
WORKER_FILE = "sw.js"
HEADERS_FILE = "_headers"
LICENCES_FILE = "licences.txt"
VENDOR = "vendor"
MODEL = "model"

# The page itself; in mode `server` it needs only the first line of these.
_SHELL = (
    *("index.html", "style.css", "icon.svg", "app.js", "problem.js", "remote.js", "local.js", "kept.js", "simd.js"),
    *("progress.js", "conversation.js", "log.js", "results.js", "tools.js", "json.js"),
)
_ENGINE = (
    *("worker.js", "store.js", "download.js", "hash.js", "backend.js", "decoder.js", "resumable.js"),
    *(
        "engine.js",
        "engine-layout.js",
        "engine-thread.js",
        "generate.js",
        "sampling.js",
        "text.js",
        "vocabulary.js",
        "chat.js",
        "calls.js",
    ),
    *("measure.js", "bench.js", "bench-report.js"),
)
# slm's own engine, for browsers with and without relaxed SIMD instructions (web/engine).
_MODULES = ("engine/relaxed.wasm", "engine/simd.wasm")
# For models with a chat template of their own.
_TEMPLATES = ("templated.js", "jinja.js")
_JINJA = ("jinja.mjs", "jinja.LICENSE")
_TOKENIZERS = ("tokenizers.min.mjs", "tokenizers.LICENSE")
_HASH = ("sha256.umd.mjs", "sha256.LICENSE")
# onnxruntime-web's API, its loader and its WebAssembly, in a build without and a build with WebGPU.
_RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm"),
}

# Headers of every response. The first allows the page to run WebAssembly and to call its own server, and nothing else.
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # browsers revalidate every time; unchanged files are answered with 304
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
    ".LICENSE": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",
}

Content = Path | bytes


@dataclass(frozen=True)
class Site:
    """A site.

    Attributes:
        fields: The fields of `site.json` besides files and version.
        contents: Every file but `site.json`, `sw.js` and `_headers`, by its path in the site: a file on the disk, or bytes.
    """

    fields: Mapping[str, Any]
    contents: Mapping[str, Content]

    @cached_property
    def entries(self) -> dict[str, FileEntry]:
        """Size and hash of every file in `contents`, for `site.json`."""
        return {name: _entry(content) for name, content in sorted(self.contents.items())}

    @cached_property
    def files(self) -> dict[str, Content]:
        """Every file, by its path in the site."""
        fields = {**self.fields, "slm": __version__}
        files = {name: entry.model_dump() for name, entry in self.entries.items()}
        version = hashlib.sha256(json.dumps([fields, files], sort_keys=True).encode()).hexdigest()[:16]
        told = _json({**fields, "version": version, "files": files})
        small = {name: entry.sha256 for name, entry in self.entries.items() if _small(name)}
        known = {"version": version, "files": _integrities({**small, SITE_FILE: hashlib.sha256(told).hexdigest()})}
        first = json.dumps(known if self.fields["mode"] == "local" else None)
        worker = f"const SITE = {first};\n".encode() + (HOME / "static" / WORKER_FILE).read_bytes()
        headers = "/*\n" + "".join(f"  {name}: {value}\n" for name, value in HEADERS.items())
        return {**self.contents, SITE_FILE: told, WORKER_FILE: worker, HEADERS_FILE: headers.encode()}

    @property
    def version(self) -> str:
        """A hash that changes whenever a file changes."""
        version: str = json.loads(self.read(SITE_FILE))["version"]
        return version

    @property
    def size(self) -> int:
        """Total size of all files, in bytes."""
        return sum(_entry(content).bytes for content in self.files.values())

    def read(self, name: str) -> bytes:
        """Returns a file's contents."""
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def length(self, name: str) -> int:
        """Returns a file's size in bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def pieces(self, name: str, start: int, end: int, most: int) -> Iterator[bytes]:
        """Yields a file's bytes from `start` to before `end`, at most `most` at a time."""
        content = self.files[name]
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            file.seek(start)
            for at in range(start, end, most):
                yield file.read(min(most, end - at))

    def write(self, out: Path) -> None:
        """Writes the site to a directory, whole or not at all, and replaces an older site.

        Raises:
            SlmError: When the directory holds something else.
        """
        with atomic_directory(out, _ours(out)) as partial:
            for name in self.files:
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.read(name))


def local_site(bundle: Bundle, name: str) -> Site:
    """Returns the site of a bundle that the browser runs.

    Args:
        bundle: The bundle, opened and thereby verified.
        name: The model's name on the page.

    Raises:
        SlmError: When no browser can run the bundle, or a file from npm is missing.
    """
    manifest = bundle.manifest
    if manifest.device == "cuda":
        raise SlmError(f"{bundle.path} was exported for CUDA, which no browser has", "slm export --onnx --device cpu")
    note = large_note(manifest)
    try:
        engine = engine_plan(bundle)
    except NotSupported as problem:
        engine, note = None, slow_note(problem)
    kinds = () if engine else ("wasm", *(["webgpu"] if manifest.device == "webgpu" else []))
    runtimes = {kind: _RUNTIMES[kind] for kind in kinds}
    needed = {*_TOKENIZERS, *_HASH, *(file for files in runtimes.values() for file in files)}
    tokenizer = Tokenizer.load(bundle.path)
    turns = page_turns(tokenizer, bundle.stop_token_ids, _info(bundle))
    rendered = turns is not None and turns["template"] is not None
    needed |= set(_JINJA) if rendered else set()
    model: dict[str, Content] = {
        f"{MODEL}/{file}": bundle.path / file for file in _needed(bundle) if not engine or file != manifest.model
    }
    if (tables := tokenizer_tables(tokenizer)) is not None:
        model |= {f"{MODEL}/{TABLES_FILE}": tables}
        del model[f"{MODEL}/{TOKENIZER_FILE}"]
    contents: dict[str, Content] = {
        **_page(_SHELL + _ENGINE + (_MODULES if engine else ()) + (_TEMPLATES if rendered else ())),
        **{f"{VENDOR}/{file}": path for file, path in vendored(sorted(needed)).items()},
        **model,
        LICENCES_FILE: _licences(bundle, needed).encode(),
    }
    parts = ("api", "glue", "wasm")
    fields = {
        "mode": "local",
        "name": name,
        "runtime": {
            kind: {part: f"{VENDOR}/{file}" for part, file in zip(parts, files, strict=True)}
            for kind, files in runtimes.items()
        },
        "engine": engine,
        "note": note,
        "model": {
            "files": sorted(model),
            "device": manifest.device,
            "precision": manifest.precision,
            "float16": any(layer.dtype == "float16" for layer in manifest.cache),
            "parameters": manifest.parameters,
            "stop_token_ids": list(bundle.stop_token_ids),
            "chat": turns is not None,
            "system": turns is not None and turns["system"],
            "tools": turns is not None and turns["prompts_with_tools"] is not None,
            "tuned": knows_turns(_info(bundle), tokenizer),
            "turns": turns,
        },
    }
    return Site(fields, contents)


def server_site(bundle: Bundle, tokenizer: Tokenizer, name: str, *, key: bool, new_tokens: int) -> Site:
    """Returns the site of an API server.

    Args:
        bundle: The bundle that it serves.
        tokenizer: The bundle's tokenizer.
        name: The model's name in requests.
        key: Whether requests need an API key.
        new_tokens: Maximum new tokens of a completion.
    """
    chat = foreign_template(tokenizer) is not None or None not in map(tokenizer.token_id, (START_OF_TURN, END_OF_TURN))
    model = {"chat": chat, "system": chat, "tools": chat, "tuned": knows_turns(_info(bundle), tokenizer)}
    return Site({"mode": "server", "name": name, "key": key, "new_tokens": new_tokens, "model": model}, _page(_SHELL))


def entity_tag(entry: FileEntry) -> str:
    """Returns a file's ETag."""
    return f'"{entry.sha256[:32]}"'


def content_type(name: str) -> str:
    """Returns the MIME type of a file."""
    return _TYPES.get(Path(name).suffix, "application/octet-stream")


def _page(names: tuple[str, ...]) -> dict[str, Content]:
    return {name: HOME / "static" / name for name in names}


def _needed(bundle: Bundle) -> list[str]:
    """Returns the files of a bundle that the page needs, including licence notices."""
    manifest = bundle.manifest
    graph = [name for name in manifest.files if name.startswith(manifest.model)]
    optional = [name for name in (TOKENIZER_CONFIG_FILE, NOTICE_FILE) if name in manifest.files]
    return [MANIFEST_FILE, TOKENIZER_FILE, *graph, *optional]


def _info(bundle: Bundle) -> dict[str, Any]:
    info = bundle.manifest.provenance.get(INFO_FILE)
    return info if isinstance(info, dict) else {}


def _licences(bundle: Bundle, names: set[str]) -> str:
    """Returns the licences of the site's parts."""
    parts = [
        "This page and the program that made it: slm, Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0"
    ]
    for name, package in packages().items():
        files = sorted(names & package.files.keys())
        if not files:
            continue
        parts.append(f"{name} {package.version}, {package.licence}: {', '.join(files)}")
    if names & {file for files in _RUNTIMES.values() for file in files}:
        mit = read_text(HOME / "mit.txt", "a licence")
        parts.append(f"The licence of onnxruntime-web, whose further notices are in its repository:\n\n{mit}")
    notices = bundle.manifest.notices
    parts.append("The model:\n\n" + ("\n".join(notices) if notices else "as its bundle and its card say"))
    return "\n\n".join(parts) + "\n"


def _entry(content: Content) -> FileEntry:
    if isinstance(content, Path):
        return FileEntry(sha256=sha256_file(content), bytes=content.stat().st_size)
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _small(name: str) -> bool:
    """Returns whether the service worker caches a file; the page stores the others itself."""
    return not name.startswith(f"{MODEL}/") and not name.endswith(".wasm")


def _integrities(hashes: Mapping[str, str]) -> dict[str, str]:
    """Returns hashes in the format of the `integrity` attribute."""
    return {name: f"sha256-{base64.b64encode(bytes.fromhex(each)).decode()}" for name, each in hashes.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def check_site_output(out: Path) -> None:
    """Checks that a site can be written to a directory: nothing else is there.

    Raises:
        SlmError: When the place cannot be written to, or something else is there.
    """
    check_output(out, _ours(out.resolve()))


def _ours(out: Path) -> set[str]:
    """Returns the files of an older site in a directory."""
    if not (out / SITE_FILE).is_file() or not (out / WORKER_FILE).is_file():
        return set()
    try:
        files = read_json(out / SITE_FILE, SITE_FILE).get("files")
    except SlmError:
        return set()
    return {SITE_FILE, WORKER_FILE, HEADERS_FILE, *(files if isinstance(files, dict) else ())}
