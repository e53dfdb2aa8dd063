"""Training on the device: memory against the estimate, an overflow of float16, resuming, and compiled kernels."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from slm.core.nn import CausalLM
from slm.train.memory import training_bytes
from slm.train.precision import choose_precision
from slm.train.recipe import Recipe
from slm.train.run import TrainResult, resume, train
from slm.train.state import load_state
from tests.gpu.conftest import Record
from tests.gpu.rig import Rig
from tests.progress import Stopper

pytestmark = pytest.mark.gpu

MAKE = Callable[..., Recipe]
# Blocks of the allocator, cuBLAS's workspaces, masks and cosines are not part of the estimate.
MEMORY = 0.15
UPDATES = 2
# Overflows float16's 65,504 whatever the gradient is, and is far from float32's limit.
OVERFLOWING = 2.0**70
DEFAULT_SCALE = 2.0**16
# Losses of the same updates, compiled and not: another order of sums, in 16 bits.
COMPILED = 2e-3
_MIB = 1 << 20


@pytest.fixture
def recipe(rig: Rig, text: Path, tokenizer_file: Path) -> MAKE:
    """Makes recipes: (name, updates, overrides)."""
    return lambda name, updates, *overrides: rig.recipe(name, text, tokenizer_file, updates, *overrides)


def train_rows(run: Path) -> list[dict[str, Any]]:
    """Returns what a run recorded of its updates."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["type"] == "train"]


def weights(run: Path) -> dict[str, Tensor]:
    """Returns the weights that a run ended with."""
    found: dict[str, Tensor] = safetensors.torch.load_file(run / "checkpoint" / "last" / "model.safetensors")
    return found


def first_weights(recipe: Recipe) -> dict[str, Tensor]:
    """Returns the weights that a run begins with."""
    model = CausalLM(recipe.model.config())
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Returns the Euclidean distance of two sets of weights."""
    assert one.keys() == other.keys()
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5


def check_memory(measured: int, estimated: int) -> None:
    """Makes sure that an estimate is near what was measured."""
    assert abs(measured - estimated) <= MEMORY * estimated, f"{measured / _MIB:,.0f} MiB, not {estimated / _MIB:,.0f}"


@pytest.mark.parametrize("name", ["documented", "modern"])
def test_memory_is_what_the_estimate_says(rig: Rig, recipe: MAKE, record: Record, name: str) -> None:
    """Two updates of a recipe at its full shape; twice or half the estimate is the control."""
    chosen, results = recipe(name, UPDATES), list[TrainResult]()
    config = chosen.model.config()
    precision = choose_precision(chosen.machine.precision, rig.able, config)
    estimated = training_bytes(chosen, config, precision, able=rig.able).total
    rig.check_fits(estimated)
    peak = rig.peak_bytes(lambda: results.append(train(chosen, Path("run"))))
    (result,) = results
    record(
        f"{name}: peak memory, estimate {estimated / _MIB:,.0f}", peak / _MIB, (1 + MEMORY) * estimated / _MIB, "MiB"
    )
    speed = [row["tokens_s"] for row in train_rows(Path("run"))]
    record(f"{name}, {precision.name}: training", float(speed[-1]), None, "tokens/s")
    assert result.updates == len(speed) == UPDATES
    check_memory(peak, estimated)
    for factor in (2, 0.5):
        with pytest.raises(AssertionError):
            check_memory(peak, round(factor * estimated))


def test_an_overflow_of_float16_skips_the_update(recipe: MAKE, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scale that no gradient survives: weights stay, the scale is halved; the default scale is the control."""
    shape = ("model.num_hidden_layers=2", "batch.context=64", "batch.batch_size=2", "batch.accumulation=2")
    chosen = recipe("modern", UPDATES, "machine.precision=float16", *shape)
    scaler = torch.amp.GradScaler
    for name, scale in (("overflow", OVERFLOWING), ("default", DEFAULT_SCALE)):
        monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=scale))
        train(chosen, Path(name))
        saved = load_state(Path(name))
        assert saved is not None
        skipped = [row["grad_norm"] is None for row in train_rows(Path(name))]
        moved = distance(weights(Path(name)), first_weights(chosen))
        record(f"loss scale of {scale:.3g}: updates skipped", sum(skipped))
        assert len(skipped) == UPDATES and all(skipped) == (name == "overflow") == (moved == 0)
        if name == "overflow":
            assert saved.counters.scaler["scale"] == scale / 2**UPDATES
        assert saved.counters.scaler["scale"] == scale / 2 ** sum(skipped)


def test_a_resumed_run_ends_as_one_in_one_piece(rig: Rig, recipe: MAKE, record: Record) -> None:
    """Compared with how far the weights went; where the run was cut is the control."""
    updates = 4
    chosen = recipe("documented", updates, "batch.accumulation=2", "model.num_hidden_layers=2")
    train(chosen, Path("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(chosen, Path("cut"), Stopper(2 * 2 + 1))
    stopped = load_state(Path("cut"))
    assert stopped is not None and 0 < stopped.counters.micro_steps < updates * 2
    shutil.copytree("cut", "as-stopped")
    resume(Path("cut"))
    whole = weights(Path("whole"))
    way = distance(whole, first_weights(chosen))
    parted = distance(weights(Path("cut")), whole) / way
    record("resumed run: distance from one in one piece", parted, rig.parting, "of the way")
    assert len(train_rows(Path("cut"))) == updates
    assert parted <= rig.parting < distance(weights(Path("as-stopped")), whole) / way


def test_compiled_training_has_the_same_losses(
    rig: Rig, recipe: MAKE, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed is the control. A rehearsal traces the model and leaves it to PyTorch's kernels."""
    if rig.missing_compiler is not None:
        pytest.skip(f"machine.compile=true needs {rig.missing_compiler}")
    if rig.rehearsal:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses: dict[str, list[float]] = {}
    for name, overrides in (("plain", ()), ("compiled", ("machine.compile=true",)), ("other", ("seed=1",))):
        chosen = recipe("modern", UPDATES, "model.num_hidden_layers=2", *overrides)
        train(chosen, Path(name))
        losses[name] = [row["loss"] for row in train_rows(Path(name))]
    compiled, other = (
        max(abs(a - b) for a, b in zip(losses["plain"], losses[name], strict=True)) for name in ("compiled", "other")
    )
    record("compiled training: difference of losses", compiled, COMPILED, "nats")
    assert compiled <= COMPILED < other
