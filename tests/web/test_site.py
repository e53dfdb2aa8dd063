"""What a site consists of, how it is written and how it is served."""

import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from slm.core.chat import chat_ids
from slm.core.errors import SlmError
from slm.core.manifest import Bundle, seal
from slm.core.tokenizer import Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.runtime import shipped
from slm.web import npm
from slm.web.mount import mount
from slm.web.npm import HOME
from slm.web.server import SiteServer
from slm.web.site import HEADERS, POLICY, Site, content_type, local_site, server_site
from slm.web.vocabulary import TABLES_FILE, tokenizer_tables

STATIC = HOME / "static"


def test_every_file_is_told_with_its_hash(shipped_site: Site) -> None:
    told = json.loads(shipped_site.read("site.json"))
    beside = {"site.json", "sw.js", "_headers"}
    assert set(told["files"]) == set(shipped_site.files) - beside
    for name, entry in told["files"].items():
        content = shipped_site.read(name)
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name
    sealed = Bundle.open(shipped.model_path()).manifest.files
    for name in told["model"]["files"]:
        if name == f"model/{TABLES_FILE}":
            assert shipped_site.read(name) == tokenizer_tables(Tokenizer.load(shipped.model_path()))
        elif not name.endswith("manifest.json"):
            assert told["files"][name]["sha256"] == sealed[name.removeprefix("model/")].sha256
    assert {"engine/simd.wasm", "vendor/tokenizers.LICENSE", "licences.txt"} <= set(told["files"])
    # The page's own engine runs this bundle: it reads neither the graph nor onnxruntime-web.
    assert told["runtime"] == {} and told["note"] == "" and f"model/{told['engine']['data']}" in told["files"]
    assert not [name for name in told["files"] if name.startswith("vendor/ort") or name.endswith(".onnx")]


def test_the_page_finds_what_it_names(vendor: None, shared_bundle: Bundle, tmp_path: Path, shipped_site: Site) -> None:
    """Every import, link and script is a file of the site, and nothing names another host."""
    site = local_site(with_template(shared_bundle.path, tmp_path, CHATML), "x")
    for name in [each for each in site.files if re.fullmatch(r"[\w.-]+\.(html|js|css)", each)]:
        text = site.read(name).decode()
        for found in re.findall(r'(?:from|import|src=|href=|register\() ?\(?"([^"]+)"', text):
            file = found.removeprefix("./").partition("?")[0]
            assert (file or "index.html") in site.files, (name, found)
        assert re.findall(r"https?://", text) == [], name
    modules = {path.name for path in STATIC.glob("*.*")}
    assert modules == {name for name in site.files if "/" not in name} - {"site.json", "_headers", "licences.txt"}
    more = {"templated.js", "jinja.js", "vendor/jinja.mjs", "vendor/jinja.LICENSE"}  # for templates from elsewhere only
    assert {name for name in site.files.keys() - shipped_site.files.keys() if not name.startswith("model/")} == more
    assert "@huggingface/jinja" in site.read("licences.txt").decode()


def test_a_site_has_prompts_to_check_the_page_by(vendor: None, shared_bundle: Bundle, tmp_path: Path) -> None:
    bundle = with_template(shared_bundle.path, tmp_path, CHATML)
    turns = json.loads(local_site(bundle, "x").read("site.json"))["model"]["turns"]
    tokenizer = Tokenizer.load(bundle.path)
    assert turns["template"] == CHATML and len(turns["prompts"]) == 4 and len(turns["prompts_with_tools"]) == 3
    for prompt in turns["prompts"]:
        assert prompt["ids"] == chat_ids(tokenizer, prompt["messages"], bundle.stop_token_ids)
    assert turns["ends"] == sorted({*bundle.stop_token_ids, tokenizer.token_id("<end_of_turn>")})


