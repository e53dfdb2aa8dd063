"""Files and directories appear whole or not at all, and no name leads out of an artifact."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core import files
from slm.core.errors import SlmError
from slm.core.files import (
    atomic_directory,
    atomic_file,
    check_readable,
    member,
    read_json,
    read_text,
    recover,
    scratch_directory,
    sole,
    write_text,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def directories(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_dir()}


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbfkey\n\xef\xbb\xbf")
    assert read_text(tmp_path / "keys.txt", "API keys") == "key\n\ufeff"


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made", ["file"]) as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").read_text() == "new"
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, interruption: type[BaseException]) -> None:
    with atomic_directory(tmp_path / "made", ["file"]) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(interruption), atomic_directory(tmp_path / "made", ["file"]) as partial:
        (partial / "file").write_text("new")
        raise interruption
    assert (tmp_path / "made" / "file").read_text() == "old"
    assert names(tmp_path) == ["made"]


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    """Whatever number the process had: another one may have it now, as in containers, where numbers are few."""
    for pid in (os.getppid(), 999_999_999, os.getpid()):
        (tmp_path / f".made.partial-{pid}").mkdir()
    (tmp_path / ".made.lock").touch()
    with atomic_directory(tmp_path / "made", ["file"]):
        pass
    assert names(tmp_path) == ["made"]
    for left in (".text.partial-1", ".text.lock"):
        (tmp_path / left).touch()
    write_text(tmp_path / "text", "x")
    assert names(tmp_path) == ["made", "text"]


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts another process that holds what an expression gives, until it is killed."""
    started = []

    def hold(expression: str) -> subprocess.Popen[str]:
        program = (
            "import time\nfrom pathlib import Path\nfrom slm.core.files import *\n"
            f"with {expression} as held:\n    print(held, flush=True)\n    time.sleep(100)"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_two_processes_do_not_write_one_artifact(tmp_path: Path, other: Callable[[str], subprocess.Popen[str]]) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("old")
    first = other("atomic_directory(Path('made'), ['file'])")
    with (
        pytest.raises(SlmError, match=rf"^another process \({first.pid}\) is writing {tmp_path}/made \(hint: "),
        atomic_directory(tmp_path / "made", ["file"]),
    ):
        raise AssertionError("the block must not begin")
    recover(tmp_path / "made")  # leaves it alone
    assert (tmp_path / f".made.partial-{first.pid}").is_dir()
    first.kill()
    first.wait()
    with atomic_directory(tmp_path / "made", ["file"]) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "made" / "file").read_text() == "new" and names(tmp_path) == ["made"]


def test_who_writes_a_file_waits_for_who_writes_it_already(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = other("atomic_file(Path('text'))")
    monkeypatch.setattr(files, "_WRITING_S", 0.1)
    with pytest.raises(SlmError, match="is writing"):
        write_text(tmp_path / "text", "x")
    monkeypatch.setattr(files, "_WRITING_S", 20.0)
    threading.Timer(0.3, first.kill).start()
    write_text(tmp_path / "text", "x")
    assert names(tmp_path) == ["text"]


def test_what_one_holds_one_can_take_again(tmp_path: Path) -> None:
    with sole(tmp_path / "made"):
        with sole(tmp_path / "made"), atomic_directory(tmp_path / "made", ()) as partial:
            (partial / "file").write_text("new")
        assert (tmp_path / ".made.lock").exists()
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("moment", ["open", "close"])
def test_a_signal_as_it_is_locked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    usual, before = getattr(os, moment), signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: Any) -> Any:
        done = usual(*arguments)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt), sole(tmp_path / "above" / "made"):
        assert moment == "close"
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("next_one", ["trial", "verify", "artifact"])
def test_scratch_of_killed_processes_is_removed(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]], next_one: str
) -> None:
    """Also by a process that needs no scratch directory of this kind, or none at all."""
    killed, alive = (other("scratch_directory(Path(), 'trial')") for _ in range(2))
    killed.kill()
    killed.wait()
    assert len(directories(tmp_path)) == 2
    made = atomic_directory(tmp_path / "made", ()) if next_one == "artifact" else scratch_directory(tmp_path, next_one)
    with made as mine:
        assert len(directories(tmp_path)) == 2 and mine.is_dir()
    (left,) = directories(tmp_path) - {"made"}
    assert (tmp_path / f"{left}.lock").exists()  # that of the running process
    alive.kill()


def test_scratch_in_use_is_kept(tmp_path: Path) -> None:
    """A thread can lock again what it holds, so that its own scratch would pass for another's."""
    with (
        scratch_directory(tmp_path, "merged") as outer,
        scratch_directory(tmp_path, "merged") as inner,
        atomic_directory(tmp_path / "made", ()),
    ):
        assert outer.is_dir() and inner.is_dir()
    assert names(tmp_path) == ["made"]


def test_without_locks_only_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    for pid in (os.getppid(), 999_999_999):
        (tmp_path / f".made.partial-{pid}").mkdir()
    with atomic_directory(tmp_path / "made", ["file"]):
        pass
    assert names(tmp_path) == [f".made.partial-{os.getppid()}", "made"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".made.replaced-{gone.stdout.strip()}").mkdir()
    (tmp_path / f".made.replaced-{gone.stdout.strip()}" / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "made", ["file"]):
        raise RuntimeError
    assert (tmp_path / "made" / "file").read_text() == "old"


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with pytest.raises(RuntimeError), atomic_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []  # nor are directories made for nothing
    with atomic_file(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "whole"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inside/../../outside"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(SlmError, match="leads out of the directory"):
        member(tmp_path, name)


def test_links_do_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "artifact" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(SlmError, match="leads out"):
        member(tmp_path / "artifact", "link")
    assert member(tmp_path / "artifact", "onnx/model.onnx") == tmp_path / "artifact" / "onnx" / "model.onnx"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ok\xff\xfe")
    (tmp_path / "list.json").write_text("[]")
    for path, said in (("none", "not found"), ("", "is a directory"), ("binary", r"not UTF-8 text: .* \(byte 2\)")):
        with pytest.raises(SlmError, match=said):
            read_text(tmp_path / path, "training text")
    with pytest.raises(SlmError, match="not a JSON object"):
        read_json(tmp_path / "list.json", "manifest")


def test_artifacts_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made", ()) as partial:
        (partial / "private").write_text("x")
        (partial / "private").chmod(0o600)
        (partial / "usual").write_text("x")
    assert (tmp_path / "made" / "private").stat().st_mode == (tmp_path / "made" / "usual").stat().st_mode


def test_other_peoples_files_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("ours")
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "note").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for target, said in (
        (tmp_path / "mine", "contains other files: thesis.tex"),
        (tmp_path / "note", "is not a directory"),
        (Path(), "contains the current directory"),
        (tmp_path, "contains the current directory"),
    ):
        with pytest.raises(SlmError, match=said), atomic_directory(target, ["file"]):
            raise AssertionError("the block must not begin")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    monkeypatch.chdir(tmp_path)
    with atomic_directory(tmp_path / "empty", ["file"]) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big-disk")
    with atomic_directory(tmp_path / "link", ()) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "big-disk" / "file").read_text() == "new"
    assert names(tmp_path) == ["big-disk", "link"]


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    check_readable(tmp_path / "file", "the weights")
    with pytest.raises(SlmError, match=r"cannot read the weights: .*none \(No such file"):
        check_readable(tmp_path / "none", "the weights")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # whoever runs the tests may be root, who may read everything
    with pytest.raises(SlmError, match=r"\(Permission denied\)"):
        check_readable(tmp_path / "file", "the weights")
