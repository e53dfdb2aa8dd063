"""Locks between processes and threads, on systems with and without what `flock` offers."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slm.core import locks, systems
from slm.core.errors import SlmError
from slm.core.locks import held, sole

HOLD = """
import sys
from pathlib import Path
from slm.core import locks, systems
systems.WINDOWS = {windows}
with getattr(locks, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["here", "windows"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(systems, "WINDOWS", request.param == "windows")
    return bool(request.param == "windows")


@pytest.fixture
def other(windows: bool) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Returns a function that starts another process which holds a lock."""
    started = []

    def start(kind: str, path: Path) -> "subprocess.Popen[bytes]":
        program = HOLD.format(windows=windows)
        process = subprocess.Popen(
            [sys.executable, "-c", program, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", [sole, held])
def test_the_holder_is_named_and_its_death_releases_the_lock(
    other: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path, kind: Callable[[Path], object]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = other(kind.__name__, run)
    with pytest.raises(SlmError, match=rf"another process \({process.pid}\) is (writing|at work in) .*run"), kind(run):  # type: ignore[attr-defined]
        pass
    process.kill()
    process.communicate()
    with kind(run) as certain:  # type: ignore[attr-defined]
        assert certain is True
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_a_list_of_locks_the_file_names_the_holder(
    other: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = other("sole", tmp_path / "made")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    with pytest.raises(SlmError, match=rf"another process \({process.pid}\) is"), sole(tmp_path / "made"):
        pass
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(SlmError, match=rf"another process \({process.pid} on .+\) is"), sole(tmp_path / "made"):
        pass


def test_threads_exclude_each_other_and_a_thread_does_not_exclude_itself(windows: bool, tmp_path: Path) -> None:
    refused = []

    def try_it() -> None:
        try:
            with sole(tmp_path / "made"):
                pass
        except SlmError as error:
            refused.append(error.message)

    with sole(tmp_path / "made"), sole(tmp_path / "made") as again:
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert again is True and len(refused) == 1
    try_it()
    assert len(refused) == 1 and list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removes_meanwhile_is_no_lock(
    windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two processes could hold locks at once: one on the removed file, one on the new file."""
    opened, lock, removed = locks._opened, tmp_path / ".made.lock", []

    def removed_once(path: Path) -> int:
        descriptor = opened(path)
        if not removed:
            lock.unlink()
            removed.append(descriptor)
        return descriptor

    monkeypatch.setattr(locks, "_opened", removed_once)
    with sole(tmp_path / "made") as certain:
        assert certain and removed and lock.exists()


def test_a_thread_can_be_excluded_from_its_own_lock(windows: bool, tmp_path: Path) -> None:
    with sole(tmp_path / "made"):
        with pytest.raises(SlmError, match="prepares it"), sole(tmp_path / "made", doing="prepares it", again=False):
            pass
        with sole(tmp_path / "made") as certain:
            assert certain
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_another_process_still_has_open_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows it cannot be removed, and whoever opened it removes it."""
    monkeypatch.setattr(systems, "WINDOWS", True)
    with monkeypatch.context() as patch, sole(tmp_path / "made"):
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "in use")))
    with sole(tmp_path / "made") as certain:
        assert certain
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_being_removed_can_be_opened_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "WINDOWS", True)
    real, denied = os.open, [1, 1]

    def opened(*arguments: object) -> int:
        if denied:
            denied.pop()
            raise PermissionError(13, "Access is denied")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    with sole(tmp_path / "made") as certain:
        assert certain and not denied


def test_a_file_system_without_locks_is_reported(
    windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, **_: object) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("filelock.lock_descriptor", none)
    with sole(tmp_path / "made") as certain, held(tmp_path) as sure:
        assert certain is False and sure is False
