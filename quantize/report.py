"""What a quantization did: every figure of it, as `report.json` and `report.html` in the bundle.

Dimensions: N output channels, K input channels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.core.files import write_text
from slm.core.manifest import Bundle, Scheme
from slm.export.graph.blocks import relative_error
from slm.export.graph.builder import Array
from slm.quantize.linears import Linear
from slm.quantize.page import report_page
from slm.quantize.quality import Change, Divergence, Speeds

REPORT_FILE, PAGE_FILE = "report.json", "report.html"


@dataclass(frozen=True)
class TensorError:
    """How well one weight was kept.

    Attributes:
        path: Of the product.
        scheme: How it is stored, in words.
        bytes: What it takes.
        snr_db: Signal over error of what the product gives for average inputs, in decibels; with no statistics of the
            inputs, of the weight itself. None where there is no error.
        error: How far the weight is from what it was rounded from, as a share of that.
        harm_nats: How far the predictions moved when this weight alone had few bits, where that was tried.
    """

    path: str
    scheme: str
    bytes: int
    snr_db: float | None
    error: float
    harm_nats: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        source: The name of the bundle that was quantized.
        settings: What was asked for and what that came to.
        bytes_before: Graph and weights of the source.
        bytes_after: The same of what was made.
        parts: Bytes by part of the model.
        change: The predictions before and after.
        divergence: Greedy texts before and after.
        speeds: Before and after, taking turns; None for a bundle that is not for the CPU, on which everything is measured.
        tensors: Each weight.
        seconds: What everything took.
    """

    source: str
    settings: dict[str, Any]
    bytes_before: int
    bytes_after: int
    parts: dict[str, int]
    change: Change
    divergence: Divergence
    speeds: Speeds | None
    tensors: tuple[TensorError, ...]
    seconds: float

    @property
    def in_words(self) -> str:
        """How the weights are stored."""
        products: dict[str, int] = self.settings["products"]
        return ", ".join(f"{count} × {name}" for name, count in products.items())

    @property
    def worst(self) -> list[TensorError]:
        """Tensors from the one kept least well."""
        return sorted((each for each in self.tensors if each.snr_db is not None), key=lambda each: each.snr_db or 0.0)


def tensor_errors(
    linears: Sequence[Linear],
    schemes: Mapping[str, Scheme],
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    rms: Mapping[str, Array],
    harm: Mapping[str, float],
) -> tuple[TensorError, ...]:
    """Compares weights (N, K) before and after, both under the float graph's names.

    Args:
        linears: The products.
        schemes: How each is stored, by path.
        before: The weights that were rounded.
        after: What their integers stand for.
        rms: Root mean square of each input channel (K,), by path; where it is known.
        harm: What few bits of each did, by path; where that was tried.
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
    """Returns the bytes of graph and weights by part of the model."""
    parts = {"embedding and head": 0, "attention": 0, "MLP": 0}
    for linear in linears:
        part = "MLP" if ".mlp." in linear.path else "attention" if linear.layer is not None else "embedding and head"
        parts[part] += schemes[linear.path].bytes(linear.outputs, linear.inputs)
    return parts | {"norms, tables and the graph": model_bytes(bundle) - sum(parts.values())}


def model_bytes(bundle: Bundle) -> int:
    """Returns what graph and weights take together."""
    return sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith(bundle.manifest.model))


def as_dict(report: Report) -> dict[str, Any]:
    """Returns what goes into `report.json`."""
    return asdict(report)


def write_report(directory: Path, report: Report) -> None:
    """Writes `report.json` for programs, and `report.html` for people."""
    write_text(directory / REPORT_FILE, json.dumps(as_dict(report), indent=1) + "\n")
    write_text(directory / PAGE_FILE, report_page(report))
