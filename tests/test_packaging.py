"""The wheel holds every file of the package, and the edge installation of it answers without torch and onnx."""

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# Directories with Python files that are no part of the package.
OUTSIDE = {"benchmarks", "deploy", "docs", "examples", "src", "tests"}
TRACKED = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
SHIPPED = ("*.py", "*.yaml", "*.toml", "*.txt", "*.jsonl", "*.json", "*.onnx", "*.onnx_data", "py.typed")
SHIPPED += ("LICENSE", "MODEL_CARD.md", "loss.png", "*.html", "*.css", "*.js", "*.svg")


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def tracked() -> list[str]:
    """Returns the files of the repository: those that git has and those that it would take."""
    names = run(*TRACKED, cwd=ROOT).stdout.split("\n")
    return [name for name in names if name and (ROOT / name).is_file()]


def homes() -> dict[str, str]:
    """Returns where each package of the wheel lies: every directory at the root that has Python files, but those outside."""
    roots = {name.partition("/")[0] for name in tracked() if "/" in name and name.endswith(".py")}
    return {"slm": "src/slm"} | {f"slm/{name}": name for name in roots - OUTSIDE}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that nothing built before can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    wanted = {
        f"{package}/{path.relative_to(ROOT / home).as_posix()}"
        for package, home in homes().items()
        for pattern in SHIPPED
        for path in (ROOT / home).rglob(pattern)
        # The engine's sources are for contributors: its modules are among the page's files.
        if "__pycache__" not in path.parts and path.parent != ROOT / "web" / "engine"
    } | {f"slm/web/static/engine/{name}.wasm" for name in ("relaxed", "simd")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == wanted
    assert not {name for name in found if not name.startswith("slm/")}  # never a bare `core` or `train`


def test_a_new_package_needs_no_list(tmp_path: Path) -> None:
    """`setup.py` finds it, and without its `__init__.py` it is nothing that installs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "src/slm/__init__.py", "src/slm/version.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("fresh/__init__.py", "fresh/deep/__init__.py", "fresh/deep/module.py", "other/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    run(sys.executable, "setup.py", "--quiet", "build", cwd=tmp_path)
    made = {path.relative_to(tmp_path / "build/lib").as_posix() for path in (tmp_path / "build/lib").rglob("*.py")}
    wanted = {"fresh/__init__.py", "fresh/deep/__init__.py", "fresh/deep/module.py", "__init__.py", "version.py"}
    assert made == {f"slm/{name}" for name in wanted}


def test_make_watches_every_package(tmp_path: Path) -> None:
    """The strict editable install is renewed when any of these files appears or goes."""
    (tmp_path / "Makefile").write_text(
        (ROOT / "Makefile").read_text(encoding="utf-8") + "\nshow:\n\t@printf '%s\\n' $(FILES)\n", encoding="utf-8"
    )
    watched = run("make", "--silent", "--file", tmp_path / "Makefile", "show", cwd=ROOT).stdout.splitlines()
    inside = tuple(f"{home}/" for home in homes().values())
    assert {name for name in tracked() if name.startswith(inside) and name.endswith((".py", ".yaml", ".toml"))} <= set(
        watched
    )


def required(wheel: Path) -> dict[str, Distribution]:
    """Returns what the wheel with the extra `cpu` requires, and what that requires, from this environment."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    left = [(Requirement(text), frozenset({"cpu"})) for text in wanted]
    found: dict[str, Distribution] = {}
    while left:
        requirement, extras = left.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = canonicalize_name(requirement.name)
        if name == "onnxruntime" and (Path(sys.prefix) / ".gpu").exists():
            name = "onnxruntime-gpu"
        if name in found:
            continue
        found[name] = distribution(name)
        assert requirement.specifier.contains(found[name].version, prereleases=True), requirement
        left += [(Requirement(text), frozenset(requirement.extras)) for text in found[name].requires or ()]
    return found


@pytest.fixture(scope="module")
def edge(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, links to what `slm-edge[cpu]` requires, and nothing else."""
    home = tmp_path_factory.mktemp("edge") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-compile")
    run(*pip, "--no-deps", "--no-index", wheel)
    packages = next((home / "lib").glob("python*/site-packages"))
    for each in required(wheel).values():
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            (packages / name).symlink_to(Path(str(each.locate_file(name))))
    return home / "bin"


def test_the_edge_installation_answers(edge: Path, tmp_path: Path) -> None:
    absent = (
        "import importlib.util as u; print([n for n in ('torch', 'onnx', 'transformers', 'peft') if u.find_spec(n)])"
    )
    assert run(edge / "python", "-c", absent).stdout.strip() == "[]"
    assert "Commands:" in run(edge / "slm", "--help", cwd=tmp_path).stdout
    said = run(edge / "slm", "generate", "--greedy", "-p", "One day", "--max-new-tokens", "20", cwd=tmp_path)
    assert said.stdout.startswith("One day") and len(said.stdout) > 30
    assert "int8" in said.stderr


def test_every_edge_module_imports_without_the_extras(edge: Path) -> None:
    modules = [
        f"slm.{home.name}.{path.stem}"
        for home in (ROOT / "runtime", ROOT / "cli", ROOT / "core", ROOT / "web")
        for path in home.glob("*.py")
    ]
    run(edge / "python", "-c", ";".join(f"import {module}" for module in modules if "__init__" not in module))


def test_what_needs_an_extra_says_so(edge: Path, tmp_path: Path, shared_checkpoint: Path) -> None:
    for arguments, extra in (
        (["train"], "train"),
        (["export", "--onnx", shared_checkpoint], "convert"),
        (["demo"], "train"),
    ):
        done = subprocess.run([edge / "slm", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert f"slm-edge[{extra}]" in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick_to_import() -> None:
    """`slm --help` imports nothing that takes long."""
    heavy = "('torch', 'onnx', 'onnxruntime', 'numpy')"
    program = f"import sys; import slm.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, "-c", program).stdout.strip() == "[]"
