"""Updates: one batch can be overfitted, a seeded run gives known losses, and accumulation and clipping do what they say.

Dimensions: B windows, T positions.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.train.learner import Learner, Objective, Update, UpdateSettings
from slm.train.optimizer import make_optimizers
from slm.train.precision import Precision
from slm.train.sections import OptimizerRecipe

FLOAT32 = Precision(None, scale_loss=False)
# Written to four decimals. Another CPU adds in another order: one thread and two differ by 1e-6. A second beta of 0.9
# moves them by 3.5e-3, an eps of 1e-6 by 1e-3, no weight decay by 4e-4.
GOLDEN_TOLERANCE = 2e-4
GOLDEN_LOSSES = [5.7649, 5.7411, 5.7144, 5.6858, 5.6126, 5.5974, 5.5685, 5.5965, 5.4529, 5.4747]


def batch(micro_step: int, *, size: int = 4, context: int = 24) -> tuple[Tensor, Tensor]:
    """Numbers that count up by a step of their row's own: something to learn, the same on every machine."""
    random = np.random.default_rng([7, micro_step])
    first, step = random.integers(0, 320, (2, size, 1))
    rows = torch.from_numpy((first + (1 + step % 3) * np.arange(context + 1)) % 320)
    return rows[:, :-1], rows[:, 1:]


def make_learner(config: ModelConfig, *, optimizer: Any = "adamw", chunk: int | None = None, **changes: Any) -> Learner:
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizers = make_optimizers(model, OptimizerRecipe(name=optimizer))
    inputs = changes.pop("batch", batch)
    settings = replace(UpdateSettings(lambda micro_step: 3e-3, FLOAT32), **changes)
    return Learner(Objective(model, chunk=chunk), optimizers, inputs, settings)


def updates(learner: Learner, count: int) -> list[Update]:
    return [learner.update(i * learner.accumulation, lambda: None) for i in range(count)]


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.objective.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_overfitted(config: ModelConfig, optimizer: str) -> None:
    random = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    learner = make_learner(config, optimizer=optimizer, batch=lambda micro_step: (random[:, :-1], random[:, 1:]))
    losses = [update.loss for update in updates(learner, 80)]
    assert losses[0] > 5.5  # ln 320 is 5.77
    assert losses[-1] < 0.05


def test_golden_losses(config: ModelConfig) -> None:
    losses = [update.loss for update in updates(make_learner(config, accumulation=2), 10)]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=GOLDEN_TOLERANCE)


def test_the_loss_in_chunks_trains_alike(config: ModelConfig) -> None:
    losses = [update.loss for update in updates(make_learner(config, accumulation=2, chunk=7), 10)]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=GOLDEN_TOLERANCE)


def test_muon_takes_other_steps(config: ModelConfig) -> None:
    losses = [update.loss for update in updates(make_learner(config, optimizer="muon", accumulation=2), 10)]
    assert losses[0] == pytest.approx(GOLDEN_LOSSES[0], abs=GOLDEN_TOLERANCE)
    assert max(abs(loss - golden) for loss, golden in zip(losses, GOLDEN_LOSSES, strict=True)) > 10 * GOLDEN_TOLERANCE


def test_two_halves_make_the_update_of_the_whole(config: ModelConfig) -> None:
    inputs, targets = batch(0, size=8)

    def half(micro_step: int) -> tuple[Tensor, Tensor]:
        rows = slice(4 * micro_step, 4 * micro_step + 4)
        return inputs[rows], targets[rows]

    whole, halves = (
        make_learner(config, batch=lambda _: (inputs, targets)),
        make_learner(config, batch=half, accumulation=2),
    )
    (one,), (two,) = updates(whole, 1), updates(halves, 1)
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)


def test_the_gradient_is_clipped(config: ModelConfig) -> None:
    seen: list[float] = []
    learner = make_learner(config, max_grad_norm=0.25)
    learner.optimizers.members[0].register_step_pre_hook(
        lambda *_: seen.append(
            torch.stack([p.grad.norm() for p in learner.objective.parameters() if p.grad is not None]).norm().item()
        )
    )
    (update,) = updates(learner, 1)
    assert update.grad_norm > 0.25
    assert seen == pytest.approx([0.25], rel=1e-3)


