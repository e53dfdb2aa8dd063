"""`slm-edge[cuda]` in an environment of its own: the wheels that the extra asks for, and nothing else, open CUDA.

The environment is put together without a network, from the wheels that `make peers` downloads and from the base installation's
packages. It has no onnxruntime for the CPU, no PyTorch, and no library of CUDA but those wheels'.
"""

import json
import os
import subprocess
import tomllib
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slm

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "peers" / "onnxruntime-gpu"
UV = ROOT / "build" / "uv" / "bin" / "uv"
# cuDNN, which slm's graphs do not use, takes a gigabyte and is not among the wheels; what it requires stands in its metadata.
CUDNN = ("nvidia-cudnn-cu13", ["nvidia-cublas"])
RUN = "import sys; from slm.cli.main import main; main(sys.argv[1:])"


def wanted(extra: str, wheels: dict[str, Distribution]) -> set[str]:
    """Returns the names of all distributions that slm with an extra requires, by their own metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *project["optional-dependencies"][extra]]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        text = waiting.pop()
        if text in seen:
            continue
        seen.add(text)
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        found.add(name)
        if name == CUDNN[0]:
            waiting += CUDNN[1]
            continue
        try:
            there = wheels.get(name) or distribution(name)
        except PackageNotFoundError:
            continue
        for each in map(Requirement, there.requires or []):
            extras = requirement.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": one}) for one in extras):
                waiting.append(str(each).partition(";")[0])
    return found


def link(there: Distribution, site: Path) -> None:
    """Puts a distribution's files into an environment, as links."""
    for name in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(there.locate_file(name)))
        place = site / name
        if not place.exists():
            place.symlink_to(source)
        elif source.is_dir() and place.resolve() != source.resolve():
            raise AssertionError(f"{name} comes from two places")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    if not WHEELS.is_dir():
        pytest.skip("no onnxruntime-gpu under build/peers; `make peers` installs it")
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, symlinks=True, with_pip=False)
    [site] = home.glob("lib/python*/site-packages")
    wheels = {canonicalize_name(each.name): each for each in distributions(path=[str(WHEELS)])}
    for name in sorted(wanted("cuda", wheels)):
        if name != CUDNN[0]:
            link(wheels.get(name) or distribution(name), site)
    (site / "slm").symlink_to(Path(str(slm.__file__)).parent)
    return home / "bin" / "python"


def run(python: Path, fake: dict[str, str], *arguments: str) -> Any:
    """Runs `slm ARGUMENTS` there with compute capability 7.5."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    command = [str(python), "-c", RUN, *arguments]
    environment = kept | fake | {"FAKE_CUDA_CC": "75"}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=280, check=False)


def test_the_installed_wheels_alone_open_cuda(python: Path, fake_cuda_variables: dict[str, str]) -> None:
    done = run(python, fake_cuda_variables, "doctor", "--json")
    report = json.loads(done.stdout)
    installed = report["packages"]
    assert installed["onnxruntime-gpu"] and not installed["onnxruntime"] and not installed["torch"]
    provider = report["providers"]["CUDAExecutionProvider"]
    # The session opens and a step is taken, whose numbers the fake device does not compute.
    assert provider["loads"] and "one step differs from the reference" in provider["error"], provider
    [problem] = report["problems"]
    assert "does not run a step correctly" in problem


def test_a_model_generates_there(
    python: Path, fake_cuda_variables: dict[str, str], shared_checkpoint: Path, tmp_path: Path
) -> None:
    from slm.export.bundle import ExportOptions, export_bundle

    bundle = export_bundle(shared_checkpoint, tmp_path / "b", ExportOptions(device="cuda")).path
    asked = ("generate", str(bundle), "--device", "cuda", "-p", "x", "--max-new-tokens", "2", "--greedy")
    done = run(python, fake_cuda_variables, *asked)
    assert " on CUDA, " in done.stderr and "fake-cuda launch" in done.stderr, done.stderr[-2000:]


def test_without_the_libraries_of_the_extra_cuda_does_not_load(
    python: Path, fake_cuda_variables: dict[str, str], tmp_path: Path
) -> None:
    """The control: `onnxruntime-gpu` without its extras has no cuBLAS."""
    [site] = python.parent.parent.glob("lib/python*/site-packages")
    nvidia = site / "nvidia"
    target = nvidia.readlink()
    nvidia.unlink()
    try:
        report = json.loads(run(python, fake_cuda_variables, "doctor", "--json").stdout)
    finally:
        nvidia.symlink_to(target)
    provider = report["providers"]["CUDAExecutionProvider"]
    assert not provider["loads"] and "libcublas" in provider["error"], provider
    assert any("installs CUDA's libraries" in problem for problem in report["problems"])


def test_pip_finds_one_set_for_onnxruntime_and_pytorch() -> None:
    """All pins are taken: with others the newest PyTorch that fits is one for another CUDA."""
    if not UV.is_file():
        pytest.skip("no uv under build/uv; `make test-oldest` installs it")
    constraints = ROOT / "constraints-cuda.txt"
    extras = [word for extra in ("cuda", "train", "serve", "tools") for word in ("--extra", extra)]
    command = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--universal", *extras]
    pins = ["--constraint", constraints, "--constraint", ROOT / "constraints.txt"]
    done = subprocess.run(
        [*command, *pins, ROOT / "pyproject.toml"], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode and "No solution found" not in done.stderr:
        pytest.skip(f"no package index to ask: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {line.partition(" ")[0] for line in done.stdout.splitlines()}
    pinned = {line for line in constraints.read_text().splitlines() if line and not line.startswith("#")}
    assert pinned <= chosen, pinned - chosen
    assert not any(line.startswith("onnxruntime==") or "-cu12" in line for line in chosen)
