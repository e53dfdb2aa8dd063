"""Writing a quantized bundle: the graph built anew with another weight format, and what lies beside it.

Nothing is searched for in the finished graph.
"""

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
    Portable,
    SlotFormat,
    Target,
    WeightFormat,
    build_graph,
    portable_tensors,
    save_graph,
)
from slm.export.graph.builder import Array
from slm.quantize.report import PAGE_FILE, REPORT_FILE
from slm.quantize.smoothing import Smoothing
from slm.version import __version__

# Activations are rounded to INT8 block by block inside the kernel: 18 times faster to decode on a CPU than floats.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Contents:
    """What a quantized bundle is made from.

    Attributes:
        tensors: The graph's, by name; evaluated one at a time.
        quantization: How they are stored.
        cache: How keys and values are cached.
        smoothing: What was done to the tensors, which slots do to adapters.
        device: Where the bundle is to run.
    """

    tensors: Mapping[str, Array]
    quantization: Quantization
    cache: CacheType
    smoothing: Smoothing
    device: Device = "cpu"


def write_bundle(source: Bundle, contents: Contents, directory: Path) -> Bundle:
    """Writes everything but the report into an empty directory; returns the sealed bundle.

    Args:
        source: The float bundle.
        contents: What it is made from.
        directory: Where to.
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
    """Yields a bundle that can be run, in a directory that is removed afterwards.

    Args:
        source: The float bundle.
        contents: What it is made from.
        scratch: Where the directory is made.
    """
    with scratch_directory(scratch, "trial") as directory:
        yield _write_graph(source, contents, directory)


def _write_graph(source: Bundle, contents: Contents, directory: Path) -> Bundle:
    tensors, quantization = contents.tensors, contents.quantization
    precision: Precision = "int4" if quantization.bits == 4 else "int8"
    target: Target[Any]
    if source.manifest.target == "portable":  # which computes in floats; what a runtime makes of that is its own matter
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
