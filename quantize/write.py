"""Writing of a quantized bundle. The graph is built again with a quantized weight format, not rewritten."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.core.contract import input_specs, output_specs, slot_specs
from slm.core.licence import modified, write_notice
from slm.core.manifest import MANIFEST_FILE, MODEL_NAMES, Bundle, Precision, seal
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
from slm.quantize.plan import QuantizationPlan
from slm.quantize.results import PAGE_FILE, REPORT_FILE
from slm.version import __version__


def write_bundle(source: Bundle, plan: QuantizationPlan, tensors: Mapping[str, Array], directory: Path) -> Bundle:
    """Writes everything except the report into an empty directory, and returns the sealed bundle.

    Args:
        source: The float bundle.
        plan: The plan.
        tensors: The tensors of the quantized graph, by name; read one at a time.
        directory: The empty directory.
    """
    bundle = write_graph(source, plan, tensors, directory)
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


def write_graph(source: Bundle, plan: QuantizationPlan, tensors: Mapping[str, Array], directory: Path) -> Bundle:
    """Writes the graph and its weights into an empty directory, and returns a bundle that can run but is not sealed.

    Args:
        source: The float bundle.
        plan: The plan.
        tensors: The tensors of the quantized graph, by name; read one at a time.
        directory: The empty directory.
    """
    quantization = plan.record()
    precision: Precision = "int4" if quantization.bits == 4 else "int8"
    target: Operators[Any]
    if source.manifest.target == "portable":  # as written, the portable graph computes in floats
        quantization = quantization.model_copy(update={"accuracy_level": 0})
        tensors = portable_tensors(tensors, quantization.schemes)
        target = Portable(DequantizedFormat(quantization.schemes))
    else:
        weights: WeightFormat = BlockFormat(quantization.schemes, quantization.accuracy_level)
        if source.manifest.adapter_slots:
            weights = SlotFormat(weights, plan.smoothing.columns, plan.smoothing.rows)
        target = Fused(weights, plan.device, plan.cache)
    model = directory / "onnx" / f"{MODEL_NAMES[precision]}.onnx"
    model.parent.mkdir()
    save_graph(build_graph(source.config, target, tensors, source.manifest.context), model)
    caches = target.caches(source.config)
    manifest = source.manifest.model_copy(
        update={
            "model": model.relative_to(directory).as_posix(),
            "precision": precision,
            "device": plan.device,
            "inputs": input_specs(caches, slot_specs(source.config) if source.manifest.adapter_slots else ()),
            "outputs": output_specs(source.config.vocab_size, caches),
            "cache": caches,
            "quantization": quantization,
        }
    )
    return Bundle(directory, manifest, source.config)


def graph_bytes(bundle: Bundle) -> int:
    """Returns the size of the files of graph and weights in bytes."""
    return sum(file.stat().st_size for file in bundle.model_path.parent.iterdir())
