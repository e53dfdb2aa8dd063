"""Writing of a quantized bundle. The graph is built again with a quantized weight format, not rewritten."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.core.contract import CacheType, Device, input_specs, output_specs, slot_specs
from slm.core.files import scratch_directory
from slm.core.licence import modified, write_notice
from slm.core.manifest import MANIFEST_FILE, MODEL_NAMES, Bundle, Precision, Quantization, seal
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.export.clients import write_client_files
from slm.export.graph import (
    BlockFormat,
    DequantizedFormat,
    Fused,
    Operators,
    Portable,
    SlotFormat,
    WeightFormat,
    build_graph,
    portable_tensors,
    save_graph,
)
from slm.export.graph.builder import Array
from slm.quantize.report import PAGE_FILE, REPORT_FILE
from slm.quantize.smoothing import Smoothing
from slm.version import __version__

# The kernel rounds activations to INT8 block by block. On a CPU, this decodes 18 times faster than float activations.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Contents:
    """The contents of a quantized bundle.

    Attributes:
        tensors: The graph's tensors, by name; evaluated one at a time.
        quantization: The manifest's record of the quantization.
        cache: The type of cached keys and values.
        smoothing: The smoothing factors of the tensors. Adapter slots apply them to adapters.
        device: The device that will run the bundle.
    """

    tensors: Mapping[str, Array]
    quantization: Quantization
    cache: CacheType
    smoothing: Smoothing
    device: Device = "cpu"


def write_bundle(source: Bundle, contents: Contents, directory: Path) -> Bundle:
    """Writes everything except the report into an empty directory, and returns the sealed bundle.

    Args:
        source: The float bundle.
        contents: The contents of the new bundle.
        directory: The empty directory.
    """
    bundle = _write_graph(source, contents, directory)
    for name in source.manifest.files:
        if "/" not in name and name not in (MANIFEST_FILE, REPORT_FILE, PAGE_FILE, TOKENIZER_FILE):
            shutil.copy(source.path / name, directory / name)
    Tokenizer.load(source.path).copy(source.path, directory)
    parity = source.manifest.parity
    notices = modified(source.manifest.notices, f"quantized to {bundle.manifest.precision.upper()}")
    write_notice(directory, notices)
    manifest = bundle.manifest.model_copy(
        update={
            "slm_version": __version__,
            "parity": None,
            "gpu_parity": {},
            "notices": notices,
            "provenance": source.manifest.provenance
            | {"bundle": str(source.path), "parity": None if parity is None else parity.model_dump()},
        }
    )
    write_client_files(directory, source.config, manifest)
    return seal(directory, manifest)


@contextmanager
def tried(source: Bundle, contents: Contents, scratch: Path) -> Iterator[Bundle]:
    """Yields a runnable bundle in a temporary directory.

    Args:
        source: The float bundle.
        contents: The contents of the temporary bundle.
        scratch: The parent of the temporary directory.
    """
    with scratch_directory(scratch, "trial") as directory:
        yield _write_graph(source, contents, directory)


def _write_graph(source: Bundle, contents: Contents, directory: Path) -> Bundle:
    tensors, quantization = contents.tensors, contents.quantization
    precision: Precision = "int4" if quantization.bits == 4 else "int8"
    target: Operators[Any]
    if source.manifest.target == "portable":  # as written, the portable graph computes in floats
        quantization = quantization.model_copy(update={"accuracy_level": 0})
        tensors = portable_tensors(tensors, quantization.schemes)
        target = Portable(DequantizedFormat(quantization.schemes))
    else:
        weights: WeightFormat = BlockFormat(quantization.schemes, quantization.accuracy_level)
        if source.manifest.adapter_slots:
            weights = SlotFormat(weights, contents.smoothing.columns, contents.smoothing.rows)
        target = Fused(weights, contents.device, contents.cache)
    model = directory / "onnx" / f"{MODEL_NAMES[precision]}.onnx"
    model.parent.mkdir()
    save_graph(build_graph(source.config, target, tensors, source.manifest.context), model)
    caches = target.caches(source.config)
    manifest = source.manifest.model_copy(
        update={
            "model": model.relative_to(directory).as_posix(),
            "precision": precision,
            "device": contents.device,
            "inputs": input_specs(caches, slot_specs(source.config) if source.manifest.adapter_slots else ()),
            "outputs": output_specs(source.config.vocab_size, caches),
            "cache": caches,
            "quantization": quantization,
        }
    )
    return Bundle(directory, manifest, source.config)