def test_the_rate_is_that_of_the_last_micro_step(config: ModelConfig) -> None:
    learner = make_learner(config, rate=lambda micro_step: micro_step * 1e-4, accumulation=2)
    assert [update.learning_rate for update in updates(learner, 3)] == pytest.approx([2e-4, 4e-4, 6e-4])
    assert [group["lr"] for group in learner.optimizers.groups] == pytest.approx([6e-4] * 3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "precision", [Precision(torch.bfloat16, False), Precision(torch.float16, True)], ids=["bfloat16", "float16"]
)
def test_lower_precision_learns_too_and_keeps_float32_weights(
    config: ModelConfig, precision: Precision, optimizer: str
) -> None:
    learner = make_learner(config, precision=precision, optimizer=optimizer)
    losses = [update.loss for update in updates(learner, 30)]
    assert losses[-1] < losses[0] - 0.4
    assert {p.dtype for p in learner.objective.parameters()} == {torch.float32}
    state = learner.optimizers.state_tensors(learner.objective)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_float16_scales_the_loss_and_clips_without_the_scale(config: ModelConfig) -> None:
    half, full = make_learner(config, precision=Precision(torch.float16, True)), make_learner(config)
    (scaled,), (plain,) = updates(half, 1), updates(full, 1)
    assert half.scaler.get_scale() >= 2**15
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_skips_the_update_and_lowers_the_scale(config: ModelConfig, optimizer: str) -> None:
    learner = make_learner(config, precision=Precision(torch.float16, True), optimizer=optimizer)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(learner)
    (update,) = updates(learner, 1)
    assert not np.isfinite(update.grad_norm)
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], after) for name, after in weights(learner).items())


@pytest.mark.parametrize("overflows", ["norm", "layers.1.mlp.up_proj"])
def test_an_overflow_in_what_one_optimizer_has_skips_the_update_of_both(config: ModelConfig, overflows: str) -> None:
    """The loss scale is told by each optimizer; one that saw nothing infinite would go on with its momentum."""
    learner = make_learner(config, precision=Precision(torch.float16, True), optimizer="muon")
    updates(learner, 3)
    before, scale = weights(learner), learner.scaler.get_scale()
    parameter = learner.objective.get_parameter(f"model.model.{overflows}.weight")
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    (update,) = updates(learner, 1)
    assert not np.isfinite(update.grad_norm)
    assert learner.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[name], after) for name, after in weights(learner).items())
    hook.remove()
    updates(learner, 1)
    assert not any(torch.equal(before[name], after) for name, after in weights(learner).items())


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_not_finite_changes_nothing(config: ModelConfig, what: str, optimizer: str) -> None:
    learner = make_learner(config, optimizer=optimizer)
    updates(learner, 1)
    before = weights(learner)
    if what == "loss":
        learner.objective.register_forward_hook(lambda _m, _i, output: output * float("nan"))
    else:
        norm = learner.objective.get_parameter("model.model.norm.weight")
        norm.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=what):
        updates(learner, 1)
    assert all(torch.equal(before[name], after) for name, after in weights(learner).items())


def test_an_update_that_is_abandoned_changes_nothing(config: ModelConfig) -> None:
    learner, other = make_learner(config, accumulation=2), make_learner(config, accumulation=2)
    for each in (learner, other):
        updates(each, 1)
    before, calls = weights(learner), iter([None, KeyboardInterrupt])

    def stop() -> None:
        if (error := next(calls)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        learner.update(2, stop)
    assert all(torch.equal(before[name], after) for name, after in weights(learner).items())
    for each in (learner, other):
        each.update(2, lambda: None)
    assert all(torch.equal(weights(other)[name], after) for name, after in weights(learner).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("altered", [False, True])
def test_the_optimizers_state_comes_back(config: ModelConfig, optimizer: str, altered: bool) -> None:
    make: Callable[[], Learner] = partial(make_learner, config, optimizer=optimizer)
    one, other = make(), make()
    updates(one, 3)
    other.objective.load_state_dict(one.objective.state_dict())
    saved = {name: tensor.clone() for name, tensor in one.optimizers.state_tensors(one.objective).items()}
    assert saved
    if altered:  # the control
        name = next(name for name in saved if name.endswith(("exp_avg", "momentum_buffer")))
        saved[name].mul_(1.01)
    other.optimizers.load_state_tensors(other.objective, saved)
    for learner in (one, other):
        learner.update(3, lambda: None)
    assert all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(other).items()) is not altered
