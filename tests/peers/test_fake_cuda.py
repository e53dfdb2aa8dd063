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

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.config import ModelConfig
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.graph.builder import cast
from slm.export.graph.target import last_rows
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows

pytestmark = pytest.mark.peer

# Nodes that compute shapes from the shapes of inputs and from the number of logits to keep: numbers of the host.
SHAPE_NODES = {"Squeeze": 2, "Cast": 1, "Sub": 2, "Equal": 1, "Min": 1, "Where": 1, "Neg": 1}
# Of a bundle for the CPU, whose attention runs there: each layer's queries, keys, values and what is attended to.
FEWEST_COPIES_FROM_THE_CPU = 10
# At 4 layers. Each layer more takes 21 on 7.5 and 19 above. Quantized, the looked-up embedding is cast once more.
MOST_LAUNCHES = {"7.5": 100, "8.9": 92, "9.0": 92}
OF_QUANTIZED = 1
# And for a table with the rows of frequent tokens: the comparison with their ids, their lookup, their product, and putting both
# in place.
OF_FREQUENT = 10
CAPABILITIES = ["7.5", "8.9", "9.0"]
ATTENTION = {"7.5": "Sm75", "8.9": "flash_fwd", "9.0": "flash_fwd"}
# Runs a script on a bundle with a compute capability: what it prints, and the lines of the device and of onnxruntime.
Run = Callable[..., Any]
_PLACED = re.compile(r"Node\(s\) placed on \[(\w+)\]")
_NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(")


@pytest.fixture
def checkpoint(config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> Callable[..., Path]:
    """A checkpoint by the size of its heads, which CUDA's kernels take."""

    def make(head_dim: int) -> Path:
        model = make_model(config.model_copy(update={"head_dim": head_dim}))
        save_checkpoint(Path("checkpoint"), model, tokenizer, {})
        return Path("checkpoint")

    return make


@pytest.fixture(params=[64, 256], ids="head_dim={}".format)
def bundles(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A bundle for CUDA and one for the CPU."""
    source = checkpoint(request.param)
    return {
        device: export_bundle(source, Path(device), ExportOptions(device=device)).path for device in ("cuda", "cpu")
    }  # type: ignore[arg-type]


def by_step(log: list[str], what: str = "launch") -> Counter[str]:
    """Returns how often something happened in each step, by the device's log: "launch", "recorded" or "replay"."""
    found: Counter[str] = Counter()
    step = ""
    for line in log:
        step = line.removeprefix("step ") if line.startswith("step ") else step
        found[step] += line.startswith(f"fake-cuda {what}")
    return found


def rejected(log: list[str]) -> list[str]:
    """Returns what a real device would reject."""
    return [line for line in log if line.startswith("fake-cuda rejected")]


def check_steps(ran: Any, capability: str, most_launches: int) -> None:
    """Checks that every kind of step was taken, with the attention kernel of a capability and no more launches than these."""
    found = json.loads(ran.output.splitlines()[-1])
    assert found.pop("caches") == "cuda" and "on CUDA" in found.pop("description")
    assert {name: said for name, said in found.items() if said != "ok"} == {}
    assert rejected(ran.log) == []
    launches = by_step(ran.log)
    assert 0 < launches["decode"] <= launches["decode past the window"] <= most_launches
    attention = [line for line in ran.log if "attention_kernel" in line or "flash_fwd" in line]
    assert attention and all(ATTENTION[capability] in line for line in attention)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_step_is_taken_and_launches_what_it_should(
    fake_cuda: Run, bundles: dict[str, Path], capability: str
) -> None:
    ran = fake_cuda("fake_cuda_decoder.py", bundles["cuda"], capability)
    check_steps(ran, capability, MOST_LAUNCHES[capability])


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


def check_placement(nodes: dict[str, Counter[str]]) -> None:
    """Checks that nothing but shapes is computed on the CPU, and that nothing is copied."""
    assert nodes["CUDAExecutionProvider"]["GroupQueryAttention"] == 4
    assert nodes["CPUExecutionProvider"] == SHAPE_NODES
    assert copies(nodes) == 0


def test_a_bundle_for_cuda_runs_there(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    check_placement(placed(fake_cuda("fake_cuda_placement.py", bundles["cuda"], "7.5").log))


def test_a_bundle_for_the_cpu_does_not(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    """The control of the test above."""
    nodes = placed(fake_cuda("fake_cuda_placement.py", bundles["cpu"], "7.5").log)
    assert nodes["CPUExecutionProvider"]["GroupQueryAttention"] == 4
    assert copies(nodes) >= FEWEST_COPIES_FROM_THE_CPU


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_step_is_recorded_once_and_then_replayed(fake_cuda: Run, bundles: dict[str, Path], capability: str) -> None:
    ran = fake_cuda("fake_cuda_graph.py", bundles["cuda"], capability, "yes")
    assert "with CUDA graphs" in json.loads(ran.output.splitlines()[-1])["description"]
    assert rejected(ran.log) == []
    launches, recorded, replays = (by_step(ran.log, what) for what in ("launch", "recorded", "replay"))
    begun = [line for line in ran.log if line == "fake-cuda capture begins"]
    ended = [line for line in ran.log if line.startswith("fake-cuda capture ends")]
    assert len(begun) == len(ended) == 2  # one row, and two rows together
    # Two ordinary runs, for memory to be taken in; then the same launches, recorded.
    assert launches["token 1"] == 2 * recorded["token 1"] > 0 and recorded["token 1"] <= MOST_LAUNCHES[capability]
    assert recorded["batch 1"] > 0
    again = ["token 2", "token 3", "token after the chunk", "token after the reset", "batch 2"]
    assert {step: (launches[step], recorded[step], replays[step]) for step in again} == dict.fromkeys(again, (0, 0, 1))
    for step in ("prefill", "chunk", "prefill after the reset", "slot"):
        assert launches[step] > 0 and recorded[step] == replays[step] == 0


def test_nothing_is_recorded_unless_asked(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    """The control of the test above."""
    ran = fake_cuda("fake_cuda_graph.py", bundles["cuda"], "8.9", "no")
    assert "CUDA graphs" not in json.loads(ran.output.splitlines()[-1])["description"]
    assert not any("capture" in line or line == "fake-cuda replay" for line in ran.log if line.startswith("fake-cuda"))
    assert 0 < by_step(ran.log)["token 2"] <= MOST_LAUNCHES["8.9"]


def on_the_device(op: Any, hidden: Any, step: Any, new: Any) -> Any:
    """Which rows are kept, from the number on the device, as on the CPU."""
    return last_rows(op, hidden, step.inputs, ends=op.Min(step.lengths, new))


def test_numbers_on_the_device_cost_copies_and_graphs(
    fake_cuda: Run, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of numbers that stay on the host."""
    monkeypatch.setattr("slm.export.graph.fused._last_rows_on_gpu", on_the_device)
    monkeypatch.setattr("slm.core.manifest._check_graph", lambda *_: None)
    altered = export_bundle(checkpoint(64), Path("altered"), ExportOptions(device="cuda")).path
    nodes = placed(fake_cuda("fake_cuda_placement.py", altered, "8.9").log)
    assert copies(nodes) == 3
    with pytest.raises(AssertionError):
        check_placement(nodes)
    said = json.loads(fake_cuda("fake_cuda_graph.py", altered, "8.9", "yes").output)
    assert "cannot use the graph capture feature" in said["error"]


def test_casts_before_norms_cost_launches(
    fake_cuda: Run, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of norms that take float16 products: two launches a layer."""
    monkeypatch.setattr(
        "slm.export.graph.fused.Fused.normed_as", lambda _, op, x, dtype: cast(op, x, dtype, ir.DataType.FLOAT)
    )
    monkeypatch.setattr("slm.core.manifest._check_graph", lambda *_: None)
    altered = export_bundle(checkpoint(64), Path("altered"), ExportOptions(device="cuda")).path
    ran = fake_cuda("fake_cuda_decoder.py", altered, "8.9")
    assert by_step(ran.log)["decode"] == MOST_LAUNCHES["8.9"] + 2 * 4
    with pytest.raises(AssertionError):
        check_steps(ran, "8.9", MOST_LAUNCHES["8.9"])


def quantized(source: Path, precision: Any) -> Path:
    """A bundle with integers in place of weights."""
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (4, 60)))
    settings = Settings(precision=precision, prefer="size" if precision == "int4" else "auto", gate=Gate(None))
    return quantize_bundle(Bundle.open(source), Path(precision), text, settings, None, text)[0].path


def check_products(log: list[str], bits: str, tables: int = 1) -> None:
    """Checks that a step's products are those of integers with float16 scales and activations, and none is another.

    Args:
        log: What the driver was asked for.
        bits: Part of the name of the layers' kernels.
        tables: Number of tables: two if the frequent tokens have rows of their own.
    """
    found = log[log.index("step decode") : log.index("step chunk")]
    products = [line for line in found if "MatMulFloat" in line]
    assert len(products) == 4 * 4 + tables and not any("gemm" in line.lower() for line in found)
    assert all("I6__half" in line for line in products)  # how compilers spell <__half
    assert sum(bits in line for line in products) >= 4 * 4
    lookups = [line for line in found if "GatherBlockQuantized" in line]
    assert len(lookups) == tables and all("6__half" in line for line in lookups)


@pytest.mark.parametrize(("precision", "bits"), [("int8", "MatMulFloat8b"), ("int4", "MatMulFloat4Bits")])
def test_quantized_bundles_run_there(
    fake_cuda: Run, checkpoint: Callable[..., Path], precision: str, bits: str
) -> None:
    source = export_bundle(checkpoint(64), Path("cuda"), ExportOptions(device="cuda")).path
    bundle = quantized(source, precision)
    quantization = Bundle.open(bundle).manifest.quantization
    assert quantization is not None
    frequent = bool(quantization.schemes["model.embed_tokens"].frequent)
    assert frequent == (precision == "int4")
    for capability in CAPABILITIES:
        ran = fake_cuda("fake_cuda_decoder.py", bundle, capability)
        check_steps(ran, capability, MOST_LAUNCHES[capability] + OF_QUANTIZED + OF_FREQUENT * frequent)
        check_products(ran.log, bits, 1 + frequent)
    check_placement(placed(fake_cuda("fake_cuda_placement.py", bundle, "7.5").log))
    ran = fake_cuda("fake_cuda_graph.py", bundle, "8.9", "yes")
    assert rejected(ran.log) == [] and by_step(ran.log, "replay")["token 2"] == 1 and not by_step(ran.log)["token 2"]


def test_float32_scales_are_another_product(
    fake_cuda: Run, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: every product takes float32, and casts stand around attention."""
    source = export_bundle(checkpoint(64), Path("cuda"), ExportOptions(device="cuda")).path
    monkeypatch.setattr("slm.quantize.decide.with_half_scales", lambda schemes, _: schemes)
    ran = fake_cuda("fake_cuda_decoder.py", quantized(source, "int8"), "8.9")
    with pytest.raises(AssertionError):
        check_products(ran.log, "MatMulFloat8b")


def test_without_preloading_the_provider_finds_no_cublas(fake_cuda: Run, bundles: dict[str, Path]) -> None:
    """The control of `load_cuda_libraries`: pip's libraries are not where the loader looks."""
    ran = fake_cuda("fake_cuda_unloaded.py", bundles["cuda"], "7.5")
    assert ran.output.strip() == "CPUExecutionProvider"
