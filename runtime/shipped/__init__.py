"""The bundled demo model: `stories-4m` trained on TinyStories, INT8; see MODEL_CARD.md."""

from pathlib import Path


def model_path() -> Path:
    """Returns the bundle's directory.

    The path is resolved: an editable installation links each file, and a bundle's files must not lead out of its directory.
    """
    return Path(__file__).resolve().parent / "model"
