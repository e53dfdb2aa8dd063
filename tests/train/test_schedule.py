"""The learning rate: its three shapes, and the documented recipe's in particular, which rises where it is said to decay."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.train.build import decay_of, momentum_of, schedule_of
from slm.train.recipe import load_recipe
from slm.train.schedule import Schedule, Shape, ramp

# Of the peak: sums and cosines of float64.
ROUNDING = 1e-12


def documented(micro_step: int) -> float:
    return schedule_of(load_recipe("documented")).rate(micro_step)


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
    ours = Schedule(peak=1e-4, final=5e-4, start=1 / 3, warmup=100, total=1_500).rate
    for step in range(1_500):
        assert scheduler.get_last_lr()[0] == pytest.approx(ours(step), rel=1e-6), step
        optimizer.step()
        scheduler.step()


def test_decay_and_after_the_end() -> None:
    rate = Schedule(peak=1.0, final=0.1, start=0.0, warmup=10, total=110).rate
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(1_000) == pytest.approx(0.1)


def test_no_warmup() -> None:
    assert Schedule(peak=1.0, final=0.0, start=0.0, warmup=0, total=10).rate(0) == 1.0


SHAPES: list[Shape] = ["cosine", "wsd", "constant"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_up_is_the_same_line_before_each_shape(shape: Shape) -> None:
    rate = Schedule(peak=2.0, final=0.0, start=0.25, warmup=8, total=100, shape=shape, decay=0.5).rate
    assert [rate(step) for step in (0, 2, 4, 6, 8)] == pytest.approx([0.5, 0.875, 1.25, 1.625, 2.0])


def test_wsd_is_stable_and_then_goes_down_in_a_straight_line() -> None:
    schedule = Schedule(peak=1.0, final=0.2, warmup=10, total=100, shape="wsd", decay=0.4)
    rate = schedule.rate
    assert {rate(step) for step in range(10, 61)} == {1.0}
    assert rate(61) < 1.0
    assert [rate(step) for step in (70, 80, 90, 100, 1_000)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    earlier = replace(schedule, decay=0.6).rate
    assert {earlier(step) for step in range(10, 41)} == {1.0}
    assert earlier(41) < 1.0


def test_wsd_that_decays_all_the_way_begins_after_the_warm_up() -> None:
    rate = Schedule(peak=1.0, final=0.0, start=0.0, warmup=10, total=110, shape="wsd", decay=1.0).rate
    assert [rate(step) for step in (5, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_constant_stays() -> None:
    rate = Schedule(peak=1.0, final=0.1, start=0.0, warmup=10, total=100, shape="constant").rate
    assert {rate(step) for step in (10, 50, 100, 1_000)} == {1.0}


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """Any schedule with a peak above its end and some way between them."""
    total = draw(st.integers(2, 400))
    peak = draw(st.floats(1e-6, 1.0))
    return {
        "peak": peak,
        "final": draw(st.floats(0.0, 0.99)) * peak,
        "start": draw(st.floats(0.0, 1.0)),
        "warmup": draw(st.integers(0, total - 1)),
        "total": total,
        "shape": draw(st.sampled_from(SHAPES)),
        "decay": draw(st.floats(0.01, 1.0)),
    }


@given(schedules())
def test_it_rises_to_the_peak_and_falls_to_the_end(schedule: dict[str, Any]) -> None:
    rates = [Schedule(**schedule).rate(step) for step in range(schedule["total"] + 3)]
    peak, final, warmup, total = (schedule[name] for name in ("peak", "final", "warmup", "total"))
    slack = ROUNDING * peak
    assert rates[warmup] == pytest.approx(peak, rel=ROUNDING)
    assert all(later >= earlier - slack for earlier, later in pairwise(rates[: warmup + 1]))
    assert all(later <= earlier + slack for earlier, later in pairwise(rates[warmup:]))
    end = peak if schedule["shape"] == "constant" else final
    assert rates[total:] == pytest.approx([end] * 3, abs=slack)
    assert rates[::-1] == [
        Schedule(**schedule).rate(step) for step in reversed(range(total + 3))
    ]  # from the number alone


@given(schedules())
def test_there_is_no_jump_at_the_seams(schedule: dict[str, Any]) -> None:
    """A step is never longer than the steepest of its parts: the warm-up's, the cosine's or the decay's slope."""
    peak, final, warmup, total = (schedule[name] for name in ("peak", "final", "warmup", "total"))
    rates = [Schedule(**schedule).rate(step) for step in range(total + 3)]
    rise = peak * (1 - schedule["start"]) / max(1, warmup)
    length = (
        min(total - warmup, max(1, round(schedule["decay"] * total))) if schedule["shape"] == "wsd" else total - warmup
    )
    fall = 1.5708 * (peak - final) / length
    assert max(abs(later - earlier) for earlier, later in pairwise(rates)) <= max(rise, fall) * (1 + 1e-9)


def test_a_ramp_is_a_straight_line_between_its_ends() -> None:
    assert [ramp(0.5, 0.9, 2, 6, step) for step in (0, 2, 3, 4, 6, 9)] == pytest.approx([0.5, 0.5, 0.6, 0.7, 0.9, 0.9])
    assert ramp(1.0, 0.0, 0, 8, 8) == 0.0


def test_schedules_of_momentum_and_decay_reach_the_optimizers() -> None:
    """Momentum begins at its first value in the first update; the decay is 0 in the last one."""
    overrides = ["optimizer.name=muon", "optimizer.momentum_start=0.5", "optimizer.momentum_warmup=0.4"]
    overrides += ["optimizer.decay_shape=linear", "batch.accumulation=2", "schedule.micro_steps=20"]
    momentum, decay = momentum_of(load_recipe("tiny", overrides)), decay_of(load_recipe("tiny", overrides))
    assert momentum is not None and decay is not None
    assert [momentum(done) for done in (2, 6, 10, 20)] == pytest.approx([0.5, 0.725, 0.95, 0.95])
    assert [decay(done) for done in (2, 10, 20)] == pytest.approx([0.9, 0.5, 0.0])
    assert momentum_of(load_recipe("tiny")) is None
    assert decay_of(load_recipe("tiny")) is None