def test_the_policy_stands_in_the_page_too() -> None:
    page = " ".join((STATIC / "index.html").read_text(encoding="utf-8").split())
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert found is not None and POLICY.startswith(found[1] + ";") and POLICY.startswith("default-src 'self';")
    assert "unsafe-inline" not in POLICY and "'unsafe-eval'" not in POLICY and "http" not in POLICY
    assert not re.search(r"<script>|<style>| style=| on\w+=", page)


def test_every_control_has_a_label() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    labelled = set(re.findall(r'<label[^>]* for="([\w-]+)"', page))
    controls = re.findall(r"<(?:input|textarea|select|progress)\b[^>]*>", page)
    assert len(controls) >= 12
    for control in controls:
        name = re.search(r'id="([\w-]+)"', control)
        wrapped = re.search(r"<label[^>]*>\s*" + re.escape(control), page)
        assert wrapped or (name and name[1] in labelled), control
    assert 'role="log" aria-live="polite"' in page and 'role="alert"' in page and '<html lang="en">' in page


def test_colours_can_be_read() -> None:
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3) in both schemes."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    style = (STATIC / "style.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root {([^}]*)}", style)]
    assert len(schemes) == 2
    pairs = [(ink, paper) for ink in ("ink", "dim") for paper in ("paper", "field", "own")]
    for scheme in schemes:
        for ink, paper in [*pairs, ("main", "paper"), ("bad", "paper"), ("on-main", "main")]:
            light, dark = sorted((luminance(scheme[ink]), luminance(scheme[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)
    assert "prefers-reduced-motion" in style


def test_the_version_changes_with_any_file(shipped_site: Site) -> None:
    again = Site(shipped_site.fields, dict(shipped_site.contents))
    assert again.version == shipped_site.version
    for changed in (
        Site({**shipped_site.fields, "name": "other"}, shipped_site.contents),
        Site(shipped_site.fields, {**shipped_site.contents, "style.css": b"*{}"}),
    ):
        assert changed.version != shipped_site.version and changed.read("sw.js") != shipped_site.read("sw.js")


def test_the_service_worker_keeps_small_files_alone(shipped_site: Site) -> None:
    first = shipped_site.read("sw.js").decode().splitlines()[0]
    known = json.loads(first.removeprefix("const SITE = ").removesuffix(";"))
    assert known["version"] == shipped_site.version and "site.json" in known["files"]
    assert not [name for name in known["files"] if name.startswith("model/") or name.endswith(".wasm")]


def bundle_like(path: Path, tmp_path: Path, **changes: Any) -> Bundle:
    copy = tmp_path / "bundle"
    shutil.copytree(path, copy, dirs_exist_ok=True)
    return seal(copy, Bundle.open(path).manifest.model_copy(update=changes))


CHATML = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)


def with_template(path: Path, tmp_path: Path, template: str) -> Bundle:
    """A bundle with another chat template."""
    bundle = bundle_like(path, tmp_path)
    file = bundle.path / TOKENIZER_CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return seal(bundle.path, bundle.manifest)


def test_what_no_browser_runs(vendor: None, shared_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="CUDA"):
        local_site(bundle_like(shared_bundle.path, tmp_path, device="cuda"), "x")
    site = local_site(bundle_like(shared_bundle.path, tmp_path, device="webgpu"), "x")
    told = json.loads(site.read("site.json"))
    assert set(told["runtime"]) == {"wasm", "webgpu"}  # and where there is no GPU the processor does it
    assert {file for files in told["runtime"].values() for file in files.values()} <= set(told["files"])


@pytest.mark.parametrize(
    ("template", "chat", "system", "tools"),
    [
        (None, True, True, True),
        (
            "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
            "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
            True,
            False,
            True,
        ),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", True, True, True),
        ("{{ raise_exception('no') }}", False, False, False),
        (
            "{% for m in messages %}{% if m.content is string and '<tool_call>' in m.content %}{{ raise_exception('no') }}"
            "{% endif %}[{{ m.content }}]{% endfor %}",
            True,
            True,
            False,
        ),
    ],
)
def test_which_models_can_be_talked_with(
    vendor: None,
    shared_bundle: Bundle,
    tmp_path: Path,
    template: str | None,
    chat: bool,
    system: bool,
    tools: bool,
) -> None:
    path = shared_bundle.path
    bundle = bundle_like(path, tmp_path) if template is None else with_template(path, tmp_path, template)
    model = json.loads(local_site(bundle, "x").read("site.json"))["model"]
    assert (model["chat"], model["system"], model["tools"]) == (chat, system, tools)
    assert model["tuned"] == (template is not None)


def test_what_is_missing_from_npm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: None) -> None:
    altered = tmp_path / "vendor"
    shutil.copytree(npm.VENDOR, altered)
    monkeypatch.setattr(npm, "VENDOR", altered)
    name = "tokenizers.min.mjs"
    (altered / name).write_bytes((altered / name).read_bytes().replace(b"export", b"Export", 1))
    with pytest.raises(SlmError, match=f"{name} is not the file"):
        npm.vendored([name])
    (altered / name).unlink()
    with pytest.raises(SlmError, match=f"{name} from npm is missing") as raised:
        local_site(Bundle.open(shipped.model_path()), "x")
    assert raised.value.hint is not None and "make web" in raised.value.hint


def test_fetching_without_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(npm, "VENDOR", tmp_path / "vendor")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlmError, match=r"no npm to fetch onnxruntime-web@1\.30\.0"):
        npm.fetch()


