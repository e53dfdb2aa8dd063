"""The averages of the weights: plain references, changing places with the weights, and its tensors."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.train.average import WeightAverage, exponential, uniform

# float32 in another order; 2e-7 seen of values up to 5. A decay of 0.8 for 0.9 is off by 0.1.
TOLERANCE = 1e-5


@pytest.fixture
def model(config: ModelConfig, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(config)


def move(model: CausalLM, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=draw)


def moving(model: CausalLM, decay: float, updates: int = 0) -> WeightAverage:
    return WeightAverage(model, partial(exponential, decay), updates)


def weights(model: CausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def averaged_weights(average: WeightAverage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in average.tensors().items()}


def differ(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("decay", [0.9, 0.99])
@pytest.mark.parametrize("updates", [0, 1000])
def test_it_is_a_plain_exponential_average(model: CausalLM, decay: float, updates: int) -> None:
    average = moving(model, decay, updates)
    plain, other = weights(model), weights(model)
    for number in range(1, 41):
        move(model, number)
        average.update()
        done = updates + number
        keep = min(decay, (1 + done) / (10 + done))  # less at first, when there is little to average
        for name, now in weights(model).items():
            plain[name] = keep * plain[name] + (1 - keep) * now
            other[name] = (keep - 0.1) * other[name] + (1.1 - keep) * now
    assert differ(average.tensors(), plain) < TOLERANCE
    assert differ(average.tensors(), other) > 100 * TOLERANCE  # the control


def test_what_went_into_it_before_counts(model: CausalLM) -> None:
    young, old = moving(model, 0.999), moving(model, 0.999, updates=5000)
    move(model, 1)
    for average in (young, old):
        average.update()
    assert differ(young.tensors(), old.tensors()) > 0.1


def test_it_changes_places_with_the_weights_and_back(model: CausalLM) -> None:
    average = moving(model, 0.9)
    move(model, 1)
    average.update()
    raw, averaged = weights(model), averaged_weights(average)
    assert differ(raw, averaged) > 0.1
    with average.in_place():
        assert differ(weights(model), averaged) == 0
        assert differ(average.tensors(), raw) == 0
    assert differ(weights(model), raw) == 0
    assert differ(average.tensors(), averaged) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_weights_come_back_whatever_happens(model: CausalLM, error: type[BaseException]) -> None:
    average = moving(model, 0.9)
    move(model, 1)
    average.update()
    raw, averaged = weights(model), averaged_weights(average)
    with pytest.raises(error), average.in_place():
        raise error
    assert differ(weights(model), raw) == 0
    assert differ(average.tensors(), averaged) == 0


def test_a_tied_head_shows_the_average_too(model: CausalLM) -> None:
    average = moving(model, 0.9)
    ids = torch.arange(20)[None]
    before = model(ids)
    move(model, 1)
    after = model(ids)
    with average.in_place():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(ids), before)
    assert torch.equal(model(ids), after)


def test_it_is_put_back_from_its_tensors(
    model: CausalLM, config: ModelConfig, make_model: Callable[..., CausalLM]
) -> None:
    average = moving(model, 0.9)
    for seed in (1, 2):
        move(model, seed)
        average.update()
    twin = make_model(config, seed=9)
    twin.load_state_dict(model.state_dict())
    again, forgetful = moving(twin, 0.9, updates=2), moving(twin, 0.9, updates=2)
    again.load_tensors(average.tensors())
    for each in (model, twin):
        move(each, 3)
    for each in (average, again, forgetful):
        each.update()
    assert differ(again.tensors(), average.tensors()) == 0
    assert differ(forgetful.tensors(), average.tensors()) > 0.1


def test_it_follows_updates_alone(model: CausalLM) -> None:
    average = moving(model, 0.9)
    before = weights(model)
    move(model, 1)
    assert differ(average.tensors(), before) == 0
    assert not any(tensor.requires_grad for tensor in average.tensors().values())


@pytest.mark.parametrize("before", [0, 3])
def test_the_tail_is_the_mean_of_the_weights_after_each_of_its_updates(model: CausalLM, before: int) -> None:
    average = WeightAverage(model, partial(uniform, before))
    seen = []
    for number in range(1, 9):
        move(model, number)
        average.update()
        seen.append(weights(model))
        tail = seen[before:] or seen[-1:]  # before the tail begins: the weights themselves
        mean = {name: torch.stack([each[name] for each in tail]).mean(0) for name in seen[0]}
        assert differ(average.tensors(), mean) < TOLERANCE
    assert differ(average.tensors(), seen[-1]) > 0.1
    shifted = {name: torch.stack([each[name] for each in seen[before + 1 :]]).mean(0) for name in seen[0]}
    assert differ(average.tensors(), shifted) > 100 * TOLERANCE  # the control


def test_a_tail_that_has_not_begun_is_the_weights_bit_for_bit(model: CausalLM) -> None:
    average = WeightAverage(model, partial(uniform, 2))
    move(model, 1)
    average.update()
    assert differ(average.tensors(), weights(model)) == 0
