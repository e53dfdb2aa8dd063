"""The learning rate, and the documented recipe's in particular, which rises where it is said to decay."""

from functools import partial

import pytest

from slm.train.recipe import load_recipe
from slm.train.schedule import learning_rate


def documented(micro_step: int) -> float:
    schedule = load_recipe("documented").schedule
    return learning_rate(
        micro_step,
        peak=schedule.learning_rate,
        final=schedule.final_learning_rate,
        start=schedule.start,
        warmup=schedule.warmup_micro_steps,
        total=schedule.micro_steps,
    )


def test_documented_values() -> None:
    assert documented(0) == pytest.approx(1e-4 / 3)
    assert documented(5_000) == pytest.approx(1e-4 * 2 / 3)
    assert documented(10_000) == pytest.approx(1e-4)
    assert documented(80_000) == pytest.approx(3e-4)  # half way
    assert documented(150_000) == pytest.approx(5e-4)


def test_documented_rate_rises_all_the_way() -> None:
    rates = [documented(step) for step in range(0, 150_001, 1_000)]
    assert rates == sorted(rates)


def test_it_is_what_pytorch_computes_for_the_source() -> None:
    # The source: SequentialLR of LinearLR and CosineAnnealingLR, stepped once a micro-step.
    import torch
    from torch.optim import lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    warmup = lr_scheduler.LinearLR(optimizer, total_iters=100)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=1_400, eta_min=5e-4)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[100])
    ours = partial(learning_rate, peak=1e-4, final=5e-4, start=1 / 3, warmup=100, total=1_500)
    for step in range(1_500):
        assert scheduler.get_last_lr()[0] == pytest.approx(ours(step), rel=1e-6), step
        optimizer.step()
        scheduler.step()


def test_decay_and_after_the_end() -> None:
    rate = partial(learning_rate, peak=1.0, final=0.1, start=0.0, warmup=10, total=110)
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(1_000) == pytest.approx(0.1)


def test_no_warmup() -> None:
    assert learning_rate(0, peak=1.0, final=0.0, start=0.0, warmup=0, total=10) == 1.0
