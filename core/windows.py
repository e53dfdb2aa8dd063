"""Windows of a stream of tokens that a model is measured on: the same ones while it trains and afterwards."""

import numpy as np
from numpy.typing import NDArray


def fixed_starts(length: int, windows: int, context: int) -> NDArray[np.int64]:
    """Returns where the windows begin: evenly spread, never overlapping, fewer where the stream is short.

    Args:
        length: Tokens of the stream.
        windows: How many to have at most.
        context: Tokens of a window, which takes one more for its last target.
    """
    windows = max(0, min(windows, (length - 1) // context))
    return np.linspace(0, length - 1 - context, windows).astype(np.int64)
