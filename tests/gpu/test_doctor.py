"""`slm doctor` in a process that cannot import PyTorch: onnxruntime has to find CUDA's libraries by itself."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.gpu.conftest import Record
from tests.gpu.rig import Rig

pytestmark = pytest.mark.gpu

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DOCTOR = """
import sys
hidden = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden))  # None: importing it fails, and it is not found either
from slm.cli.main import main
sys.argv[1:] = ["doctor", "--json"]
try:
    main(["doctor", "--json"])
finally:
    assert all(sys.modules[name] is None for name in hidden)
"""


def doctor(*hidden: str) -> dict[str, Any]:
    """Returns what `slm doctor --json` says where some packages cannot be imported."""
    command = [sys.executable, "-c", _DOCTOR, *hidden]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(found["problems"]), done.stderr[-2000:]
    return found


def check(found: dict[str, Any], provider: str) -> None:
    """Makes sure that there is no problem and that a provider works."""
    assert found["problems"] == []
    assert found["providers"][provider]["loads"] and found["providers"][provider].get("runs", True)


def test_there_is_no_problem(rig: Rig, record: Record) -> None:
    found = doctor("torch")
    check(found, _PROVIDERS[rig.provider])
    record("problems", len(found["problems"]), 0)


def test_what_does_not_work_is_seen(rig: Rig) -> None:
    """The control: without onnxruntime no provider works."""
    with pytest.raises((AssertionError, KeyError)):
        check(doctor("torch", "onnxruntime"), _PROVIDERS[rig.provider])
