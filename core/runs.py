"""Where artifacts lie when nobody says: `./runs/NAME`, and which one is meant when nothing is named."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.manifest import MANIFEST_FILE

RUNS = Path("runs")
_IMPORTED = Path("checkpoint", "imported")


def free_run(name: str) -> Path:
    """Returns `runs/NAME`, or `runs/NAME-2` and so on when that is taken."""
    number = 1
    while (path := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def imported_checkpoint(name: str, source: str) -> Path:
    """Returns where to put an imported model: where the same source was put before, or in a run of its own."""
    for path in sorted(RUNS.glob(f"*/{_IMPORTED}/{INFO_FILE}")):
        imported = read_json(path, INFO_FILE).get("imported")
        if isinstance(imported, dict) and imported.get("source") == source:
            return path.parent
    return free_run(name) / _IMPORTED


def newest_run() -> Path:
    """Returns the run that was trained last.

    Raises:
        SlmError: When there is none.
    """
    return _newest((path / "metrics.jsonl" for path in RUNS.glob("*")), "run", "slm train makes one").parent


def newest_checkpoint() -> Path:
    """Returns the best checkpoint of the run that was trained last, or the model that was imported last.

    Raises:
        SlmError: When there is none.
    """
    trained = (path for kind in ("last", "best") for path in RUNS.glob(f"*/checkpoint/{kind}/{INFO_FILE}"))
    of_each_run = {path.parent.parent: path for path in trained}  # the best takes the place of the last
    found = [*of_each_run.values(), *RUNS.glob(f"*/{_IMPORTED}/{INFO_FILE}")]
    hint = "slm train or slm import makes one, or name a checkpoint directory"
    return _newest(found, "checkpoint", hint).parent


def newest_bundle(*, quantized: bool | None = None) -> Path:
    """Returns the bundle that was made last.

    Args:
        quantized: Whether it must be quantized (True), or one to quantize, float32 and fused (False); None takes any.

    Raises:
        SlmError: When there is none.
    """

    def fits(manifest: dict[str, Any]) -> bool:
        if quantized:
            return str(manifest.get("precision")).startswith("int")
        return manifest.get("precision") == "float32" and manifest.get("target", "fused") == "fused"

    bundles = RUNS.glob(f"*/onnx*/{MANIFEST_FILE}")
    found = [path for path in bundles if quantized is None or fits(read_json(path, MANIFEST_FILE))]
    hint = "slm quantize --int8 makes one" if quantized else "slm export --onnx makes one from a checkpoint"
    return _newest(found, "bundle", hint).parent


def not_exported(bundle: Path) -> Path | None:
    """Returns the newest checkpoint if it is newer than a bundle, so that a command can say which of them it takes."""
    try:
        checkpoint = newest_checkpoint()
    except SlmError:
        return None
    times = [(path / file).stat().st_mtime_ns for path, file in ((checkpoint, INFO_FILE), (bundle, MANIFEST_FILE))]
    return checkpoint if times[0] > times[1] else None


def run_of(artifact: Path) -> Path:
    """Returns the run directory that an artifact lies in, for what is made from it to lie beside it."""
    for parent in artifact.resolve().parents:
        if parent.parent == RUNS.resolve():
            return RUNS / parent.name
    return artifact.parent


def _newest(markers: Iterable[Path], what: str, hint: str) -> Path:
    existing = [path for path in markers if path.is_file()]
    if not existing:
        raise SlmError(f"there is no {what} under ./{RUNS}", hint)
    return max(existing, key=lambda path: path.stat().st_mtime_ns)
