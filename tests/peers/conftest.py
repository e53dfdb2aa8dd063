"""Other people's tools, which `make peers` puts under build/peers, one directory each, beside nothing of ours.

Each runs in a process of its own: the same package in another version cannot be imported twice.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.contract import FEW_TOKENS
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import decoder, shipped
from slm.web.npm import packages, vendored
from slm.web.server import SiteServer
from tests.peers.pages import Tab, served, site_of

PEERS = Path(__file__).parents[2] / "build" / "peers"
SCRIPTS = Path(__file__).parent / "scripts"
FAKE_CUDA = Path(__file__).parents[1] / "fake_cuda"
CLIENTS = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
# Chromium runs in a container without its own sandbox.
FLAGS = ["--no-sandbox"]
SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]

Ask = Callable[..., Any]


def environment(*names: str) -> dict[str, str]:
    """The environment in which Python finds peers' packages first; skips the test where one of them is not there."""
    for name in names:
        if not (PEERS / name).is_dir():
            pytest.skip(f"no {name} under build/peers; `make peers` installs it")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str(PEERS / name) for name in names),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def output(command: Sequence[object], environment: dict[str, str], program: str | None = None) -> str:
    """Runs a command, a program on its standard input, and returns what it prints."""
    done = subprocess.run(
        list(map(str, command)), env=environment, input=program, capture_output=True, encoding="utf-8", timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def asker(script: str, *names: str) -> Ask:
    """Returns a function that runs a script with peers' packages first and returns the JSON it prints last."""
    packages = environment(*names)

    def ask(*arguments: object) -> Any:
        return json.loads(output([sys.executable, SCRIPTS / script, *arguments], packages).splitlines()[-1])

    return ask


@pytest.fixture
def in_python() -> Callable[..., str]:
    """Runs a program in Python with peers' packages first: (program, names, arguments) to what it prints."""

    def run(program: str, *names: str, arguments: Sequence[object] = ()) -> str:
        return output([sys.executable, "-", *arguments], environment(*names), program)

    return run


@pytest.fixture
def in_node() -> Callable[..., str]:
    """Runs a program in Node with transformers.js: (program, arguments) to what it prints."""
    modules = PEERS / "transformersjs" / "node_modules"
    if shutil.which("node") is None or not modules.is_dir():
        pytest.skip("no Node, or no transformersjs under build/peers; `make peers` installs the latter")
    Path("node_modules").symlink_to(modules)  # programs from standard input look from where they run
    command = ["node", "--input-type=module", "-"]
    return lambda program, *arguments: output([*command, *arguments], dict(os.environ), program)


@pytest.fixture(scope="session")
def transformers4() -> Ask:
    """transformers 4.57 with the tokenizers and hub packages that it wants."""
    return asker("transformers4.py", "transformers4")


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[[Path, Sequence[str], int], list[list[int]]]:
    """llama.cpp's greedy tokens: (file, prompts, how many) to ids."""
    ask = asker("llama_cpp_greedy.py", "llamacpp")
    return lambda file, prompts, count: ask(file, count, json.dumps(list(prompts)))


@pytest.fixture(scope="session")
def lm_eval() -> Ask:
    """lm-evaluation-harness, with our models and with its own reading of transformers' models."""
    return asker("lm_eval_answers.py", "lmeval")


@dataclass(frozen=True)
class Bundles:
    """Bundles of one checkpoint, and what slm writes with them.

    Attributes:
        home: A directory in which the commands of the documents find them.
        prompts: Token ids that end before, at and after the window, and some of several windows.
        count: How many tokens follow each, or fewer where an end token comes.
    """

    home: Path
    bundles: dict[str, Bundle]
    prompts: list[list[int]]
    count: int

    def path(self, name: str) -> Path:
        """A bundle's directory."""
        return self.bundles[name].path

    def greedy(self, name: str, prompts: list[list[int]] | None = None, *, growing: bool = False) -> list[list[int]]:
        """slm's greedy tokens, an end token left out.

        With `growing`, slm reads prompts in short steps, as if its 8-bit caches grew with each step.
        """
        model = slm.load(self.path(name))
        texts = []
        with pytest.MonkeyPatch.context() as patch:
            if growing:
                patch.setattr(decoder, "PREFILL_CHUNK", FEW_TOKENS)
            for prompt in prompts or self.prompts:
                texts.append(model.complete(prompt, max_new_tokens=self.count, temperature=0).tokens)
        return texts

    def cut(self, texts: list[list[int]]) -> list[list[int]]:
        """Texts of other programs up to their first end token; some leave it in, and pad after it."""
        ends = self.bundles["portable"].stop_token_ids
        return [text[: next((i for i, token in enumerate(text) if token in ends), len(text))] for text in texts]

    def text(self, name: str, prompt: str, count: int) -> str:
        """A prompt and slm's greedy continuation."""
        return prompt + slm.load(self.path(name)).generate(prompt, max_new_tokens=count, temperature=0)


@pytest.fixture(scope="session")
def bundles(shared_checkpoint: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Each kind of bundle of the awkward config with random weights, and one whose window is another."""
    home = tmp_path_factory.mktemp("clients")
    runs = home / "runs" / "tiny"
    # Half characters are each decoder's own matter: the model chooses what can be read, or an end.
    model = load_checkpoint(shared_checkpoint)
    spelt = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    readable = [i for i, text in enumerate(spelt) if text.isascii() and text.isprintable() and text]
    others = set(range(tokenizer.vocab_size)) - {*readable, *model.config.stop_token_ids}
    model.model.embed_tokens.weight.data[sorted(others)] = 0
    save_checkpoint(home / "checkpoint", model, tokenizer, {})
    model.config = model.config.model_copy(update={"sliding_window": 12})
    save_checkpoint(home / "other", model, tokenizer, {})
    rng = np.random.default_rng(0)
    text = TokenRows("random", rng.choice(readable, (4, 60)))
    int8 = Settings(gate=Gate(1))
    int4 = Settings(gate=Gate(None), precision="int4", prefer="size")
    float32 = export_bundle(home / "checkpoint", runs / "onnx")
    portable = export_bundle(home / "checkpoint", runs / "onnx-portable", ExportOptions(target="portable"))
    made = {
        "float32": float32,
        "int8": quantize_bundle(float32, runs / "onnx-int8", text, int8)[0],
        "int8 caches": quantize_bundle(float32, home / "caches", text, replace(int8, cache="int8"))[0],
        "halves": quantize_bundle(float32, home / "halves", text, replace(int8, gate=Gate(None), head="halves"))[0],
        "portable": portable,
        "portable int8": quantize_bundle(portable, runs / "onnx-portable-int8", text, int8)[0],
        "portable int4": quantize_bundle(portable, home / "portable-int4", text, int4, None, text)[0],
        "other": export_bundle(home / "other", home / "other-onnx"),
        "other portable": export_bundle(home / "other", home / "other-portable", ExportOptions(target="portable")),
    }
    prompts = [rng.choice(readable, n).tolist() for n in (3, 15, 16, 17, 33, 50)]
    found = Bundles(home, made, prompts, count=60)
    texts = found.greedy("float32")
    # Texts with variety, several of them some windows long and one that ends by itself, or this proves little.
    assert len({token for text in texts for token in text}) > 30, texts
    assert sum(len(text) == found.count for text in texts) >= 3 and min(map(len, texts)) < found.count, texts
    return found


@pytest.fixture
def example(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """The programs under a heading of docs/clients.md, by number, to be run beside what they open."""
    for path in bundles.home.iterdir():
        Path(path.name).symlink_to(path)

    def find(heading: str, number: int) -> str:
        section = CLIENTS.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        return re.findall(r"```(?:python|js)\n(.*?)```", section, flags=re.DOTALL)[number]

    return find


@pytest.fixture(scope="session")
def genai() -> Ask:
    """onnxruntime-genai."""
    return asker("genai_greedy.py", "genai")


@pytest.fixture(scope="session")
def optimum() -> Ask:
    """optimum's models for onnxruntime, with the transformers that it wants."""
    return asker("optimum_greedy.py", "optimum", "transformers4")


@pytest.fixture(scope="session")
def lm_eval_onnx() -> Ask:
    """lm-evaluation-harness with its own backends for onnxruntime."""
    return asker("lm_eval_onnx.py", "lmeval", "genai")


@dataclass(frozen=True)
class Ran:
    """What a script did in front of the fake CUDA.

    Attributes:
        output: What it printed.
        log: The lines of the device and of onnxruntime.
    """

    output: str
    log: list[str]


@pytest.fixture(scope="session")
def fake_cuda_variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables that put a CUDA which computes nothing before a program."""
    environment("onnxruntime-gpu")
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("the fake CUDA is compiled, and there is no gcc or no nm")
    built = tmp_path_factory.mktemp("fake-cuda")
    output([sys.executable, FAKE_CUDA / "build.py", PEERS / "onnxruntime-gpu", built], dict(os.environ))
    return {"LD_LIBRARY_PATH": str(built), "LD_PRELOAD": str(built / "libfakecuda.so"), "FAKE_CUDA_LOG": "1"}


@pytest.fixture(scope="session")
def fake_cuda(fake_cuda_variables: dict[str, str]) -> Callable[..., Ran]:
    """Runs a script on a bundle with onnxruntime-gpu and a CUDA that computes nothing: (script, bundle, capability).

    Further arguments are the script's; keywords are environment variables.
    """
    fake = environment("onnxruntime-gpu") | fake_cuda_variables

    def run(script: str, bundle: Path, capability: str, *arguments: str, **variables: str) -> Ran:
        command = [sys.executable, str(SCRIPTS / script), str(bundle), *arguments]
        variables = {"FAKE_CUDA_CC": capability.replace(".", "")} | variables
        done = subprocess.run(command, env=fake | variables, capture_output=True, encoding="utf-8", timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return Ran(done.stdout, done.stderr.splitlines())

    return run


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


@pytest.fixture(scope="module")
def story_site(chromium: Any) -> Iterator[SiteServer]:
    """The site of the model that ships."""
    with served(site_of(shipped.model_path())) as server:
        yield server
