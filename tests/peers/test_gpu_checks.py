"""The process of `make test-gpu` that answers (`tests/gpu/steps.py`), in front of the CUDA that computes nothing.

It shows that every step of the checks is accepted by onnxruntime's CUDA provider, that PyTorch is not imported, and that the
environment variable that turns flash attention off does so.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.nn import save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from tests.conftest import random_model
from tests.gpu.rig import Rig
from tests.gpu.test_answering import KINDS

pytestmark = pytest.mark.peer

_MARK = "flash attention disabled: "


@pytest.mark.parametrize("capability", ["7.5", "8.9"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_every_step_of_the_checks_is_taken(
    fake_cuda: Callable[..., Any], tokenizer: Tokenizer, head_dim: int, capability: str
) -> None:
    save_checkpoint(Path("checkpoint"), random_model(Rig(rehearsal=True).config(head_dim)), tokenizer, {})
    bundle = export_bundle(Path("checkpoint"), Path("bundle"), ExportOptions(device="cuda")).path
    ran = fake_cuda("fake_cuda_gpu_checks.py", bundle, capability)
    about, kinds, *rest = (json.loads(line) for line in ran.output.splitlines())
    assert rest == [about, kinds]  # with flash attention and without
    assert set(kinds) == KINDS
    assert about["caches"] == "cuda" and not about["torch"] and about["drafted"] > 0
    assert [line for line in ran.log if line.startswith("fake-cuda rejected")] == []
    flash: dict[str, bool] = {}
    run = ""
    for line in ran.log:
        run = line.removeprefix(_MARK) if line.startswith(_MARK) else run
        flash[run] = flash.get(run, False) or "flash_fwd" in line
    assert flash["0"] == (capability == "8.9") and not flash["1"]
