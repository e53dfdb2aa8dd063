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
from slm.core.manifest import Bundle, Scheme
from slm.export.graph.blocks import relative_error
from slm.export.graph.builder import Array
from slm.quantize.linears import Linear
from slm.quantize.page import report_page
from slm.quantize.results import Report as Report
from slm.quantize.results import TensorError

REPORT_FILE, PAGE_FILE = "report.json", "report.html"


def tensor_errors(
    linears: Sequence[Linear],
    schemes: Mapping[str, Scheme],
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    rms: Mapping[str, Array],
    harm: Mapping[str, float],
) -> tuple[TensorError, ...]:
    """Compares weights (N, K) before and after quantization, both under the float graph's names.

    Args:
        linears: The products.
        schemes: The scheme of each product, by path.
        before: The float weights.
        after: The dequantized weights.
        rms: Root mean square of each input channel (K,), by path of the product; empty if not measured.
        harm: KL divergence when only this product has few bits, in nats, by path; empty if not measured.
    """
    found = []
    for linear in linears:
        name = f"{linear.path}.weight"
        weight = before[name]
        power = np.ones(linear.inputs) if linear.path not in rms else np.square(rms[linear.path], dtype=np.float64)
        signal = float(np.einsum("nk,nk->k", weight, weight, dtype=np.float64) @ power)
        off = after[name] - weight
        noise = float(np.einsum("nk,nk->k", off, off, dtype=np.float64) @ power)
        found.append(
            TensorError(
                linear.path,
                schemes[linear.path].name,
                schemes[linear.path].bytes(linear.outputs, linear.inputs),
                round(10 * float(np.log10(signal / noise)), 2) if signal and noise else None,
                relative_error(weight, after[name]),
                harm.get(linear.path),
            )
        )
    return tuple(found)


def parts_of(bundle: Bundle, linears: Sequence[Linear], schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """Returns the size of graph and weights in bytes, by part of the model."""
    parts = {"embedding and head": 0, "attention": 0, "MLP": 0}
    for linear in linears:
        part = "MLP" if ".mlp." in linear.path else "attention" if linear.layer is not None else "embedding and head"
        parts[part] += schemes[linear.path].bytes(linear.outputs, linear.inputs)
    return parts | {"norms, tables and the graph": model_bytes(bundle) - sum(parts.values())}


def model_bytes(bundle: Bundle) -> int:
    """Returns the size of graph and weights in bytes."""
    return sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith(bundle.manifest.model))


def as_dict(report: Report) -> dict[str, Any]:
    """Returns the contents of `report.json`."""
    return asdict(report)


def write_report(directory: Path, report: Report) -> None:
    """Writes `report.json` for programs, and `report.html` for people."""
    write_text(directory / REPORT_FILE, json.dumps(as_dict(report), indent=1) + "\n")
    write_text(directory / PAGE_FILE, report_page(report))
