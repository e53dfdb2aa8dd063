"""Windows of a token stream: random ones to train on, fixed ones to measure on.

Dimensions: B windows, T positions.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.unsignedinteger]


def random_starts(length: int, batch_size: int, context: int, seed: int, micro_step: int) -> NDArray[np.int64]:
    """Returns where the windows of a micro-step begin, uniform over every place where a window and its targets fit.

    They follow from the seed and the number of the micro-step alone: going on with a run needs no generator's state.

    Args:
        length: Tokens of the stream, more than `context`.
        batch_size: B.
        context: T.
        seed: The run's seed.
        micro_step: Number of the micro-step, from 0.
    """
    return np.random.default_rng([seed, micro_step]).integers(0, length - context, batch_size)


def fixed_starts(length: int, windows: int, context: int) -> NDArray[np.int64]:
    """Returns where the windows of an evaluation begin: evenly spread, never overlapping, fewer where the stream is short."""
    windows = min(windows, (length - 1) // context)
    return np.linspace(0, length - 1 - context, windows).astype(np.int64)


def gather(ids: Ids, starts: NDArray[np.int64], context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the windows at `starts` and their targets, the same windows one token later; int64 (B, T) each."""
    rows = torch.from_numpy(np.stack([ids[start : start + context + 1] for start in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]
