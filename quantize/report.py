"""The report of a quantization: `report.json` and `report.html` in the bundle.

Dimensions: N output channels, K input channels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slm.core.files import write_text
from slm.core.manifest import Bundle
from slm.core.names import short_name
from slm.export.graph import float_tensors
from slm.export.graph.blocks import relative_error
from slm.export.graph.builder import Array
from slm.quantize.halves import compare_ways
from slm.quantize.linears import Linear
from slm.quantize.page import report_page
from slm.quantize.plan import QuantizationPlan, Schemes
from slm.quantize.quality import divergence, measure, speeds
from slm.quantize.quantizer import Quantizer
from slm.quantize.results import PAGE_FILE, REPORT_FILE, Report, TensorError
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.head import in_halves


def measured_report(quantizer: Quantizer, plan: QuantizationPlan, made: Bundle) -> Report:
    """Measures a quantized bundle on the evaluation text. The time in the report is 0.

    Args:
        quantizer: The quantizer. Its reference is closed afterwards.
        plan: The plan of the bundle.
        made: The quantized bundle.
    """
    source, text, progress = quantizer.source, quantizer.evaluation, quantizer.progress
    before, after = quantizer.reference, OnnxDecoder(made)
    change = measure(before(), after, text, progress)
    progress.note("comparing texts, speeds and tensors")
    texts = divergence(before(), after, text)
    speed = speeds(before(), after) if plan.device == "cpu" else None  # speed is measured on the CPU only
    before.close()
    head = compare_ways(after, text) if in_halves(made) else None
    return Report(
        source=short_name(source.path),
        settings=quantizer.settings.requested() | plan.decisions(),
        bytes_before=source.model_bytes,
        bytes_after=made.model_bytes,
        parts=parts_of(made, quantizer.linears, plan.schemes),
        change=change,
        divergence=texts,
        speeds=speed,
        tensors=tensor_errors(quantizer, plan, float_tensors(made.model_path, plan.schemes)),
        seconds=0.0,
        head=head,
        calibration=quantizer.calibration.name,
        text=text.name,
    )


def tensor_errors(quantizer: Quantizer, plan: QuantizationPlan, after: Mapping[str, Array]) -> tuple[TensorError, ...]:
    """Compares weights (N, K) before and after quantization, with the plan's smoothing.

    Args:
        quantizer: The quantizer.
        plan: The plan.
        after: The dequantized weights, under the float graph's names.
    """
    before, rms = quantizer.smoothed_weights(plan), quantizer.smoothed_activations(plan)
    found = []
    for linear in quantizer.linears:
        path, name = linear.path, f"{linear.path}.weight"
        weight = before[name]
        power = np.ones(linear.inputs) if path not in rms else np.square(rms[path], dtype=np.float64)
        signal = float(np.einsum("nk,nk->k", weight, weight, dtype=np.float64) @ power)
        off = after[name] - weight
        noise = float(np.einsum("nk,nk->k", off, off, dtype=np.float64) @ power)
        found.append(
            TensorError(
                path,
                plan.schemes[path].name,
                plan.schemes[path].bytes(linear.outputs, linear.inputs),
                round(10 * float(np.log10(signal / noise)), 2) if signal and noise else None,
                relative_error(weight, after[name]),
                plan.sensitivity.get(path),
            )
        )
    return tuple(found)


def norm_errors(quantizer: Quantizer, plan: QuantizationPlan) -> dict[str, float]:
    """Returns the relative change of each norm that refinement moved, by path."""
    before = quantizer.smoothed_weights(plan)
    return {
        name.removesuffix(".weight"): relative_error(before[name][None], array[None])
        for name, array in plan.norms.items()
    }


def parts_of(bundle: Bundle, linears: Sequence[Linear], schemes: Schemes) -> dict[str, int]:
    """Returns the size of graph and weights in bytes, by part of the model."""
    parts = {"embedding and head": 0, "attention": 0, "MLP": 0}
    for linear in linears:
        part = "MLP" if ".mlp." in linear.path else "attention" if linear.role == "layer" else "embedding and head"
        parts[part] += schemes[linear.path].bytes(linear.outputs, linear.inputs)
    return parts | {"norms, tables and the graph": bundle.model_bytes - sum(parts.values())}


def as_dict(report: Report) -> dict[str, Any]:
    """Returns the contents of `report.json`."""
    return asdict(report)


def write_report(directory: Path, report: Report) -> None:
    """Writes `report.json` for programs, and `report.html` for people."""
    write_text(directory / REPORT_FILE, json.dumps(as_dict(report), indent=1) + "\n")
    write_text(directory / PAGE_FILE, report_page(report))
