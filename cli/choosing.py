"""What a command uses when nothing is named, and one line that says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.cli.console import say
from slm.core import artifacts
from slm.core.artifacts import Choice


def default_model(*, bundle: bool = False) -> Path:
    """Returns the newest finished model under ./runs, the small one that ships where there is none, and says which.

    Args:
        bundle: Whether it must be a bundle.

    Raises:
        SlmError: When there is nothing but unfinished runs, or a bundle is needed and the newest model has none.
    """
    choice = artifacts.newest_model()
    if choice is None:
        from slm.runtime import shipped

        say("Using the bundled demo model (no model in ./runs).")
        return shipped.model_path()
    if bundle and choice.artifact.kind != "bundle":
        choice = artifacts.newest_bundle()
    return _said(choice)


def default_checkpoint() -> Path:
    """Returns the newest finished checkpoint under ./runs, and says which.

    Raises:
        SlmError: When there is none.
    """
    return _said(artifacts.newest_checkpoint())


def default_bundle(*, to_quantize: bool = False) -> Path:
    """Returns the newest bundle under ./runs, or the newest one that can be quantized, and says which.

    Raises:
        SlmError: When there is none, or the newest model has none.
    """
    return _said(artifacts.newest_bundle(_can_be_quantized if to_quantize else None))


def _can_be_quantized(manifest: Mapping[str, Any]) -> bool:
    return manifest.get("precision") == "float32" and manifest.get("target", "fused") == "fused"


def _said(choice: Choice) -> Path:
    for note in choice.notes:
        say(note)
    how = " with PyTorch" if choice.artifact.kind == "checkpoint" and choice.why.endswith("yet") else ""
    say(f"Using {choice.artifact.path}{how} ({choice.why}).")
    return choice.artifact.path
