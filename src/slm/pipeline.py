"""From a model of any source to a quantized bundle in one call, kept in a cache: import, export, quantize."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal

from slm.core.checkpoint import is_checkpoint, read_info
from slm.core.errors import SlmError
from slm.core.files import scratch_directory
from slm.core.manifest import MANIFEST_FILE, is_bundle
from slm.core.progress import Progress, Silent
from slm.core.runs import cached_bundles
from slm.core.weights import INDEX_FILE, WEIGHTS_FILE

Precision = Literal["int8", "int4", "float32"]
# Files of a directory whose size and time of change identify the model; hashing its weights would take seconds.
_IDENTIFYING = (WEIGHTS_FILE, INDEX_FILE, "config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST_FILE)


def ready_bundle(source: str, precision: Precision = "int8", progress: Progress | None = None) -> Path:
    """Returns a verified bundle of a model, which an earlier call may have made.

    The bundle is in the cache (`slm.core.runs.cached_bundles`). A changed file, directory or precision is another entry.

    Args:
        source: A checkpoint, a Hugging Face directory, a GGUF file, or the id of a model on the hub.
        precision: The bundle's precision.
        progress: Receives the progress of each step.

    Raises:
        SlmError: When the source is not available or damaged, or a step fails its verification. Nothing is kept then.
    """
    progress = progress or Silent()
    place = _place(source, precision)
    if is_bundle(place):
        return place
    from slm.export.bundle import export_bundle
    from slm.interchange.importing import import_model
    from slm.quantize.make import quantize_bundle
    from slm.quantize.settings import Settings
    from slm.quantize.texts import measuring_text

    place.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(place.parent, "preparing") as scratch:
        checkpoint = Path(source)
        if not (is_checkpoint(checkpoint) and read_info(checkpoint)):
            checkpoint = import_model(source, scratch / "checkpoint", progress=progress).path
        out = place if precision == "float32" else scratch / "onnx"
        bundle = export_bundle(checkpoint, out, progress=progress, origin={"checkpoint": source})
        if precision != "float32":
            shutil.rmtree(scratch / "checkpoint", ignore_errors=True)  # room for the quantized model
            text = measuring_text(bundle, None)
            quantize_bundle(bundle, place, text, Settings(precision), progress)
    return place


def _place(source: str, precision: str) -> Path:
    """Returns the directory of a source's bundle in the cache."""
    from slm.interchange.importing import source_name

    digest = hashlib.sha256(json.dumps(_identity(source)).encode()).hexdigest()[:8]
    return cached_bundles() / f"{source_name(source)}-{precision}-{digest}"


def _identity(source: str) -> list[object]:
    """Returns values that change when the source's files do: for the hub, its id alone."""
    from slm.interchange.hub import SOURCES, is_hub_id

    path = Path(source)
    if is_hub_id(source):
        return ["hub", source]
    if not path.exists():
        raise SlmError(f"not found: {source}", f"name {SOURCES}")
    files = [path] if path.is_file() else [file for name in _IDENTIFYING if (file := path / name).is_file()]
    states = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    return ["path", str(path.resolve()), states]
