"""The estimate: its tokens and operations are counted, its memory is the run's, its time has a basis and an order."""

import pytest
import torch

from slm.core.accounting import prefill_flops
from slm.core.nn import CausalLM
from slm.train.estimate import GPUS, estimate, training_flops
from slm.train.learner import Objective
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
    assert t4.seconds / a100.seconds == pytest.approx(GPUS["a100"].tflops / GPUS["t4"].tflops)
    assert "not run on that hardware" in t4.basis
    assert t4.advice is None
    assert estimate(recipe, "t4", None, processes=2).seconds == pytest.approx(t4.seconds / 2)


def test_what_does_not_fit_is_advised_on() -> None:
    advice = estimate(load_recipe("documented", ["batch.batch_size=128"]), "t4", None).advice
    assert advice is not None and "batch.batch_size=64" in advice and "MiB" in advice


def test_here_the_time_is_measured_and_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (estimate(load_recipe("tiny", [f"schedule.micro_steps={n}"]), None, 1 << 40) for n in (100, 10_000))
    assert short.device == "CPU" and short.advice is None and "timed" in short.basis
    assert 10 < long.seconds / short.seconds < 1000  # a hundred times the work, timed twice on a busy machine
    assert estimate(load_recipe("tiny"), None, 1 << 20).advice is not None
