"""The small model that ships with slm: `tiny` trained on the shipped stories, INT8; `make shipped-model` makes it anew."""

from pathlib import Path


def model_path() -> Path:
    """Returns the bundle's directory."""
    return Path(__file__).parent / "model"
