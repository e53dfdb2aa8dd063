"""The small model that ships with slm: `stories-4m` trained on TinyStories, INT8; see MODEL_CARD.md."""

from pathlib import Path


def model_path() -> Path:
    """Returns the bundle's directory.

    The real one: an editable installation links file by file, and a bundle's files must not lead out of it.
    """
    return Path(__file__).resolve().parent / "model"
