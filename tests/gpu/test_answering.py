"""Logits of bundles against PyTorch in float32, in every kind of step, each bundle in a process without PyTorch."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.parity import TOLERANCES
from slm.export.verify import INT8_TOLERANCE, model_of
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from tests.conftest import random_model
from tests.gpu.conftest import Record
from tests.gpu.rig import Rig

pytestmark = pytest.mark.gpu

KINDS = {
    "prefill",
    "all positions",
    "chunk with a past",
    "across the window",
    "ragged batch",
    "rewind",
    "snapshot",
    "drafts",
}
SECONDS = 240
Array = NDArray[Any]


@dataclass(frozen=True)
class Made:
    """A random model and a bundle of it.

    Attributes:
        model: The model, float32 on the CPU.
        home: Where the checkpoint `checkpoint` and the bundle `cuda` lie.
        cuda: A bundle for CUDA.
    """

    model: CausalLM
    home: Path
    cuda: Bundle


@pytest.fixture(scope="module")
def make(rig: Rig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Made]:
    """Makes a model with heads of a width, and its bundle for CUDA; once for each width."""

    @cache
    def made(head_dim: int) -> Made:
        home = tmp_path_factory.mktemp(f"head{head_dim}")
        model = random_model(rig.config(head_dim))
        save_checkpoint(home / "checkpoint", model, tokenizer, {})
        return Made(model, home, export_bundle(home / "checkpoint", home / "cuda", ExportOptions(device="cuda")))

    return made


@pytest.fixture(params=[64, 256], ids="head_dim={}".format)
def made(request: pytest.FixtureRequest, make: Callable[[int], Made]) -> Made:
    """A model and its bundle, with either width."""
    return make(request.param)


@pytest.fixture(scope="module")
def cpu_bundle(make: Callable[[int], Made]) -> Bundle:
    """A bundle for the CPU."""
    made = make(64)
    return export_bundle(made.home / "checkpoint", made.home / "cpu")


@dataclass(frozen=True)
class Taken:
    """What `steps.py` did with a bundle."""

    about: dict[str, Any]
    arrays: dict[str, Array]


def take_steps(bundle: Bundle, device: str, *options: str, **variables: str) -> Taken:
    """Runs `steps.py` in a process of its own.

    Args:
        bundle: What it reads with.
        device: Where.
        *options: Further arguments of `steps.py`.
        **variables: Environment variables besides this process's.
    """
    script, out = Path(__file__).with_name("steps.py"), Path.cwd() / f"{bundle.path.name}.npz"
    command = [sys.executable, str(script), str(bundle.path), device, str(out), *options]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return Taken(json.loads(done.stdout.splitlines()[-1]), dict(arrays))


@torch.inference_mode()
def differences(taken: Taken, model: CausalLM) -> dict[str, float]:
    """Returns the largest difference of each kind of step from a model, in standard deviations of its logits."""
    found: dict[str, float] = {}
    logits = {name: model(torch.tensor(taken.arrays[name])[None])[0].numpy() for name in ("plain", "repeating")}
    for kind in (name.removesuffix("/logits") for name in taken.arrays if name.endswith("/logits")):
        reference = logits[str(taken.arrays[f"{kind}/text"])]
        off = np.abs(taken.arrays[f"{kind}/logits"] - reference[taken.arrays[f"{kind}/positions"]]).max()
        found[kind] = float(off) / float(reference.std())
    return found


def check(found: dict[str, float], limit: float) -> None:
    """Makes sure that every kind of step was taken and agrees; NaN does not."""
    assert found.keys() == KINDS
    assert {kind: off for kind, off in found.items() if not off <= limit} == {}


@pytest.mark.parametrize("way", ["flash", "no flash", "CUDA graphs"])
def test_a_cuda_bundle_computes_what_pytorch_does(rig: Rig, made: Made, record: Record, way: str) -> None:
    if way == "CUDA graphs" and rig.rehearsal:
        pytest.skip("a CPU has no CUDA graphs")
    options = ["graph"] if way == "CUDA graphs" else []
    taken = take_steps(made.cuda, rig.provider, *options, ORT_DISABLE_FLASH_ATTENTION=str(int(way == "no flash")))
    assert not taken.about["torch"] and taken.about["caches"] == rig.provider
    assert 0 < taken.about["accepted"] <= taken.about["drafted"]
    found, limit = differences(taken, made.model), TOLERANCES["float16"]
    for kind, off in found.items():
        record(f"head_dim {made.model.config.head_dim}, {way}: {kind}", off, limit, "σ")
    check(found, limit)


@pytest.mark.parametrize("wrong", ["weight", "window"])
def test_another_model_is_told_apart(rig: Rig, made: Made, wrong: str) -> None:
    """The control: with one other weight, or a window that is shorter by one, the check fails."""
    taken = take_steps(made.cuda, rig.provider)
    model = copy.deepcopy(made.model)
    if wrong == "weight":
        model.model.layers[0].self_attn.k_norm.weight.data[0] += 5
    else:
        shorter = {"sliding_window": made.model.config.sliding_window - 1}
        model.config = model.model.config = model.config.model_copy(update=shorter)
    found = differences(taken, model)
    with pytest.raises(AssertionError):
        check(found, TOLERANCES["float16"])
    if wrong == "window":  # where nothing is out of the window yet, it makes no difference
        assert found["chunk with a past"] <= TOLERANCES["float16"] < found["across the window"]


def quantized(source: Bundle, precision: str) -> Bundle:
    """Returns a bundle of integers; its quality is `slm quantize`'s business."""
    rows = np.random.default_rng(5).integers(0, source.config.vocab_size, (4, 60))
    settings = Settings(precision=precision, prefer="size", method="nearest", gate=Gate(None))  # type: ignore[arg-type]
    out = source.path.with_name(f"{source.path.name}-{precision}")
    return quantize_bundle(source, out, TokenRows("random", rows), settings, None, TokenRows("random", rows))[0]


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_cpu_bundle_computes_what_pytorch_does_with_its_weights(
    cpu_bundle: Bundle, record: Record, precision: str
) -> None:
    """On the CPU of this machine, with the onnxruntime that is installed for the card."""
    bundle = cpu_bundle if precision == "float32" else quantized(cpu_bundle, precision)
    found = differences(take_steps(bundle, "cpu"), model_of(bundle))
    limit = TOLERANCES["float32"] if precision == "float32" else INT8_TOLERANCE
    record(f"{precision} on the CPU", max(found.values()), limit, "σ")
    check(found, limit)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_cuda_bundle_computes_what_pytorch_does_with_its_weights(
    rig: Rig, made: Made, record: Record, precision: str
) -> None:
    bundle = quantized(made.cuda, precision)
    taken = take_steps(bundle, rig.provider)
    assert taken.about["caches"] == rig.provider
    found = differences(taken, model_of(bundle))
    limit = TOLERANCES["float16"]  # activations stay float16, so only they are rounded
    record(f"head_dim {made.model.config.head_dim}, {precision}", max(found.values()), limit, "σ")
    check(found, limit)
