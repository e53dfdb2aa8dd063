"""The container file: what it says is well-formed, and what it runs makes a server without PyTorch that needs to write nowhere.

No container engine is needed: the commands of the first stage run here, in directories that stand for the image's.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Containerfile"
# docs.docker.com/reference/dockerfile
KEYWORDS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN", "SHELL",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
# Directories of the image, the longer names first.
PLACES = ("/opt/slm", "/wheels", "/models", "/source")


@dataclass(frozen=True)
class Instruction:
    """One line of the file."""

    keyword: str
    rest: str
    stage: int

    @property
    def words(self) -> list[str]:
        """Its arguments, where they are a JSON array."""
        found: list[str] = json.loads(self.rest[self.rest.index("[") :])
        return found


def parsed(text: str) -> list[Instruction]:
    """Returns the instructions of a container file.

    Raises:
        ValueError: When a line is none.
    """
    found: list[Instruction] = []
    stage = -1
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        keyword, _, rest = line.partition(" ")
        if keyword not in KEYWORDS or not rest.strip():
            raise ValueError(f"no instruction: {line}")
        stage += keyword == "FROM"
        if stage < 0:
            raise ValueError("FROM does not come first")
        if keyword in ("CMD", "ENTRYPOINT") and not isinstance(json.loads(rest), list):
            raise ValueError(f"no array: {line}")
        found.append(Instruction(keyword, rest.strip(), stage))
    return found


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    return parsed(FILE.read_text(encoding="utf-8"))


def only(instructions: list[Instruction], keyword: str) -> Instruction:
    (found,) = (each for each in instructions if each.keyword == keyword and each.stage == 1)
    return found


@pytest.mark.parametrize("line", ["RUNN true", "RUN", "CMD slm serve", "COPY"])
def test_what_is_no_container_file_is_noticed(line: str) -> None:
    with pytest.raises(ValueError):
        parsed(f"FROM scratch\n{line}\n")


def test_it_is_well_formed(instructions: list[Instruction]) -> None:
    stages = [each.rest for each in instructions if each.keyword == "FROM"]
    assert len(stages) == 2 and stages[0].endswith(" AS build")
    for copied in (each for each in instructions if each.keyword == "COPY" and each.stage == 1):
        assert copied.rest.startswith("--from=build ")  # nothing of the checkout reaches the image
    user, group = only(instructions, "USER").rest.split(":")
    assert int(user) > 0 and int(group) > 0
    assert f"--uid {user} " in only(instructions, "RUN").rest
    assert only(instructions, "STOPSIGNAL").rest == "SIGTERM"
    (minor,) = {re.match(r"python:3\.(\d+)-slim", stage)[1] for stage in stages}  # type: ignore[index]
    assert f">=3.{minor}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_it_starts_takes_these_options(instructions: list[Instruction]) -> None:
    from slm.cli.commands.serve import serve

    words = only(instructions, "ENTRYPOINT").words + only(instructions, "CMD").words
    assert words[:2] == ["slm", "serve"]
    context = serve.make_context(
        "serve", [str(ROOT) if word == "/models" else word for word in words[2:]], resilient_parsing=True
    )
    assert context.params["host"] == "0.0.0.0"
    assert only(instructions, "EXPOSE").rest == str(context.params["port"])
    assert f":{context.params['port']}/health" in only(instructions, "HEALTHCHECK").words[-1]


@pytest.fixture(scope="module")
def image(instructions: list[Instruction], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first stage makes, by the commands that it says."""
    root = tmp_path_factory.mktemp("image")
    source = root / "source"
    ignored = [line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (
            not any(fnmatch.fnmatch(name, each) or name.startswith(each + "/") for each in ignored)
            and (ROOT / name).is_file()
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PIP_NO_COMPILE"] = "1"  # most modules are never imported here
    for command in (each.rest for each in instructions if each.keyword == "RUN" and each.stage == 0):
        here = command
        for place in PLACES:
            here = re.sub(rf"(?<![\w.]){place}\b", str(root) + place, here)
        here = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", here)
        done = subprocess.run(["sh", "-c", here], capture_output=True, text=True, cwd=source, env=environment)
        if "Temporary failure in name resolution" in done.stderr or "No matching distribution" in done.stderr:
            pytest.skip(f"no package index: {done.stderr.strip()[-200:]}")
        assert done.returncode == 0, f"{here}\n{done.stderr}"
    return root


def size(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())


@pytest.mark.long
def test_there_is_no_torch_in_it(image: Path) -> None:
    packages = {path.name for path in (image / "opt/slm").glob("lib/python3.*/site-packages/*")}
    assert {"onnxruntime", "fastapi", "uvicorn", "llguidance", "slm"} <= packages
    assert not packages & {"torch", "onnx", "transformers", "datasets", "pip"}
    for name in ("torch", "onnx"):
        done = subprocess.run(
            [str(image / "opt/slm/bin/python"), "-c", f"import {name}"], capture_output=True, text=True
        )
        assert "ModuleNotFoundError" in done.stderr
    # Measured 243 MB with the versions of constraints.txt; PyTorch alone takes more.
    found = size(image / "opt/slm")
    assert found < 320e6


@pytest.fixture
def server(image: Path, instructions: list[Instruction]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """What the image starts, where nothing can be written if that can be had here; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = only(instructions, "ENTRYPOINT").words + only(instructions, "CMD").words
    swapped = {
        "slm": f"{image}/opt/slm/bin/slm",
        "/models": f"{image}/models",
        "8000": str(port),
        "0.0.0.0": "127.0.0.1",
    }
    command = [swapped.get(word, word) for word in words]
    read_only = "mount --make-rprivate / && mount -o remount,bind,ro / && exec "
    if subprocess.run(["unshare", "--mount", "sh", "-c", f"{read_only} true"], capture_output=True).returncode == 0:
        touch = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"{read_only} touch {image}/x"], capture_output=True, text=True
        )
        assert "Read-only" in touch.stderr
        command = ["unshare", "--mount", "sh", "-c", read_only + shlex.join(command)]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/", env={"PATH": os.environ["PATH"]})
    end = time.monotonic() + 60
    while time.monotonic() < end and started.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2)
            break
        except OSError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}", started
    if started.poll() is None:
        started.kill()
    started.communicate()


@pytest.mark.long
def test_what_it_starts_answers_and_stops(
    server: tuple[str, subprocess.Popen[str]], instructions: list[Instruction]
) -> None:
    address, process = server
    assert process.poll() is None, process.communicate()[1]
    body = {"model": "model", "prompt": "One day", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    answer: Any = json.load(urllib.request.urlopen(request, timeout=60))
    assert answer["choices"][0]["text"].startswith(", a little girl")
    port = address.rpartition(":")[2]
    check = [word.replace("8000", port) for word in only(instructions, "HEALTHCHECK").words]
    assert subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143  # as of every command that was told to end
    assert subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode != 0
