"""Sampling on distributions written by hand."""

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.runtime.sampling import GREEDY, Sampling, draw, keep_top_k, keep_top_p, softmax

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES)


def test_softmax() -> None:
    np.testing.assert_allclose(softmax(LOGITS + 100), PROBABILITIES)
    assert softmax(np.array([0.0, -np.inf]))[1] == 0


@pytest.mark.parametrize(("k", "kept"), [(0, {0, 1, 2, 3}), (1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (9, {0, 1, 2, 3})])
def test_top_k(k: int, kept: set[int]) -> None:
    assert set(np.flatnonzero(np.isfinite(keep_top_k(LOGITS, k)))) == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, {1}), (0.4, {1}), (0.41, {1, 3}), (0.7, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p(p: float, kept: set[int]) -> None:
    left = keep_top_p(PROBABILITIES, p)
    assert set(np.flatnonzero(left)) == kept
    assert left.sum() == pytest.approx(1)


def test_draw_follows_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    counts = np.bincount([draw(PROBABILITIES, generator) for _ in range(20_000)], minlength=4)
    # Four standard deviations of a share of 0.4 over 20,000 draws; the odds of failing by chance are below 1 in 10,000.
    np.testing.assert_allclose(counts / 20_000, PROBABILITIES, atol=0.014)


def test_draw_never_takes_an_impossible_token() -> None:
    class Edge:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    probabilities = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    chosen = {draw(probabilities, Edge(x)) for x in (0.0, 0.4999999, 0.5, 1 - 2**-53)}  # type: ignore[arg-type]
    assert chosen == {1, 3}


def test_temperature_zero_and_top_k_one_are_greedy() -> None:
    generator = np.random.default_rng(0)
    assert GREEDY.choose(LOGITS, generator) == 1
    assert all(Sampling(top_k=1).choose(LOGITS, generator) == 1 for _ in range(20))


def test_high_temperature_flattens() -> None:
    generator = np.random.default_rng(0)
    hot = Sampling(temperature=100, top_k=0, top_p=1)
    counts = np.bincount([hot.choose(LOGITS, generator) for _ in range(8000)], minlength=4)
    np.testing.assert_allclose(counts / 8000, 0.25, atol=0.03)


def test_same_seed_same_choices() -> None:
    def choices(seed: int) -> list[int]:
        sampling = Sampling(seed=seed, top_p=1)
        generator = sampling.generator()
        return [sampling.choose(LOGITS, generator) for _ in range(50)]

    assert choices(1) == choices(1) != choices(2)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"seed": -1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SlmError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
