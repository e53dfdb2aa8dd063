"""Windows: the same from the same numbers, everywhere in the stream and never past its end."""

import numpy as np
import pytest
import torch

from slm.train.data.windows import fixed_starts, gather, random_starts


def test_random_windows_follow_from_seed_and_micro_step() -> None:
    first = random_starts(1_000, 8, 16, seed=1, micro_step=5)
    assert (first == random_starts(1_000, 8, 16, seed=1, micro_step=5)).all()
    assert (first != random_starts(1_000, 8, 16, seed=1, micro_step=6)).any()
    assert (first != random_starts(1_000, 8, 16, seed=2, micro_step=5)).any()


@pytest.mark.parametrize("length", [17, 18, 40])
def test_random_windows_reach_both_ends_and_no_further(length: int) -> None:
    context = 16
    starts = np.concatenate([random_starts(length, 64, context, 0, step) for step in range(20)])
    # Of 1,280 draws from at most 24 places, one missing a given end has odds below 1e-20.
    assert starts.min() == 0
    assert starts.max() == length - context - 1


def test_fixed_windows() -> None:
    starts = fixed_starts(10_000, 7, 100)
    assert len(starts) == 7
    assert starts[0] == 0
    assert starts[-1] == 10_000 - 101
    assert (np.diff(starts) >= 100).all()


def test_fixed_windows_of_a_short_stream_do_not_overlap() -> None:
    starts = fixed_starts(350, 64, 100)
    assert len(starts) == 3
    assert (np.diff(starts) >= 100).all()
    assert fixed_starts(101, 64, 100).tolist() == [0]


def test_gather() -> None:
    ids = np.arange(50, dtype=np.uint16)
    inputs, targets = gather(ids, np.array([0, 33]), 16, torch.device("cpu"))
    assert inputs.dtype == torch.int64
    assert inputs.shape == (2, 16)
    assert (targets == inputs + 1).all()
    assert targets[1, -1] == 49  # the last token is a target
