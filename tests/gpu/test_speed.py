"""Speed and memory of the 270M shape with random weights, as `slm bench` measures them."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.presets import preset
from slm.core.tokenizer import Tokenizer
from slm.export import bundle as module
from slm.export.bundle import ExportOptions, export_bundle
from tests.gpu.conftest import Record
from tests.gpu.rig import Rig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

# The shape, the prompts, and the least speed of single rows: an eighth of what 300 launches of 5 microseconds a token allow,
# and well above what attention on the CPU gives.
FULL, SMALL = ("gemma3-270m", "128,512", 80.0), ("tiny", "16,64", 5.0)
# Beside the weights: CUDA's contexts of two processes, and onnxruntime's arena, which grows in powers of two and holds the
# logits of a prompt.
OVERHEAD_MIB = 1500
_MIB = 1 << 20


@pytest.fixture
def bundle(rig: Rig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle for CUDA of the shape. It is not compared with PyTorch, which takes minutes: test_answering.py does that."""
    shape = (SMALL if rig.rehearsal else FULL)[0]
    model = CausalLM(preset(shape))
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(Path("checkpoint"), model, tokenizer, {})
    Path("text.txt").write_text("Once upon a time there was a fox.", encoding="utf-8")
    monkeypatch.setattr(module, "prove", lambda *arguments: None)
    return export_bundle(
        Path("checkpoint"), Path("bundle"), ExportOptions(context=1024, device="cuda", text=Path("text.txt"))
    )


def bench(bundle: Bundle, rig: Rig, prompts: str, *options: str) -> tuple[dict[str, Any], int | None]:
    """Returns the report of `slm bench`, and the most of the card's memory that it took, in MiB."""
    command = [sys.executable, "-m", "slm", "bench", str(bundle.path), "--device", rig.provider, "--json", *options]
    command += ["--prompt", prompts, "--batch", "1,8", "--new", "64", "--rounds", "1" if rig.rehearsal else "3"]
    used, before, ended = list[int](), rig.used_mib(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            if (now := rig.used_mib()) is not None:
                used.append(now)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280, check=False)
    finally:
        ended.set()
        watching.join()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), max(used) - before if used and before is not None else None


def check_memory(taken: float, weights: float) -> None:
    """Makes sure that memory is little more than the weights."""
    assert weights < taken <= weights + OVERHEAD_MIB


def test_speed_and_memory(rig: Rig, bundle: Bundle, record: Record) -> None:
    _, prompts, least = SMALL if rig.rehearsal else FULL
    report, card = bench(bundle, rig, prompts)
    weights = bundle.bytes / _MIB
    taken = card if card is not None else max(each["peak_rss_mib"] for each in report["memory"])
    where = "of the card" if card is not None else "of the process"
    record(f"memory {where}, weights {weights:,.0f}", float(taken), weights + OVERHEAD_MIB, "MiB")
    for row in report["results"]:
        what = f"prompt of {row['prompt']}, {row['batch']} row{'s' * (row['batch'] > 1)}"
        record(f"{what}: new tokens", row["decode_tok_s"]["median"], least, "tokens/s")
        if row["batch"] == 1:
            record(f"{what}: time to first token", row["ttft_ms"]["median"], None, "ms")
    assert rig.provider.upper() in report["backend"] and "attention on the CPU" not in report["backend"]
    assert min(row["decode_tok_s"]["median"] for row in report["results"]) > least
    check_memory(taken, weights)
    if not rig.rehearsal:
        for row in bench(bundle, rig, prompts, "--cuda-graph")[0]["results"]:
            what = f"prompt of {row['prompt']}, {row['batch']} row{'s' * (row['batch'] > 1)}, CUDA graphs"
            record(f"{what}: new tokens", row["decode_tok_s"]["median"], None, "tokens/s")
    with pytest.raises(AssertionError):  # the control: a copy of the weights in float32 beside them
        check_memory(taken + OVERHEAD_MIB + weights, weights)
