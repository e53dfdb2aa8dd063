"""Sampling on hand-written distributions, and compared with transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from slm.core.errors import SlmError
from slm.runtime.penalties import History
from slm.runtime.sampling import (
    GREEDY,
    Array,
    Sampler,
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    softmax,
)

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES)
# Two float32 softmaxes of the same logits, added up in another order.
SOFTMAX_TOLERANCE = 1e-6


def test_softmax() -> None:
    np.testing.assert_allclose(softmax(LOGITS + 100), PROBABILITIES)
    assert softmax(np.array([0.0, -np.inf]))[1] == 0
    np.testing.assert_allclose(softmax(2 * LOGITS, temperature=2), PROBABILITIES)


@pytest.mark.parametrize(("k", "kept"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k(k: int, kept: list[int]) -> None:
    assert keep_top_k(LOGITS, k).tolist() == kept


def test_top_k_keeps_ties_at_the_border() -> None:
    assert keep_top_k(np.array([1.0, 2.0, 1.0, 0.0]), 2).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(p: float, kept: list[int]) -> None:
    assert keep_top_p(PROBABILITIES, p).tolist() == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2, 3]), (0.26, [1, 2, 3]), (0.51, [1, 3]), (1.0, [1])]
)
def test_min_p(p: float, kept: list[int]) -> None:
    assert keep_min_p(PROBABILITIES, p).tolist() == kept


# The entropy is 1.280 nats; the surprises 2.303, 0.916, 1.609, 1.204 are 1.023, 0.364, 0.330, 0.076 away from it.
@pytest.mark.parametrize(
    ("p", "kept"), [(0.3, [3]), (0.31, [2, 3]), (0.5, [2, 3]), (0.51, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_typical(p: float, kept: list[int]) -> None:
    assert keep_typical(PROBABILITIES, p).tolist() == kept


def test_typical_with_an_impossible_token() -> None:
    assert keep_typical(np.array([0.0, 1.0]), 0.5).tolist() == [1]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_top_k_of_any_size_keeps_what_sorting_would(size: int, k: int, seed: int) -> None:
    row = np.random.default_rng(seed).integers(0, size, size).astype(np.float32)  # with ties
    border = np.sort(row)[::-1][min(k, size) - 1]
    np.testing.assert_array_equal(keep_top_k(row, k), np.flatnonzero(row >= border))


@given(st.integers(1, 3000), st.floats(0.01, 0.999), st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_top_p_of_any_size_keeps_what_sorting_would(size: int, p: float, spread: float, seed: int) -> None:
    probabilities = softmax(np.random.default_rng(seed).standard_normal(size) * spread)
    order = np.argsort(-probabilities, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(probabilities[order]), p))
    np.testing.assert_array_equal(keep_top_p(probabilities, p), np.sort(order[:count]))


def test_draw_follows_the_probabilities() -> None:
    generator = np.random.default_rng(0)
    counts = np.bincount([draw(PROBABILITIES, generator) for _ in range(20_000)], minlength=4)
    # Four standard deviations of a share of 0.4 over 20,000 draws; the odds of failing by chance are below 1 in 10,000.
    np.testing.assert_allclose(counts / 20_000, PROBABILITIES, atol=0.014)


def test_draw_follows_the_probabilities_over_a_vocabulary() -> None:
    """The vocabulary is larger than a block, and not a multiple of one: checks the share of every eighth token."""
    generator = np.random.default_rng(0)
    probabilities = softmax(generator.standard_normal(8 * 321).astype(np.float32))
    counts = np.bincount([draw(probabilities, generator) // 321 for _ in range(20_000)], minlength=8)
    np.testing.assert_allclose(counts / 20_000, probabilities.reshape(8, 321).sum(1), atol=0.011)


class Chance:
    """A generator that returns given numbers."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("before", [0, 511, 512, 5000])
def test_draw_never_takes_an_impossible_token(before: int) -> None:
    probabilities = np.concatenate([np.zeros(before), [0.0, 0.5, 0.0, 0.5, 0.0], np.zeros(before)])
    chosen = {draw(probabilities, Chance(x)) for x in (0.0, 0.4999999, 0.5, 1 - 2**-53)}  # type: ignore[arg-type]
    assert chosen == {before + 1, before + 3}


def choose(sampling: Sampling, logits: Array = LOGITS, times: int = 1) -> list[int]:
    """Chooses repeatedly from the same logits, without a history."""
    generator = sampling.generator()
    return [sampling.choose(logits, generator) for _ in range(times)]


def test_what_is_greedy() -> None:
    assert choose(GREEDY) == [1]
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1), Sampling(temperature=1e-320)):
        assert choose(sampling, times=20) == [1] * 20


