"""Processes: each is started in one place, and nothing that lies in the working directory is imported or run."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slm
from slm.core import child
from slm.core.manifest import Bundle
from slm.core.template import render
from slm.core.tokenizer import Tokenizer

# What starts a process. multiprocessing and concurrent.futures start interpreters of their own.
STARTS = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"},
    "os": {"system", "popen", "posix_spawn", "posix_spawnp", "startfile", "fork", "forkpty"},
    "sys": {"executable"},
    "multiprocessing": None,
    "runpy": None,
    "pty": None,
}
NAMES = {
    "ProcessPoolExecutor",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "subprocess_exec",
    "subprocess_shell",
}
ONLY = "core/child.py"
# A child of `core/child.py` that tries each schema in a copy of itself, which starts no interpreter.
FORKS = {"runtime/schema_check.py": ["os.fork"]}


@pytest.fixture(autouse=True)
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `slm` tells interpreters that libraries start would guard the ones that these tests start as well."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


def starts(source: str) -> list[str]:
    """Returns what in a module starts a process."""
    found = []
    tree = ast.parse(source)
    types = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)
    }  # Popen[bytes] starts nothing
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in STARTS:
                known = STARTS[module]
                if known is None or name in known or (module == "os" and name.startswith(("exec", "spawn"))):
                    found.append(f"{module}.{name}")
            case ast.Attribute(attr=name) if name in NAMES:
                found.append(name)
            case ast.Import(names=names):
                found += [each.name for each in names if STARTS.get(each.name.partition(".")[0], ()) is None]
                # Under another name it would not be seen above.
                found += [f"{each.name} as {each.asname}" for each in names if each.asname and each.name in STARTS]
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in STARTS:
                known = STARTS[module.partition(".")[0]]
                found += [f"{module}.{each.name}" for each in names if known is None or each.name in known]
            case ast.ImportFrom(names=names):
                found += [each.name for each in names if each.name in NAMES]
    return found


def sources() -> Iterator[tuple[str, str]]:
    package = Path(slm.__file__ or "").parent
    for file in sorted(package.rglob("*.py")):
        yield file.relative_to(package).as_posix(), file.read_text(encoding="utf-8")


def test_every_process_is_started_in_one_place() -> None:
    found = {name: starts(source) for name, source in sources()}
    assert len(found) > 150
    assert {name: what for name, what in found.items() if what and name != ONLY} == FORKS
    assert set(found[ONLY]) == {"sys.executable", "subprocess.Popen", "subprocess.run"}


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['x'])",
        "from subprocess import Popen",
        "import subprocess as s",
        "import os\nos.execvp('x', [])",
        "import os\nos.system('x')",
        "import sys\nprint(sys.executable)",
        "from multiprocessing import get_context",
        "import multiprocessing.pool",
        "from concurrent.futures import ProcessPoolExecutor",
        "import asyncio\nasyncio.create_subprocess_exec('x')",
    ],
)
def test_a_process_that_is_started_elsewhere_is_found(source: str) -> None:
    assert starts(source)


MODULES = {
    *sys.stdlib_module_names,
    *("jinja2", "numpy", "tokenizers", "click", "rich", "pydantic", "onnxruntime", "torch", "markupsafe"),
}
HOSTILE = "import builtins\nbuiltins.open({mark!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(9)\n"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A stranger's directory, in which the test works: every module that could be asked for lies there. Returns which ran."""
    directory, mark = tmp_path / "stranger", tmp_path / "ran"
    directory.mkdir()
    for name in MODULES:
        (directory / f"{name}.py").write_text(HOSTILE.format(mark=str(mark)))
    (directory / "sitecustomize.py").write_text(HOSTILE.format(mark=str(mark)))
    (directory / "pyvenv.cfg").write_text("home = .\n")
    for name in ("npm", "sysctl", "uname"):
        (directory / name).write_text(f"#!/bin/sh\necho {name} >> {mark}\n")
        (directory / name).chmod(0o755)
    (directory / "matplotlibrc").write_text("this is: refused\n")
    monkeypatch.chdir(directory)
    return lambda: mark.read_text() if mark.exists() else ""


def test_the_stranger_means_harm(stranger: Callable[[], str]) -> None:
    """The negative control: without isolation, what lies there does run."""
    subprocess.run([sys.executable, "-c", "import jinja2"], check=False, stderr=subprocess.DEVNULL)
    assert stranger() in ("jinja2\n", "linecache\n")  # from Python 3.13 on, `-c` imports linecache first


