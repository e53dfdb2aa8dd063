"""Sample text that ships with the package: small stories and instruction pairs, so that a first run needs no network.

All of it was written for this project by a seeded generator: `python -m slm.train.stories.generate` rewrites the three files
byte for byte.
"""

from pathlib import Path

__all__ = ["SEPARATOR", "pairs_path", "stories_path", "validation_path"]

SEPARATOR = "<|endoftext|>"  # on a line of its own after every story

_HERE = Path(__file__).resolve().parent


def stories_path() -> Path:
    """Path of the training stories: plain ASCII text, each story followed by a separator line."""
    return _HERE / "stories.txt"


def validation_path() -> Path:
    """Path of the held-out stories: same format, no (plot, hero, object, place) in common with the training stories."""
    return _HERE / "validation.txt"


def pairs_path() -> Path:
    """Path of the fine-tuning rows: JSON lines, each an object with `instruction` and `output`."""
    return _HERE / "pairs.jsonl"
