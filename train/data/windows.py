"""Training windows of a token stream; `slm.core.windows` has those of evaluations.

Dimensions: B windows, T positions.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm.train.data.tokens import TokenIds

# A stream in one array or in several files.
Ids = NDArray[np.unsignedinteger] | TokenIds


def random_starts(length: int, batch_size: int, context: int, seed: int, micro_step: int) -> NDArray[np.int64]:
    """Returns the starts of a micro-step's windows, uniform over all positions at which a window and its targets fit.

    They follow from the seed and the number of the micro-step alone: resuming a run needs no generator state.

    Args:
        length: Tokens of the stream, more than `context`.
        batch_size: B.
        context: T.
        seed: The run's seed.
        micro_step: Number of the micro-step, from 0.
    """
    return np.random.default_rng([seed, micro_step]).integers(0, length - context, batch_size)


def packed_starts(length: int, batch_size: int, context: int, seed: int, micro_step: int) -> NDArray[np.int64]:
    """Returns the starts of a micro-step's rows when every epoch reads the whole stream once.

    Each epoch cuts the stream into rows of `context` tokens, starting at a random offset, and reads them in a random order. A
    micro-step may end one epoch and begin the next. Everything follows from the seed and the number of the micro-step. The
    arguments are those of `random_starts`.
    """
    rows = max(1, (length - 1) // context - 1)  # one fewer than fit, so that the offset can be any number up to a row
    numbers = np.arange(micro_step * batch_size, (micro_step + 1) * batch_size)
    offsets = length - context * rows  # these offsets leave a target after the last row
    starts = np.empty(batch_size, np.int64)
    for epoch in range(numbers[0] // rows, numbers[-1] // rows + 1):
        mine = numbers // rows == epoch
        offset, order = _epoch(seed, int(epoch), rows, offsets)
        starts[mine] = offset + context * order[numbers[mine] % rows]
    return starts


@lru_cache(maxsize=2)  # a micro-step spans at most two epochs, and the next one needs the same two
def _epoch(seed: int, epoch: int, rows: int, offsets: int) -> tuple[int, NDArray[np.int64]]:
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(0, offsets)), random.permutation(rows)


def gather(ids: Ids, starts: NDArray[np.int64], context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the windows at `starts` and their targets, the same windows one token later; int64 (B, T) each."""
    rows = torch.from_numpy(np.stack([ids[start : start + context + 1] for start in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


SAMPLERS = {"random": random_starts, "packed": packed_starts}
