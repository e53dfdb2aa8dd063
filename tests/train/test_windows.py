"""Windows: the same from the same numbers, everywhere in the stream and never past its end."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm.train.data.windows import SAMPLERS, gather, packed_starts, random_starts


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


def rows_of_an_epoch(length: int, context: int) -> int:
    """One row fewer than fit, so that the cut may begin anywhere within a row; one at least."""
    return max(1, (length - 1) // context - 1)


def epochs(length: int, context: int, count: int, seed: int = 0) -> list[list[int]]:
    """Where the rows of the first epochs begin, drawn one by one."""
    rows = rows_of_an_epoch(length, context)
    starts = [int(packed_starts(length, 1, context, seed, step)[0]) for step in range(rows * count)]
    return [starts[rows * epoch : rows * (epoch + 1)] for epoch in range(count)]


@given(length=st.integers(3, 600), context=st.integers(2, 40), seed=st.integers(0, 5))
def test_packed_rows_cover_the_stream_once_an_epoch(length: int, context: int, seed: int) -> None:
    if length <= context:
        return
    for starts in epochs(length, context, 3, seed):
        cut = sorted(starts)
        # side by side from some offset, every one once, with a target after the last token of the last one
        assert cut == list(range(cut[0], cut[0] + context * len(cut), context))
        assert cut[0] >= 0
        assert cut[-1] + context + 1 <= length
        missed = length - 1 - context * len(cut)
        assert missed < 2 * context


def test_packed_epochs_differ_in_cut_and_order() -> None:
    context = 16
    several = epochs(16 * 50, context, 8)
    assert len({min(starts) for starts in several}) > 3  # of 16 offsets; three or fewer in 8 draws has odds below 1e-3
    orders = {tuple(np.argsort(starts)) for starts in several}
    assert len(orders) == len(several)
    assert tuple(range(48)) not in orders
    assert several == epochs(16 * 50, context, 8)
    assert several != epochs(16 * 50, context, 8, seed=1)


def test_packed_rows_begin_everywhere_sooner_or_later() -> None:
    seen = {start for starts in epochs(100, 10, 600) for start in starts}
    # 8 rows of 10, cut from one of 20 places on. The last start needs the last of them: missing in 600 draws it has odds
    # below 1e-12.
    assert seen == set(range(90))


@pytest.mark.parametrize("length", [17, 18, 32, 33, 34, 48, 49, 50])
def test_packed_rows_of_a_short_stream(length: int) -> None:
    starts = np.concatenate([packed_starts(length, 4, 16, 0, step) for step in range(40)])
    assert starts.min() >= 0
    assert starts.max() + 17 <= length


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_packed_micro_step_may_end_one_epoch_and_begin_the_next(batch_size: int) -> None:
    length, context = 210, 16  # 12 rows an epoch: one micro-step of 100 goes through eight of them
    alone = [start for starts in epochs(length, context, 30) for start in starts]
    together = np.concatenate([packed_starts(length, batch_size, context, 0, step) for step in range(3)])
    assert together.tolist() == alone[: 3 * batch_size]


def test_a_packed_micro_step_alone_is_the_one_in_its_place() -> None:
    length, context, batch_size = 500, 16, 4
    in_order = [packed_starts(length, batch_size, context, 3, step).tolist() for step in range(60)]
    for step in (59, 0, 31, 7):  # what the last ones left in memory is of other epochs
        assert packed_starts(length, batch_size, context, 3, step).tolist() == in_order[step]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("batch_size", [4, 12])
def test_halves_of_a_micro_step_are_the_whole_of_it(name: str, batch_size: int) -> None:
    """Of several processes each takes its share of the same rows: their number changes nothing."""
    starts: Callable = SAMPLERS[name]
    whole = [starts(400, batch_size, 16, 0, step) for step in range(20)]
    for size in (1, 2, 4):
        mine = batch_size // size
        shares = [[rows[rank * mine : (rank + 1) * mine] for rank in range(size)] for rows in whole]
        assert all((np.concatenate(parts) == rows).all() for parts, rows in zip(shares, whole, strict=True))


def test_accumulation_and_batch_size_leave_the_packed_order_alone() -> None:
    def order(batch_size: int) -> list[int]:
        return [start for step in range(48 // batch_size) for start in packed_starts(400, batch_size, 16, 0, step)]

    assert order(1) == order(4) == order(12) == order(48)


def test_the_samplers_differ() -> None:
    length, context = 16 * 100, 16
    packed, drawn = (
        np.concatenate([SAMPLERS[name](length, 49, context, 0, step) for step in range(2)])
        for name in ("packed", "random")
    )
    assert len(set(packed.tolist())) == 98  # an epoch
    assert len(set((packed % context).tolist())) == 1
    # 98 windows of 16 from 1,584 places overlap: that they would not has odds below 1e-90.
    assert (np.diff(np.sort(drawn)) < context).any()


def test_gather() -> None:
    ids = np.arange(50, dtype=np.uint16)
    inputs, targets = gather(ids, np.array([0, 33]), 16, torch.device("cpu"))
    assert inputs.dtype == torch.int64
    assert inputs.shape == (2, 16)
    assert (targets == inputs + 1).all()
    assert targets[1, -1] == 49  # the last token is a target
