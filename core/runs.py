"""Default paths of artifacts: `./runs/NAME`, and the cache of bundles that slm made from other sources."""

import os
from pathlib import Path

from slm.core.checkpoint import INFO_FILE
from slm.core.errors import SlmError
from slm.core.files import read_json

RUNS = Path("runs")
_IMPORTED = Path("checkpoint", "imported")
_TRIMMED = Path("checkpoint", "trimmed")


def cached_bundles() -> Path:
    """Returns the directory of the bundles that `slm run` made, in the cache."""
    return _cache() / "bundles"


def cached_data() -> Path:
    """Returns the directory of text and datasets that were fetched, in the cache."""
    return _cache() / "data"


def _cache() -> Path:
    """Returns $SLM_CACHE, $XDG_CACHE_HOME/slm or ~/.cache/slm."""
    named = os.environ.get("SLM_CACHE")
    if named:
        return Path(named)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "slm"


def free_run(name: str) -> Path:
    """Returns `runs/NAME`, or the first free one of `runs/NAME-2`, `runs/NAME-3`, … if it exists."""
    number = 1
    while (path := RUNS / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def imported_checkpoint(name: str, source: str) -> Path:
    """Returns the path for an imported model: that of an earlier import of the same source, or one in a new run."""
    for path in sorted(RUNS.glob(f"*/{_IMPORTED}/{INFO_FILE}")):
        imported = read_json(path, INFO_FILE).get("imported")
        if isinstance(imported, dict) and imported.get("source") == source:
            return path.parent
    return free_run(name) / _IMPORTED


def trimmed_checkpoint(source: Path) -> Path:
    """Returns the path for a trimmed checkpoint: that of an earlier one of the same source, or one in a new run."""
    for path in sorted(RUNS.glob(f"*/{_TRIMMED}/{INFO_FILE}")):
        trimmed = read_json(path, INFO_FILE).get("trimmed")
        if isinstance(trimmed, dict) and trimmed.get("path") == str(source):
            return path.parent
    run = run_of(source)
    name = run.name if run.parent == RUNS else source.resolve().name
    return free_run(f"{name}-trimmed") / _TRIMMED


def newest_run() -> Path:
    """Returns the run that was trained most recently.

    Raises:
        SlmError: If there is no run.
    """
    logs = [path for run in RUNS.glob("*") if (path := run / "metrics.jsonl").is_file()]
    if not logs:
        raise SlmError(f"there is no run under ./{RUNS}", "start one with slm train")
    return max(logs, key=lambda path: path.stat().st_mtime_ns).parent


def bundle_path(
    checkpoint: Path,
    target: str = "fused",
    device: str = "cpu",
    slots: bool = False,
    adapter: Path | None = None,
) -> Path:
    """Returns where `slm export --onnx` writes a bundle when no place is named.

    Args:
        checkpoint: What is exported.
        target: Operators of the graph, "fused" or "portable".
        device: Where the bundle is to run.
        slots: Whether the graph takes LoRA adapters when it runs.
        adapter: An adapter that is merged first.
    """
    kinds = [target] * (target != "fused") + [device] * (device != "cpu") + ["slots"] * slots
    return run_of(checkpoint) / "-".join(["onnx", *kinds, *([] if adapter is None else [adapter.resolve().name])])


def run_of(artifact: Path) -> Path:
    """Returns the run directory that contains an artifact, or else its parent; derived artifacts are written there."""
    for parent in artifact.resolve().parents:
        if parent.parent == RUNS.resolve():
            return RUNS / parent.name
    return artifact.parent
