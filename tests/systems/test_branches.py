"""Decisions that depend on the system, each made for another system than this one."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.cli import main as command_line
from slm.cli.commands import doctor
from slm.cli.streams import use_utf8
from slm.core import machine, processes, signals, systems
from slm.core.names import resolve
from slm.train import interrupt

ROOT = Path(__file__).parents[2]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "WINDOWS", True)


def test_cores_without_affinity_and_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(machine, "physical_cores", lambda: 8)
    monkeypatch.setattr(processes, "_of_process", lambda figure: None)  # macOS
    assert machine.usable_cores() == 8
    monkeypatch.setattr(processes, "_of_process", lambda figure: 3)  # Windows: affinity
    assert machine.usable_cores() == 3
    monkeypatch.setattr(machine, "physical_cores", lambda: None)
    assert machine.usable_cores() == 3


def test_figures_that_a_sandbox_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def denied(*_: object, **__: object) -> Any:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(processes, "_STATUS", Path("/nothing"))
    monkeypatch.setitem(sys.modules, "resource", None)
    for name in ("Process", "virtual_memory", "cpu_count"):
        monkeypatch.setattr(psutil, name, denied)
    assert processes.resident_mib() is None and processes.peak_rss_mib() == 0.0
    assert processes.main_memory() == (None, None) and processes.physical_cores() is None
    assert processes.free_files() > 1000


def test_peak_memory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Process:
        def memory_info(self) -> Any:
            return type("pmem", (), {"rss": 50 << 20, "peak_wset": 300 << 20})

    monkeypatch.setattr(processes, "_STATUS", Path("/nothing"))
    monkeypatch.setattr(psutil, "Process", Process)
    assert processes.peak_rss_mib() == 300.0 and processes.resident_mib() == 50.0


def test_a_process_is_looked_at_and_not_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert processes.process_exists(process.pid) and process.poll() is None
    process.communicate(b"\n")
    assert process.returncode == 0 and not processes.process_exists(process.pid)


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some Processor @ 3 GHz\n")
    assert machine.processor_name(tmp_path / "cpuinfo") == "Some Processor @ 3 GHz"
    assert machine.processor_name(tmp_path / "nothing")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_sysctl", lambda *names: "machdep.cpu.brand_string: Apple M4\n")
    assert machine.processor_name() == "Apple M4"


def test_signals_that_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Break on Windows is like a request to terminate; nohup has SIGHUP ignored."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in signals.stopping()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in signals.stopping() and signal.SIGINT in signals.stopping()
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.setattr(interrupt, "_CHECKPOINT", ())  # Windows has no SIGUSR1
    handler = signal.getsignal(signal.SIGUSR1)
    with interrupt.held_back() as interruption:
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert signal.getsignal(signal.SIGINT) == interruption._stop


@pytest.mark.parametrize("length", [200, 300])
def test_a_path_that_windows_finds_too_long(windows: None, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # for Linux the path is relative
    path = "C:\\" + "x" * (length - 3)
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", path)
    message, hint, code = command_line._explain(error)
    assert code == 1
    assert ("more than Windows permits" in message) == (length == 300) and bool(hint) == (length == 300)
    assert "more than" not in command_line._explain(FileNotFoundError(errno.ENOENT, "x", "\\\\?\\" + path))[0]


def test_paths_of_any_length_elsewhere() -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "x" * 300)
    assert command_line._explain(error)[0].startswith("No such file")


def test_what_a_system_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(systems, "_HUGE_PAGES", tmp_path / "none")
    monkeypatch.setattr(systems, "has_long_paths", lambda: False)
    monkeypatch.setattr(systems, "find_spec", lambda name: None)
    found = systems.lacking()
    assert {"huge pages", "readline", "long paths"} <= found.keys()
    finding = doctor._system_finding(found)
    assert finding.level == "ok" and "no long paths: paths have at most 259 characters" in (finding.advice or "")
    assert doctor._system_finding({}).advice is None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def replace(encoding: str, stdin: bytes = b"") -> None:
        for name in ("stdin", "stdout", "stderr"):
            content = io.BytesIO(stdin if name == "stdin" else b"")
            monkeypatch.setattr(sys, name, io.TextIOWrapper(content, encoding=encoding, write_through=True))

    yield replace
    monkeypatch.undo()


def test_pipes_of_windows_are_utf8(
    windows: None, streams: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    streams("cp1252", "\ufeffÄ “fox”\r\n".encode())
    use_utf8()
    assert sys.stdin.read() == "Ä “fox”\n"
    sys.stdout.write("Ä → “fox” 🦊\n")
    assert sys.stdout.buffer.getvalue().decode() == "Ä → “fox” 🦊\n"  # type: ignore[attr-defined]


def test_a_chosen_encoding_stays_and_lacks_no_character(
    windows: None, streams: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    streams("cp1252", "Ä\r\n".encode("cp1252"))
    use_utf8()
    assert sys.stdin.read() == "Ä\n"
    sys.stdout.write("Ä → 🦊\n")
    assert sys.stdout.buffer.getvalue() == "Ä ? ?\n".encode("cp1252")  # type: ignore[attr-defined]


def test_the_terminal_of_an_old_system_prints_what_it_can() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "slm", "generate", "-p", "Ä “fox”", "--max-new-tokens", "2"],
        capture_output=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and b"fox" in done.stdout and b"Traceback" not in done.stderr


def test_names_with_backslashes_are_those_of_artifacts(windows: None, shared_bundle: Any) -> None:
    import shutil

    shutil.copytree(shared_bundle.path, "runs/tiny/int8")
    path, _ = resolve(r"tiny\int8", ["bundle"])
    assert path == Path("runs/tiny/int8")


def text_writes(source: str) -> list[int]:
    """Returns the lines that write text whose line ends Windows would change: without `newline`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        mode = next((each.value for each in node.args[:1] if isinstance(each, ast.Constant)), "r")
        writes = node.func.attr == "write_text" or (
            node.func.attr == "open" and isinstance(mode, str) and set(mode) & set("wax+") and "b" not in mode
        )
        if writes and not any(each.arg == "newline" for each in node.keywords):
            found.append(node.lineno)
    return found


def test_line_ends_are_the_same_on_every_system() -> None:
    control = (
        'p.write_text("x", encoding="utf-8")\np.open("a", encoding="utf-8")\np.open("wb")\np.open()\np.open(newline="")'
    )
    assert text_writes(control) == [1, 2]
    # A text that npm reads, and a stream on the null device.
    allowed = {"web/npm.py", "core/process_limits.py"}
    packages = [home.parent for home in ROOT.glob("*/__init__.py")]
    files = {file.relative_to(ROOT).as_posix(): file for package in packages for file in package.rglob("*.py")}
    found = {name for name, file in files.items() if text_writes(file.read_text(encoding="utf-8"))}
    assert len(files) > 300 and found - allowed == set()


def test_options_take_paths_with_drives(windows: None) -> None:
    """A drive is no scheme of an address, and no name of the hub."""
    from slm.core.text.files import find_files

    for path in (r"C:\texts\a.txt", "C:a.txt", r"\\server\share\a.txt"):
        with pytest.raises(Exception, match=r"not found"):
            find_files(Path(path))
    with pytest.raises(Exception, match=r"not found: C:\\models"):
        resolve(r"C:\models\tiny", ["bundle"])
