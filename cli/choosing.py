"""Chooses the default input of a command, and prints one line about the choice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slm.cli.console import say
from slm.core import artifacts
from slm.core.artifacts import Choice
from slm.core.runs import imported_checkpoint

if TYPE_CHECKING:
    from slm.finetune.recipe import FinetuneRecipe


def default_model(*, bundle: bool = False) -> Path:
    """Returns the newest finished model under ./runs, or the bundled demo model; prints which.

    Args:
        bundle: Whether the model must be a bundle.

    Raises:
        SlmError: If there are only unfinished runs, or a bundle is needed and the newest model has none.
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
    """Returns the newest finished checkpoint under ./runs; prints which.

    Raises:
        SlmError: If there is none.
    """
    return _said(artifacts.newest_checkpoint())


def default_base() -> Path:
    """Returns the newest finished checkpoint under ./runs, or a checkpoint made from the bundled demo model; prints which.

    Raises:
        SlmError: If there are only unfinished runs.
    """
    if artifacts.is_anything_trained():
        return default_checkpoint()
    from slm.export.recovered import BundleModel
    from slm.interchange.importing import import_model
    from slm.runtime import shipped

    source = BundleModel(shipped.model_path())
    place = imported_checkpoint("stories", str(source.path))
    say(f"Using the bundled demo model (no checkpoint in ./runs): its rounded weights become {place}.")
    return import_model(source, place).path


def named_base(recipe: "FinetuneRecipe") -> Path | None:
    """Returns the base that a recipe names, a path or a name under ./runs; None if it names none.

    Raises:
        SlmError: If there is no such checkpoint.
    """
    from slm.cli.options import Artifact

    return None if recipe.base is None else Artifact(bundles=False).convert(recipe.base, None, None)


@contextmanager
def foreseen_base(recipe: "FinetuneRecipe", base: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yields the base that fine-tuning would use, and where it would lie: a checkpoint of the demo model is only temporary.

    Args:
        recipe: The recipe.
        base: The base on the command line.
    """
    base = base or named_base(recipe)
    if base is None and artifacts.is_anything_trained():
        base = default_checkpoint()
    if base is not None:
        yield base, base
        return
    from slm.export.recovered import BundleModel
    from slm.interchange.importing import import_model
    from slm.runtime import shipped

    source = BundleModel(shipped.model_path())
    say("Using the bundled demo model (no checkpoint in ./runs).")
    with TemporaryDirectory(prefix="slm-") as directory:
        found = import_model(source, Path(directory, "checkpoint")).path
        yield found, imported_checkpoint("stories", str(source.path))


def default_bundle(*, to_quantize: bool = False) -> Path:
    """Returns the newest bundle under ./runs, or the newest one that can be quantized; prints which.

    Raises:
        SlmError: If there is none, or the newest model has none.
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
