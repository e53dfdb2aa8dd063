"""How many threads: physical cores, within the container's quota."""

from pathlib import Path

import pytest

from slm.runtime import threads


@pytest.mark.parametrize(("content", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("400000 100000", 4.0)])
def test_quota_of_cgroup_v2(tmp_path: Path, content: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert threads.cpu_quota(tmp_path / "cpu.max", tmp_path) == cores


def test_quota_of_cgroup_v1(tmp_path: Path) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cpu_quota(tmp_path / "nothing", tmp_path) == 2.0


def test_no_quota(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path / "nothing", tmp_path) is None


def test_the_quota_and_hyperthreads_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_siblings", lambda cpu: str(cpu // 2))
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    assert threads.usable_cores() == 4
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.5)
    assert threads.usable_cores() == 2
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.5)
    assert threads.usable_cores() == 1