def test_high_temperature_flattens() -> None:
    hot = choose(Sampling(temperature=100, top_k=0, top_p=1), times=8000)
    np.testing.assert_allclose(np.bincount(hot, minlength=4) / 8000, 0.25, atol=0.03)


def test_same_seed_same_choices() -> None:
    one, two = Sampling(seed=1, top_p=1), Sampling(seed=2, top_p=1)
    assert choose(one, times=50) == choose(one, times=50) != choose(two, times=50)


def test_logits_that_are_no_numbers_are_refused() -> None:
    for logits in ([0.0, np.nan], [-np.inf, -np.inf], [0.0, np.inf]):
        for sampling in (GREEDY, Sampling()):
            with pytest.raises(SlmError, match="no token can be chosen"):
                choose(sampling, np.array(logits))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"seed": -1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"typical_p": 0},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": {3: float("inf")}},
        {"logit_bias": {3: float("nan")}},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SlmError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_bias_for_a_token_that_is_not_there_is_refused() -> None:
    for token in (-1, 4):
        with pytest.raises(SlmError, match=f"has token id {token}; ids are from 0 to 3"):
            Sampler(Sampling(logit_bias={token: 1}), [0], 4)


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda logits: keep_top_k(logits, 7), TopKLogitsWarper(7)),
        (lambda logits: keep_top_k(logits, 400), TopKLogitsWarper(400)),
        (lambda logits: keep_top_p(softmax(logits), 0.6), TopPLogitsWarper(0.6)),
        (lambda logits: keep_top_p(softmax(logits), 0.97), TopPLogitsWarper(0.97)),
        (lambda logits: keep_min_p(softmax(logits), 0.1), MinPLogitsWarper(0.1)),
        (lambda logits: keep_typical(softmax(logits), 0.3), TypicalLogitsWarper(0.3)),
        (lambda logits: keep_typical(softmax(logits), 0.9), TypicalLogitsWarper(0.9)),
    ],
)
def test_each_keeps_what_transformers_keeps(ours: Any, theirs: Any, spread: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits = (generator.standard_normal(5000) * spread).astype(np.float32)
        kept = torch.isfinite(theirs(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])[0])
        np.testing.assert_array_equal(ours(logits), np.flatnonzero(kept.numpy()))


BIAS = {7: 2.5, 30: -4.0, 31: float("-inf")}
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
EVERYTHING: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 60,
    "top_p": 0.9,
    "min_p": 0.15,
    "typical_p": 0.8,
    "repetition_penalty": 1.4,
}


def compare_with_transformers(checkpoint: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> list[int]:
    """Follows a text of transformers' own generate; returns how many tokens could be chosen at each step.

    Raises:
        AssertionError: Where others could be chosen after its logits processors than after our sampling, or with other
            probabilities.
    """
    prompt = [5, 6, 7, 5]
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_pretrained(checkpoint).generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=True,
        eos_token_id=319,  # so that the text goes on
        sequence_bias={(token,): bias for token, bias in BIAS.items()},
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **NEUTRAL | theirs,
    )
    sampling, history = Sampling(**NEUTRAL | ours, logit_bias=BIAS), History(prompt, 320)
    kept = []
    for logits, scores, token in zip(made.logits, made.scores, made.sequences[0, len(prompt) :].tolist(), strict=True):
        ids, probabilities = sampling.distribution(sampling.adjust(logits[0].numpy(), history))
        assert ids.tolist() == torch.nonzero(torch.isfinite(scores[0]))[:, 0].tolist()
        np.testing.assert_allclose(probabilities, scores[0].softmax(-1).numpy()[ids], atol=SOFTMAX_TOLERANCE)
        history.add(token)
        kept.append(len(ids))
    return kept


@pytest.mark.parametrize("left_out", [None, *EVERYTHING])
def test_all_together_in_transformers_order(shared_checkpoint: Path, left_out: str | None) -> None:
    options = {name: value for name, value in EVERYTHING.items() if name != left_out}
    kept = compare_with_transformers(shared_checkpoint, options, options)
    assert len(kept) == 24 and len(set(kept)) > 1 and max(kept) > 5  # it was a comparison of something


@pytest.mark.parametrize(
    "turned",
    [
        {"temperature": 1.29},
        {"top_k": 9},
        {"top_p": 0.7},
        {"min_p": 0.6},
        {"typical_p": 0.5},
        {"repetition_penalty": 1.39},
        {"presence_penalty": 0.01},
        {"frequency_penalty": 0.01},
    ],
)
def test_the_comparison_with_transformers_can_fail(shared_checkpoint: Path, turned: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        compare_with_transformers(shared_checkpoint, EVERYTHING, EVERYTHING | turned)
