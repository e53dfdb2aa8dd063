"""Chooses the default input of a step, and reports the choice in one line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slm.core import artifacts
from slm.core.artifacts import Choice, Kind
from slm.core.checkpoint import is_checkpoint, read_info
from slm.core.names import resolve
from slm.core.runs import imported_checkpoint, run_of
from slm.steps.arguments import PathArgument

Note = Callable[[str], None]


def named(name: PathArgument, kinds: Sequence[Kind], note: Note) -> Path:
    """Returns the artifact of a path or a name; see `slm.core.names.resolve`.

    Raises:
        SlmError: If there is no such artifact, or it is of another kind.
    """
    path, sentences = resolve(fspath(name), kinds)
    for sentence in sentences:
        note(sentence)
    return path


def default_model(note: Note, *, bundle: bool = False) -> Path:
    """Returns the newest finished model under ./runs, or the bundled demo model.

    Args:
        note: Receives the choice.
        bundle: Whether the model must be a bundle.

    Raises:
        SlmError: If there are only unfinished runs, or a bundle is needed and the newest model has none.
    """
    choice = artifacts.newest_model()
    if choice is None:
        from slm.runtime import shipped

        note("Using the bundled demo model (no model in ./runs).")
        return shipped.model_path()
    if bundle and choice.artifact.kind != "bundle":
        choice = artifacts.newest_bundle()
    return _noted(choice, note)


def default_checkpoint(note: Note) -> Path:
    """Returns the newest finished checkpoint under ./runs.

    Raises:
        SlmError: If there is none.
    """
    return _noted(artifacts.newest_checkpoint(), note)


def default_base(note: Note) -> Path:
    """Returns the newest finished checkpoint under ./runs, or a checkpoint made from the bundled demo model.

    Raises:
        SlmError: If there are only unfinished runs.
    """
    if artifacts.is_anything_trained():
        return default_checkpoint(note)
    from slm.export.recovered import BundleModel
    from slm.interchange.importing import import_model
    from slm.runtime import shipped

    source = BundleModel(shipped.model_path())
    place = imported_checkpoint("stories", str(source.path))
    note(f"Using the bundled demo model (no checkpoint in ./runs): its rounded weights become {place}.")
    return import_model(source, place).path


@contextmanager
def foreseen_base(base: Path | None, note: Note) -> Iterator[tuple[Path, Path]]:
    """Yields the base that fine-tuning would use, and where it would lie: a checkpoint of the demo model is only temporary.

    Args:
        base: The base that is named, if one is.
        note: Receives the choice.
    """
    if base is None and artifacts.is_anything_trained():
        base = default_checkpoint(note)
    if base is not None:
        yield base, base
        return
    from slm.export.recovered import BundleModel
    from slm.interchange.importing import import_model
    from slm.runtime import shipped

    source = BundleModel(shipped.model_path())
    note("Using the bundled demo model (no checkpoint in ./runs).")
    with TemporaryDirectory(prefix="slm-") as directory:
        found = import_model(source, Path(directory, "checkpoint")).path
        yield found, imported_checkpoint("stories", str(source.path))


def default_bundle(note: Note, *, to_quantize: bool = False) -> Path:
    """Returns the newest bundle under ./runs, or the newest one that can be quantized.

    Raises:
        SlmError: If there is none, or the newest model has none.
    """
    return _noted(artifacts.newest_bundle(_can_be_quantized if to_quantize else None), note)


def base_of(adapter: Path | None, note: Note) -> Path:
    """Returns the checkpoint that an adapter was trained on, or the newest one if it does not exist.

    An adapter records the path of its base. If the run was moved, the base is searched in the run.
    """
    recorded = {} if adapter is None else read_info(adapter).get("base", {})
    base = Path(str(recorded.get("path", "")))
    places = [base, *([] if adapter is None else [run_of(adapter) / "checkpoint" / base.name])]
    for place in places if recorded else []:
        if is_checkpoint(place):
            place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
            note(f"Using {place} (the checkpoint that the adapter was trained on).")
            return place
    return default_checkpoint(note)


def _can_be_quantized(manifest: Mapping[str, Any]) -> bool:
    return manifest.get("precision") == "float32" and manifest.get("target", "fused") == "fused"


def _noted(choice: Choice, note: Note) -> Path:
    for sentence in choice.notes:
        note(sentence)
    how = " with PyTorch" if choice.artifact.kind == "checkpoint" and choice.why.endswith("yet") else ""
    note(f"Using {choice.artifact.path}{how} ({choice.why}).")
    return choice.artifact.path