def test_an_archive_that_was_not_pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(npm, "VENDOR", tmp_path / "vendor")
    fake = tmp_path / "npm"
    fake.write_text('#!/bin/sh\nfor last; do :; done\necho other > "$last/a.tgz"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlmError, match="is not the archive"):
        npm.fetch()
    assert not (tmp_path / "vendor").exists()


def asked(server: SiteServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, path, skip_host=False)  # the path as it stands, whatever is wrong with it
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_headers_and_types(server: SiteServer) -> None:
    for name in server.site.files:
        status, headers, content = asked(server, f"/{name}")
        assert status == 200 and content == server.site.read(name)
        assert headers["content-type"] == content_type(name)
        assert "octet" not in headers["content-type"] or name.startswith(("model/onnx/", f"model/{TABLES_FILE}"))
        for header, value in HEADERS.items():
            assert headers[header.lower()] == value
    status, headers, content = asked(server, "/?a=b")
    assert (status, content) == (200, server.site.read("index.html")) and headers["content-type"].startswith(
        "text/html"
    )
    assert content_type("x.mjs").startswith("text/javascript") and content_type("x.wasm") == "application/wasm"
    status, headers, content = asked(server, "/style.css", "HEAD")
    assert (status, content) == (200, b"") and int(headers["content-length"]) == len(server.site.read("style.css"))


def test_what_has_not_changed_is_not_sent_again(server: SiteServer) -> None:
    tag = asked(server, "/app.js")[1]["etag"]
    assert asked(server, "/app.js", If_None_Match=tag)[0::2] == (304, b"")
    assert asked(server, "/app.js", If_None_Match='"other"')[0] == 200
    assert "etag" not in asked(server, "/site.json")[1]


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/vendor/../../site.py",
        "//etc/passwd",
        "/vendor/..%2f..%2fsite.py",
        "/model/%00",
        "/vendor",
        "/model/",
        "/\\..\\site.py",
        "/npm.json",
        "/vendor/ort.jspi.min.mjs",
    ],
)
def test_no_path_leads_out(server: SiteServer, path: str) -> None:
    status, headers, content = asked(server, path)
    assert (status, content) == (404, b"not here\n") and headers["content-security-policy"] == POLICY


def test_other_methods_are_refused(server: SiteServer) -> None:
    assert asked(server, "/", "POST", Content_Length="0")[0] == 501


