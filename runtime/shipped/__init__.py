"""The small model that ships with slm: `tiny` trained on the shipped stories, INT8; `make shipped-model` makes it anew."""

from pathlib import Path


def model_path() -> Path:
    """Returns the bundle's directory.

    The real one: an editable installation links file by file, and a bundle's files must not lead out of it.
    """
    return Path(__file__).resolve().parent / "model"
