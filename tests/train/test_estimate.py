"""The estimate: its tokens and operations are counted, its memory is the run's, its time has a basis and an order."""

import pytest
import torch

from slm.core.accounting import prefill_flops
from slm.core.nn import CausalLM
from slm.train.estimate import GPUS, estimate, training_flops
from slm.train.learner import Objective
from slm.train.muon import orthogonalization_flops
from slm.train.precision import Precision
from slm.train.recipe import load_recipe


def test_the_operations_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recipe = load_recipe("tiny", ["batch.batch_size=2", "batch.context=8"])
    objective = Objective(CausalLM(recipe.model.config()))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        objective(ids, ids).backward()
    forward = prefill_flops(recipe.model.config(), 8, head_positions=8)
    attention = forward.attention * 8 * 8 // (8 * 9 // 2)  # short sequences are attended in whole squares, on a CPU
    assert counter.get_total_flops() == 3 * (forward.body + forward.head + attention) * len(ids)
    assert training_flops(recipe, recipe.model.config()) == 3 * forward.total / 8


def test_a_gpu_is_estimated_by_its_data_sheet() -> None:
    recipe = load_recipe("documented")
    t4, a100 = (estimate(recipe, gpu, None) for gpu in ("t4", "a100"))
    assert (t4.updates, t4.micro_steps, t4.tokens) == (4687, 150_000, 614_334_464)
    assert t4.precision == "float16 autocast, loss scaled" and a100.precision == "bfloat16 autocast"
    assert t4.kernels == {"efficient": 18} and a100.kernels == {"flash": 18}
    ratios = [
        (t4.seconds - t4.update_seconds) / (a100.seconds - a100.update_seconds),
        t4.update_seconds / a100.update_seconds,
    ]
    assert ratios == pytest.approx(
        [GPUS["a100"].tflops / GPUS["t4"].tflops, GPUS["a100"].gb_s / GPUS["t4"].gb_s]  # AdamW only moves numbers
    )
    # 28 bytes of each parameter, updated 4,687 times
    assert t4.update_seconds == pytest.approx(4687 * 28 * t4.parameters / 320e9)
    assert t4.memory_available == round(14.6 * 2**30)
    assert "not run on that hardware" in t4.basis
    assert t4.advice is None
    two = estimate(recipe, "t4", None, processes=2)
    assert two.seconds == pytest.approx((t4.seconds + t4.update_seconds) / 2)  # each process makes every update


def test_the_time_of_updates_counts_what_the_optimizer_does() -> None:
    adamw, muon = (
        estimate(load_recipe("modern", [f"optimizer.name={name}"]), "t4", None) for name in ("adamw", "muon")
    )
    shapes = [(1024, 640), (256, 640), (256, 640), (640, 1024), (2048, 640), (2048, 640), (640, 2048)]
    operations = 18 * sum(orthogonalization_flops(*shape) for shape in shapes)
    moved = 8 * 18 * sum(rows * columns for rows, columns in shapes)  # one moment less to read and write
    wanted = 6250 * (operations / (65e12 * 0.3) - moved / 320e9)
    assert muon.update_seconds - adamw.update_seconds == pytest.approx(wanted)


def test_a_mask_costs_the_scores_that_it_hides() -> None:
    """Where windows are masked, all scores are computed; where FlexAttention skips them, only those within the window."""
    recipe = load_recipe("modern", ["batch.context=2048", "batch.batch_size=4"])
    config, half = recipe.model.config(), Precision(torch.float16, scale_loss=True)
    t4, h100 = (training_flops(recipe, config, GPUS[card].able, half) for card in ("t4", "h100"))
    hidden = 2048**2 - (512 * 513 // 2 + 1536 * 512)
    assert t4 - h100 == pytest.approx(3 * 15 * 4 * 4 * 256 * hidden / 2048)
    assert estimate(recipe, "h100", None).kernels == {"flex": 15, "flash": 3}
    assert estimate(recipe, "rtx4090", None).kernels == {"efficient": 15, "flash": 3}  # its tiles do not fit there


def test_what_does_not_fit_is_advised_on() -> None:
    advice = estimate(load_recipe("documented", ["batch.batch_size=128"]), "t4", None).advice
    assert advice is not None and "batch.batch_size=64" in advice and "MiB" in advice


def test_here_the_time_is_measured_and_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (estimate(load_recipe("tiny", [f"schedule.micro_steps={n}"]), None, 1 << 40) for n in (100, 10_000))
    assert short.device == "CPU" and short.advice is None and "timed" in short.basis
    assert 10 < long.seconds / short.seconds < 1000  # a hundred times the work, timed twice on a busy machine
    assert estimate(load_recipe("tiny"), None, 1 << 20).advice is not None
