"""Renames and removals that wait for other programs, with the rules of Windows simulated by errors."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from slm.core import files, renames, systems
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, atomic_file, read_text, write_text


class Refusals:
    """A function of `os` that is denied a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, only: str = "") -> None:
        self.left, self.real, self.only = times, getattr(os, name), only
        monkeypatch.setattr(os, name, self)

    def __call__(self, path: object, *arguments: object, **options: object) -> object:
        if self.left and self.only in str(path):
            self.left -= 1
            raise PermissionError(13, "The process cannot access the file", str(path))
        return self.real(path, *arguments, **options)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(systems, "WINDOWS", True)
    monkeypatch.setattr(renames, "_WAIT_S", 60.0)


@pytest.fixture
def impatient(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_WAIT_S", 0.1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory with one file, to be replaced."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "old").write_text("old")
    return made


def test_a_file_that_a_scanner_has_open_for_a_moment_is_replaced(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = Refusals(monkeypatch, "replace", 2)
    write_text(tmp_path / "file", "new\r\nline\n")
    assert refusals.left == 0 and (tmp_path / "file").read_bytes() == b"new\r\nline\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_is_in_use_stays_and_the_message_says_why(
    impatient: None, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Refusals(patch, "replace", 1000)
        with (
            pytest.raises(SlmError, match=r"cannot replace .*made: a program uses one of its files") as caught,
            atomic_directory(target, ("old",)) as partial,
        ):
            (partial / "new").write_text("new")
    assert "slm serve" in (caught.value.hint or "")
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.parent.iterdir()] == ["made"]
    with atomic_directory(target, ("old",)) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_the_old_directory_returns_if_the_new_one_cannot_take_its_place(
    impatient: None, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Refusals(patch, "replace", 1000, only=".partial-")
        with pytest.raises(SlmError, match="cannot replace"), atomic_directory(target, ("old",)) as partial:
            (partial / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["old"]


def test_other_systems_try_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = Refusals(monkeypatch, "replace", 2)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert refusals.left == 1 and list(tmp_path.iterdir()) == []


def test_read_only_files_are_removed(windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to remove them until they are writable."""
    real, made = os.unlink, tmp_path / "made"
    made.mkdir()
    for name in ("a", "b"):
        (made / name).write_text(name)
        (made / name).chmod(stat.S_IREAD)

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        if not os.stat(path, dir_fd=dir_fd).st_mode & stat.S_IWRITE:
            raise PermissionError(13, "Access is denied", path)
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    renames.remove_file(made / "a")
    assert not (made / "a").exists()
    renames.remove_tree(made)
    assert not made.exists()
    renames.remove_tree(made)
    renames.remove_file(made)


def test_leftovers_go_as_far_as_they_can(impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    made.mkdir()
    for name in ("1", "2", "3"):
        (made / name).write_text(name)
    first = next(made.iterdir()).name  # at which a removal that stops at an error would leave the others
    Refusals(monkeypatch, "unlink", 1000, only=first)
    renames.remove_leftovers(made)
    assert [path.name for path in made.iterdir()] == [first]


def test_cycles_that_keep_a_file_open_are_collected(windows: None, tmp_path: Path) -> None:
    """The file of an object that refers to itself is open until a garbage collection."""
    file = tmp_path / "x"
    file.write_text("x")

    class Holder:
        def __init__(self) -> None:
            self.file, self.me = file.open(), self

    Holder()
    tried = []

    def remove() -> None:
        tried.append(1)
        links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.exists()]
        if file in links:
            raise PermissionError(13, "in use")

    renames._patiently(remove)
    assert len(tried) == 2


def test_what_is_flushed(windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no directory, and flushes only files that are open for writing."""
    flags: list[int] = []
    real = os.open

    def opened(path: os.PathLike[str], flag: int, *rest: int) -> int:
        assert not Path(path).is_dir()
        flags.append(flag)
        return real(path, flag, *rest)

    (tmp_path / "x").write_text("x")
    monkeypatch.setattr(os, "open", opened)
    files._to_disk(tmp_path)
    files._to_disk(tmp_path / "x")
    assert flags == [os.O_RDWR]


def test_a_directory_that_windows_denies_to_open_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, **_: str) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(SlmError, match="is a directory, not a file"):
        read_text(tmp_path, "the text")