def test_children_import_nothing_from_the_working_directory(
    stranger: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend("")  # as `python -c` and notebooks have it
    monkeypatch.syspath_prepend(str(Path.cwd()))  # as `python -m` has it
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setenv("PYTHONSTARTUP", "json.py")
    done = child.run("import jinja2, json, os, slm.core.chat; print(os.getcwd(), sys.argv[1:])", "a b", "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/ ['a b', '']\n", "")
    assert stranger() == ""


def test_a_child_imports_what_this_process_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a directory that only this process's module path names, as after `pip install --target` with PYTHONPATH."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "only_here.py").write_text("print('found')")
    assert child.run("import only_here").returncode == 1
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert child.run("import only_here").stdout == "found\n"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert child.run("import only_here").returncode == 1


def test_slm_is_found_where_it_was_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the working directory: its code runs already."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "slm").symlink_to(Path(slm.__file__ or "").parent)
    monkeypatch.chdir(tmp_path / "target")
    program = "from slm.core import child; print(child.run('import slm; print(slm.__file__)').stdout)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "target" / "slm" / "__init__.py")


def test_programs_are_not_looked_for_in_the_working_directory(
    stranger: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", "../stranger"]))
    assert child.program("npm") is None
    monkeypatch.setenv("PATH", os.pathsep.join(["", "/usr/bin", "/bin"]))
    assert child.program("sh") in ("/usr/bin/sh", "/bin/sh")


def test_settings_of_matplotlib_are_not_read_from_the_working_directory(stranger: Callable[[], str]) -> None:
    plain = "from matplotlib.figure import Figure"
    for program, warns in ((plain, True), ("from slm.core.figures import new_figure; new_figure(2, 2)", False)):
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
        assert ("matplotlibrc" in done.stderr) is warns  # which warns of a setting that matplotlib does not know


SCRIPT = "import sys\nfrom slm.cli.main import main\nsys.exit(main())\n"


@pytest.fixture
def foreign_bundle(shared_checkpoint: Path, tmp_path: Path) -> Path:
    """A bundle with a chat template of its own, which a child renders."""
    import shutil

    from slm.export.bundle import export_bundle

    copy = tmp_path / "foreign"
    shutil.copytree(shared_checkpoint, copy)
    ours = Tokenizer.load(shared_checkpoint)
    Tokenizer(ours.backend, ours.config | {"chat_template": "{{ messages[0].content }}!"}).save(copy)
    return export_bundle(copy, tmp_path / "foreign-onnx").path


def test_no_command_imports_from_the_working_directory(
    stranger: Callable[[], str], foreign_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "slm").write_text(SCRIPT)
    # What Python imports before it looks for the package of `python -m`: from the working directory, whatever slm does.
    early = subprocess.run(
        [sys.executable, "-P", "-c", "import runpy, sys; print(*sys.modules)"], capture_output=True, text=True
    )
    for name in set(early.stdout.split()) - {"json"}:
        Path(f"{name}.py").unlink(missing_ok=True)
    assert len(list(Path().glob("*.py"))) > 200
    generate = ("generate", foreign_bundle, "--instruct", "-p", "hi", "--max-new-tokens", "2")
    bench = ("bench", foreign_bundle, "--prompt", "4", "--batch", "1", "--new", "2", "--rounds", "1", "--json")
    script = str(tmp_path / "bin" / "slm")
    for start, command in (((script,), generate), (("-m", "slm"), bench), (("-u", "-mslm"), generate)):
        arguments = [sys.executable, *start, *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert stranger() == "", arguments


def test_a_file_called_slm_does_not_stand_in_for_the_package(
    stranger: Callable[[], str], foreign_bundle: Path, tmp_path: Path
) -> None:
    Path("slm.py").write_text(Path("json.py").read_text())
    (tmp_path / "slm-script").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "slm-script"), "generate", str(foreign_bundle), "--instruct", "-p", "hi"]
    subprocess.run([*command, "--max-new-tokens", "2"], check=True, capture_output=True)
    assert stranger() == ""


def test_processes_of_commands_start_in_a_strangers_directory(
    stranger: Callable[[], str], shared_bundle: Bundle, shared_checkpoint: Path
) -> None:
    from slm.cli.commands.bench import fresh_process
    from slm.cli.probes import step_with
    from slm.train.data.workers import _Pool

    here = os.path.relpath(shared_bundle.path)
    assert fresh_process(Path(here), 4, new=2)["load_ms"] > 0
    assert step_with("CPUExecutionProvider")[1].loads
    with _Pool(Path(os.path.relpath(shared_checkpoint / "tokenizer.json")), 1) as pool:
        assert pool.ask([b"Once"]).result() != []
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "hi"}], {}) == "hi"
    assert stranger() == ""


def test_libraries_are_told_not_to_import_from_the_working_directory(
    stranger: Callable[[], str], tmp_path: Path
) -> None:
    """multiprocessing's tracker of resources is started with `-c`, torch.compile's workers with `-m`."""
    (tmp_path / "bin").mkdir()
    start = "from multiprocessing import resource_tracker as r\nr.ensure_running()\nr._resource_tracker._stop()\n"
    for name, source in (("guarded", "import slm.cli.main\n" + start), ("plain", start)):
        (tmp_path / "bin" / name).write_text(source)
        subprocess.run([sys.executable, str(tmp_path / "bin" / name)], check=False, stderr=subprocess.DEVNULL)
        assert (stranger() == "") is (name == "guarded")


def test_other_modules_keep_their_working_directory(tmp_path: Path) -> None:
    """`python -m` of another program that imports slm finds its modules beside it, as it should."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import slm")
    (tmp_path / "program" / "__main__.py").write_text("import beside, json; print(json.dumps(beside.value))")
    (tmp_path / "beside.py").write_text("value = [1]")
    done = subprocess.run([sys.executable, "-m", "program"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == [1]
