"""A CPU that multiplies bfloat16, whatever the CPU of the test does."""

import pytest

from slm.finetune import start
from slm.train import precision, run, trial
from slm.train.precision import Capability


def pretend_speedup(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    """Lets a CPU with bfloat16 measure that a layer of any model is faster by a factor with it."""
    for module in (run, start):
        monkeypatch.setattr(module, "capability", lambda device: Capability("cpu", bf16=True))
    monkeypatch.setattr(precision, "_NARROWEST", 1)
    monkeypatch.setattr(trial, "_speedup", lambda shape: speedup)
