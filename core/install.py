"""The pip command that installs slm or one of its extras: from the clone that slm runs from, or from the package index."""

from pathlib import Path


def install_hint(extra: str = "") -> str:
    """Returns the pip command that installs an extra of slm.

    Args:
        extra: The extra's name; empty for the base installation.
    """
    wanted = f"[{extra}]" if extra else ""
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():  # slm is installed in editable mode: this file is in the clone
        return f"pip install '{root}{wanted}' (slm-edge{wanted} from this clone)"
    return f"pip install '.{wanted}' in a clone of slm's repository, or 'slm-edge{wanted}' from a package index"
