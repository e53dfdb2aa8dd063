"""Checks an installation of `slm-edge[cpu]` or `slm-edge[cpu,serve]` on any operating system and processor, without pytest.

    python tests/edge.py

Run it with the Python that slm is installed in. It needs no other file of the repository, and no network. It prints a line for
each check and ends at the first that fails, with a traceback.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

PROMPT, TOKENS = "Once upon a time", 10
# The greedy text of the bundled model. Each token leads by 0.79 nats or more: rounding differs between processors, by less.
TEXT = ", there was a little girl named Lily. She"
# Loss of the bundled model on eight lines of SAMPLE, in nats per token, with a tolerance for other kernels.
SAMPLE = "Once upon a time there was a little dog. He liked to run in the park. One day he saw a big red ball.\n"
LOSS, TOLERANCE = 1.6247, 0.02
# What needs PyTorch.
TORCH = "slm.core.nn"
EDGE = ("slm.core", "slm.runtime", "slm.web", "slm.cli")
COMMANDS = ("generate", "chat", "info", "list", "eval", "bench", "doctor", "web", "serve", "rm", "compare", "run")
START_S = 120


def slm(*arguments: str, code: int = 0, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command with the Python of this process and checks its exit code."""
    command = [sys.executable, "-X", "utf8", "-m", "slm", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def modules() -> None:
    """Every module of the edge part imports, and none uses what a later Python will not have."""
    names = [name for package in EDGE for name in _modules(package)]
    assert len(names) > 100, names
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module=r"slm\.")
        for name in names:
            importlib.import_module(name)
    heavy = [name for name in ("torch", "onnx", "transformers") if name in sys.modules]
    assert not heavy, heavy


def _modules(package: str) -> Iterator[str]:
    yield package
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if found.ispkg and found.name != TORCH:
            yield from _modules(found.name)
        elif not found.ispkg and not found.name.endswith("__main__"):
            yield found.name


def helps() -> None:
    """The commands that need no extra show their help."""
    assert re.match(r"slm, version \d", slm("--version").stdout)
    for command in COMMANDS:
        assert "Usage:" in slm(command, "--help").stdout, command


def described() -> None:
    """The machine and the bundled model are described."""
    found = json.loads(slm("doctor", "--json").stdout)
    assert found, found
    assert slm("list", "--json").returncode == 0
    import slm as package

    assert json.loads(slm("info", str(package.load().about.path), "--json").stdout)


def generated() -> None:
    """The command and the Python API generate the same, known text."""
    done = slm("generate", "--greedy", "-p", PROMPT, "--max-new-tokens", str(TOKENS))
    assert done.stdout.strip() == PROMPT + TEXT, done.stdout
    import slm as package

    model = package.load()
    assert model.generate(PROMPT, temperature=0, max_new_tokens=TOKENS) == TEXT
    assert "".join(model.stream(PROMPT, temperature=0, max_new_tokens=TOKENS)) == TEXT
    rows = model.generate([PROMPT, "One day"], temperature=0, max_new_tokens=TOKENS)
    assert rows[0] == TEXT and rows[1]


def evaluated() -> None:
    """The loss on a text is the known one."""
    Path("text.txt").write_text(SAMPLE * 8, encoding="utf-8", newline="\n")
    loss = json.loads(slm("eval", "--data", "text.txt", "--json").stdout)["loss"]
    assert abs(loss - LOSS) < TOLERANCE, loss


def refused() -> None:
    """A mistake is one line and a hint."""
    done = slm("generate", "no-such-model", "-p", "x", code=1)
    assert re.match(r"error: .*no-such-model.*\n", done.stderr), done.stderr
    assert slm("generate", "--no-such-option", code=2).stderr


def page() -> None:
    """The page of a model is written, where the wheel was built with its npm files."""
    import slm as package
    from slm.web.npm import VENDOR

    if not any(VENDOR.glob("ort.wasm*")):
        raise SkipTest("this installation has no npm files (make web)")
    slm("web", str(package.load().about.path), "--out", "site")
    assert Path("site/index.html").is_file()


def served() -> None:
    """A server answers with the same text, and ends when it is asked to."""
    if find_spec("fastapi") is None:
        raise SkipTest("the extra serve is not installed")
    command = [sys.executable, "-X", "utf8", "-m", "slm", "serve", "--port", "0"]
    with Path("log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = _address(server, Path("log"))
            body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["text"] == TEXT
        finally:
            server.terminate()
            server.wait(60)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", text):
            return found[0]
        assert server.poll() is None, text
        time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace"))


CHECKS: tuple[Callable[[], None], ...] = (modules, helps, described, generated, evaluated, refused, page, served)


def main() -> int:
    """Runs the checks in an empty directory; returns the exit code."""
    import slm as package

    print(f"slm {package.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, contextlib.chdir(home):
        os.environ["SLM_CACHE"] = os.environ["XDG_CACHE_HOME"] = home
        for check in CHECKS:
            begin = time.monotonic()
            try:
                check()
            except SkipTest as reason:
                print(f"skipped {check.__name__}: {reason}", flush=True)
                continue
            print(f"ok {check.__name__}, {time.monotonic() - begin:.1f} s: {check.__doc__}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
