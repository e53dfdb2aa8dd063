"""Matplotlib figures that ignore `matplotlibrc` in the working directory."""

import contextlib
import os
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure; it does not use pyplot, so no global state and no window system.

    On its first import, matplotlib reads `matplotlibrc` in the working directory before the user's own file. The working
    directory is not trusted, so the import runs in the root directory.

    Args:
        width: In inches.
        height: In inches.
    """
    elsewhere = contextlib.chdir(os.sep) if Path("matplotlibrc").exists() else contextlib.nullcontext()
    with elsewhere:
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
