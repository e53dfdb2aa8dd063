"""Windows that are measured on: evenly spread, within the stream, and none where it is too short."""

import numpy as np
import pytest

from slm.core.windows import fixed_starts


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


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_stream_without_a_window(length: int) -> None:
    assert fixed_starts(length, 64, 100).tolist() == []
