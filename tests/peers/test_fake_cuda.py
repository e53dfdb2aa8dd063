"""onnxruntime-gpu's real partitioner and host code in front of a CUDA that computes nothing (`tests/fake_cuda`).

What shows without a GPU: on which provider each node is placed and what is copied between them, that no kernel and no launch
rejects its arguments, which attention kernel a compute capability gets, and how many launches a step takes. Numbers and times
do not show.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle

pytestmark = pytest.mark.peer

# Shapes computed from inputs: the number of logits to keep, and the length of the longest row.
MOST_CPU_NODES, MOST_COPIES = 4, 3
# At 4 layers. Each layer more takes 23 on 7.5 and 21 above.
MOST_LAUNCHES = {"7.5": 110, "8.9": 102, "9.0": 102}
ATTENTION = {"7.5": "Sm75", "8.9": "flash_fwd", "9.0": "flash_fwd"}
# Runs a script on a bundle with a compute capability: what it prints, and the lines of the device and of onnxruntime.
Run = Callable[..., Any]
_PLACED = re.compile(r"Node\(s\) placed on \[(\w+)\]")
_NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(")


@pytest.fixture(params=[64, 256], ids="head_dim={}".format)
def bundles(
    request: pytest.FixtureRequest, config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> dict[str, Path]:
    """A bundle for CUDA and one for the CPU, of a model whose heads CUDA's kernels take."""
    model = make_model(config.model_copy(update={"head_dim": request.param}))
    save_checkpoint(Path("checkpoint"), model, tokenizer, {})
    return {device: export_bundle(Path("checkpoint"), Path(device), device=device).path for device in ("cuda", "cpu")}  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", ["7.5", "8.9", "9.0"])
def test_every_step_is_taken_and_launches_what_it_should(
    fake_cuda: Run, bundles: dict[str, Path], capability: str
) -> None:
    ran = fake_cuda("fake_cuda_decoder.py", bundles["cuda"], capability)
    found = json.loads(ran.output.splitlines()[-1])
    assert found.pop("caches") == "cuda" and "on CUDA" in found.pop("description")
    assert {name: said for name, said in found.items() if said != "ok"} == {}
    assert [line for line in ran.log if line.startswith("fake-cuda rejected")] == []
    launches: Counter[str] = Counter()
    step = ""
    for line in ran.log:
        step = line.removeprefix("step ") if line.startswith("step ") else step
        launches[step] += line.startswith("fake-cuda launch")
    assert 0 < launches["decode"] <= launches["decode past the window"] <= MOST_LAUNCHES[capability]
    attention = [line for line in ran.log if "attention_kernel" in line or "flash_fwd" in line]
    assert attention and all(ATTENTION[capability] in line for line in attention)


def placed(log: list[str]) -> dict[str, Counter[str]]:
    """Returns how many nodes of each kind each provider has, by onnxruntime's log."""
    found: dict[str, Counter[str]] = {}
    provider = ""
    for line in log:
        if match := _PLACED.search(line):
            provider = match[1]
        elif (match := _NODE.search(line)) and provider:
            found.setdefault(provider, Counter())[match[1]] += 1
    return found


def copies(nodes: dict[str, Counter[str]]) -> int:
    """Returns how many copies between host and device a step makes."""
    return sum(count for kinds in nodes.values() for kind, count in kinds.items() if kind.startswith("Memcpy"))


def test_a_bundle_for_cuda_runs_there(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    nodes = placed(fake_cuda("fake_cuda_placement.py", bundles["cuda"], "7.5").log)
    assert nodes["CUDAExecutionProvider"]["GroupQueryAttention"] == 4
    assert sum(nodes["CPUExecutionProvider"].values()) <= MOST_CPU_NODES
    assert copies(nodes) <= MOST_COPIES


def test_a_bundle_for_the_cpu_does_not(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    """The control of the test above."""
    nodes = placed(fake_cuda("fake_cuda_placement.py", bundles["cpu"], "7.5").log)
    assert nodes["CPUExecutionProvider"]["GroupQueryAttention"] == 4
    assert copies(nodes) > 4 * MOST_COPIES


def test_without_preloading_the_provider_finds_no_cublas(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    """The control of `load_cuda_libraries`: pip's libraries are not where the loader looks."""
    ran = fake_cuda("fake_cuda_unloaded.py", bundles["cuda"], "7.5")
    assert ran.output.strip() == "CPUExecutionProvider"
