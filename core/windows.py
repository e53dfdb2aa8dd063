"""The evaluation windows of a token stream: training and `slm eval` use the same ones."""

import numpy as np
from numpy.typing import NDArray


def fixed_starts(length: int, windows: int, context: int) -> NDArray[np.int64]:
    """Returns the first position of each window, int64; windows are evenly spaced and do not overlap.

    Args:
        length: Length of the stream, in tokens.
        windows: The largest number of windows; a short stream has fewer.
        context: Length of a window, in tokens; each window needs one token more, its last target.
    """
    windows = max(0, min(windows, (length - 1) // context))
    return np.linspace(0, length - 1 - context, windows).astype(np.int64)
