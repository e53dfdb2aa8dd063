"""Matplotlib, without the settings that lie in the directory where a command is run."""

import contextlib
import os
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure of a size in inches, outside of pyplot: no global state, no window system.

    When matplotlib is first imported it reads `matplotlibrc` in the working directory before the user's own. That file may be a
    stranger's, so it is left out.
    """
    elsewhere = contextlib.chdir(os.sep) if Path("matplotlibrc").exists() else contextlib.nullcontext()
    with elsewhere:
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
