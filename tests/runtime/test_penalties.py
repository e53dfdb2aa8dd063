"""Bias and penalties on rows written by hand: each changes what its definition says and nothing else."""

import numpy as np
import pytest

from slm.runtime.penalties import History, add_bias, penalize_repetition, penalize_use
from slm.runtime.sampling import GREEDY, Sampler, Sampling

LOGITS = np.array([2.0, -1.0, 0.5, 0.0], np.float32)


def test_bias_is_added() -> None:
    np.testing.assert_array_equal(add_bias(LOGITS, {1: 4.0, 3: -np.inf}), [2, 3, 0.5, -np.inf])


@pytest.mark.parametrize(("penalty", "expected"), [(2.0, [1, -2, 0.5, 0]), (0.5, [4, -0.5, 0.5, 0]), (1.0, LOGITS)])
def test_repetition_makes_every_token_seen_less_likely_once(penalty: float, expected: list[float]) -> None:
    np.testing.assert_array_equal(penalize_repetition(LOGITS, np.array([0, 1, 3]), penalty), expected)


def test_presence_counts_once_and_frequency_every_time() -> None:
    uses = np.array([0, 1, 3, 0])
    np.testing.assert_array_equal(penalize_use(LOGITS, uses, 0.5, 0.0), [2, -1.5, 0, 0])
    np.testing.assert_array_equal(penalize_use(LOGITS, uses, 0.0, 0.5), [2, -1.5, -1, 0])
    np.testing.assert_array_equal(penalize_use(LOGITS, uses, -1.0, 0.5), [2, -0.5, 0, 0])


def test_the_prompt_is_seen_and_not_used() -> None:
    history = History([1, 1], 4)
    history.add(2)
    history.add(2)
    assert history.seen.tolist() == [False, True, True, False] and history.uses.tolist() == [0, 0, 2, 0]


def choices(times: int = 4, prompt: tuple[int, ...] = (), **options: object) -> list[int]:
    """Returns the most likely tokens when choosing repeatedly from the same logits."""
    sampler = Sampler(Sampling(temperature=0, **options), prompt, 4)  # type: ignore[arg-type]
    before = LOGITS.copy()
    chosen = [sampler.choose(LOGITS) for _ in range(times)]
    np.testing.assert_array_equal(LOGITS, before)
    return chosen


def test_each_changes_what_is_chosen_next() -> None:
    assert choices() == [0, 0, 0, 0]
    assert choices(logit_bias={3: 3.0}) == [3, 3, 3, 3]
    assert choices(repetition_penalty=5.0) == [0, 2, 0, 0]  # 2 -> 0.4 < 0.5 -> 0.1 < 0.4, and no further
    assert choices(repetition_penalty=5.0, prompt=(0,)) == [2, 0, 0, 0]
    assert choices(presence_penalty=1.75) == [0, 2, 0, 0]
    assert choices(presence_penalty=1.75, prompt=(0,)) == [0, 2, 0, 0]  # the prompt's do not count
    assert choices(frequency_penalty=0.8) == [0, 0, 2, 0]
    assert choices(frequency_penalty=0.8, times=7) == [0, 0, 2, 0, 3, 2, 0]


def test_nothing_is_copied_or_counted_when_nothing_asks_for_it() -> None:
    assert not GREEDY.adjusts and not Sampling(min_p=0.1, typical_p=0.9).adjusts
    assert all(
        Sampling(**{name: 0.5}).adjusts  # type: ignore[arg-type]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    assert Sampling(logit_bias={1: 1.0}).adjusts