def test_the_command_writes_a_site(slm: Callable[..., Any], vendor: None, shared_bundle: Bundle) -> None:
    result = slm("web", shared_bundle.path, "--name", "mine", "--out", "site", "--json")
    assert result.code == 0, result.err
    told, site = json.loads(result.out), json.loads(Path("site/site.json").read_text())
    found = {path.relative_to("site").as_posix() for path in Path("site").rglob("*") if path.is_file()}
    assert found == {*site["files"], "site.json", "sw.js", "_headers"} and told["files"] == len(found)
    assert told["bytes"] == sum(path.stat().st_size for path in Path("site").rglob("*") if path.is_file())
    assert (site["name"], site["version"]) == ("mine", told["version"])
    for line in HEADERS.items():
        assert "  {}: {}\n".format(*line) in Path("site/_headers").read_text()
    notices = Path("site/licences.txt").read_text()
    assert "@huggingface/tokenizers 0.2.0, Apache-2.0" in notices and "onnxruntime" not in notices
    # An older site is replaced, and only that.
    assert slm("web", "--out", "site").code == 0
    assert json.loads(Path("site/site.json").read_text())["name"] == "stories"
    Path("site/mine.txt").write_text("x")
    result = slm("web", "--out", "site")
    assert result.code == 1 and "contains other files: mine.txt" in result.err
    assert not [path for path in Path().iterdir() if path.name.startswith(".site")]


def test_the_command_refuses_what_it_cannot_serve(
    slm: Callable[..., Any], vendor: None, shared_checkpoint: Path, tmp_path: Path
) -> None:
    assert "not a bundle" in slm("web", shared_checkpoint).err
    broken = tmp_path / "broken"
    shutil.copytree(shipped.model_path(), broken)
    with (broken / "tokenizer.json").open("a") as file:
        file.write(" ")
    result = slm("web", broken, "--out", "site")
    assert result.code == 1 and "tokenizer.json has" in result.err and not Path("site").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = slm("web", "--port", taken.getsockname()[1])
    error, hint = result.err.strip().splitlines()[-2:]
    assert result.code == 1 and "in use" in error and hint.startswith("hint: choose another --port")


@pytest.mark.parametrize(("host", "spelt"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("0.0.0.0", "0.0.0.0")])
def test_it_serves_until_it_is_stopped(vendor: None, host: str, spelt: str) -> None:
    command = [sys.executable, "-m", "slm", "web", "--port", "0", "--host", host, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        found = re.fullmatch(rf"http://{re.escape(spelt)}:(\d+)/", url)
        assert found is not None
        connection = http.client.HTTPConnection(host, int(found[1]), timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 0 and "stopped" in rest and "Traceback" not in rest
        assert ("over https only" in rest) == (host == "0.0.0.0")
    finally:
        process.kill()
        process.wait()


def test_the_page_on_a_server_that_answers(shared_bundle: Bundle, tokenizer: Tokenizer) -> None:
    """It needs nothing from npm and nothing of the model."""
    site = server_site(shared_bundle, tokenizer, "mine", key=True, new_tokens=99)
    told = json.loads(site.read("site.json"))
    assert (told["mode"], told["name"], told["key"], told["new_tokens"]) == ("server", "mine", True, 99)
    assert not [name for name in site.files if "/" in name or name == "worker.js"]
    assert site.read("sw.js").startswith(b"const SITE = null;\n")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_api_route("/app.js", lambda: "the server's own comes first")
    mount(app, site)
    client = TestClient(app)
    assert client.get("/").text == (STATIC / "index.html").read_text(encoding="utf-8")
    answer = client.get("/remote.js")
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answer.headers["content-security-policy"] == POLICY
    assert client.get("/app.js").json().startswith("the server's")
    for path in ("/worker.js", "/_headers", "/vendor/ort.wasm.min.mjs", "/..%2fsite.py"):
        assert client.get(path).status_code == 404, path
    assert client.post("/").status_code == 405
