"""What `make test-cpus` and `make test-arm64` accept, and what they say if a program is missing. The targets take minutes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.scripts import script


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        yield script(Path(__file__).parent / "emulated" / "run.py", patch)


def logits(spread: float, seed: int = 0) -> np.ndarray:
    """Returns logits (positions, vocabulary) off the same ones by normal noise."""
    same = np.random.default_rng(7).normal(size=(50, 100)) * 4
    found: np.ndarray = same + spread * np.random.default_rng(seed).normal(size=same.shape)
    return found


@pytest.mark.parametrize(
    ("kind", "here", "there", "passed"),
    [
        ("float32", 0, 1e-4, True),
        ("float32", 0, 1e-2, False),
        ("int8", 0.05, 0.05, True),
        ("int8", 0.05, 0, True),  # a processor that does not round activations is nearer to the float model
        ("int8", 0.05, 0.2, False),  # 16 times the divergence
        ("int4", 0.2, 0.2, True),
        ("int4", 0.2, 0.5, False),
    ],
)
def test_the_limit_of_the_divergence(run: ModuleType, kind: str, here: float, there: float, passed: bool) -> None:
    found = run.compare(kind, logits(0), logits(here, 1), logits(there, 2))
    assert found.passed == passed


@pytest.mark.parametrize(("gap", "ties", "others"), [(0.1, 1, 0), (3.0, 0, 1)])
def test_another_token_is_accepted_at_a_near_tie_only(run: ModuleType, gap: float, ties: int, others: int) -> None:
    here = np.zeros((1, 100))
    here[0, :2] = 5 + gap, 5
    there = here.copy()
    there[0, :2] = 5, 5 + 1e-6
    found = run.compare("int8", here, here, there)
    assert (found.ties, found.others) == (ties, others)
    assert not (others and found.passed)


def test_a_missing_program_is_one_line(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "HOME", tmp_path)
    monkeypatch.setattr(run.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(run.sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for target, lines in (
        ("cpus", "qemu-x86_64 is missing: install qemu-user\n"),
        ("arm64", "qemu-aarch64 is missing: install qemu-user\n"),
    ):
        monkeypatch.setattr(run.sys, "argv", ["run.py", target])
        assert run.main() == 2 and capsys.readouterr().out == lines
    monkeypatch.setattr(run.sys, "platform", "darwin")
    monkeypatch.setattr(run.sys, "argv", ["run.py", "cpus"])
    assert run.main() == 2 and capsys.readouterr().out.count("\n") == 1
