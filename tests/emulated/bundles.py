"""Makes a bundle of each kind from the model that ships with slm, for `run.py`. Needs PyTorch; takes about a minute."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm.core.manifest import Bundle
from slm.core.nn import load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.export.recovered import BundleModel
from slm.interchange.importing import import_model
from slm.quantize import plan
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import calibration_text, measuring_text
from slm.runtime.shipped import model_path

EXPORTS = {
    "float32": ExportOptions(),
    "portable": ExportOptions(target="portable"),
    "float16": ExportOptions(device="cuda"),  # the CPU runs it with conversions
}
# The source and the settings of each quantized kind.
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("float32", {}),
    "int8-quality": ("float32", {"prefer": "quality"}),
    "int8-caches": ("float32", {"cache": "int8"}),
    "int8-halves": ("float32", {"head": "halves"}),
    "int8-dynamic": ("float32", {"dynamic": True}),
    "int8-dynamic-older": ("float32", {"dynamic": True}),
    "int4": ("float32", {"precision": "int4"}),
    "int4-size": ("float32", {"precision": "int4", "prefer": "size"}),
    "int8-portable": ("portable", {}),
    "int4-portable": ("portable", {"precision": "int4"}),
}


def make(home: Path) -> None:
    """Writes all bundles into an empty directory."""
    checkpoint = _dithered(home)
    for name, options in EXPORTS.items():
        export_bundle(checkpoint, home / name, replace(options, context=256))
    shutil.rmtree(checkpoint)
    for name, (source, chosen) in QUANTIZED.items():
        _quantize(Bundle.open(home / source), home / name, chosen)


def _dithered(home: Path) -> Path:
    """Returns a checkpoint of the shipped model, whose weights were moved by up to half a step: off the grid of its INT8."""
    import_model(BundleModel(model_path()), home / "shipped")
    model = load_checkpoint(home / "shipped")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                step = parameter.abs().amax(dim=1, keepdim=True) / 127
                parameter += (torch.rand_like(parameter) - 0.5) * step
    save_checkpoint(home / "checkpoint", model, Tokenizer.load(home / "shipped"), {})
    shutil.rmtree(home / "shipped")
    return home / "checkpoint"


def _quantize(source: Bundle, out: Path, chosen: dict[str, Any]) -> None:
    fixed: dict[str, Any] = {"smooth": False, "gate": Gate(None)}
    if source.manifest.target == "fused":
        fixed["cache"] = "float32"
    text, calibration = measuring_text(source, None, 512), calibration_text(source, None, 1024)
    if out.name.endswith("older"):  # as older versions wrote it: sums of two products can exceed 16 bits
        layer = plan.INT8_DYNAMIC.layer.model_copy(update={"reduced": False})
        plan.INT8_DYNAMIC, limited = replace(plan.INT8_DYNAMIC, layer=layer), plan.INT8_DYNAMIC
    quantize_bundle(source, out, text, Settings(**fixed | chosen), calibration=calibration)
    if out.name.endswith("older"):
        plan.INT8_DYNAMIC = limited
    print(out.name, flush=True)


def prompt(home: Path, tokens: int) -> list[int]:
    """Returns the first tokens of the validation stories that ship with slm."""
    return [int(token) for token in np.ravel(measuring_text(Bundle.open(home / "float32"), None, 512).rows)[:tokens]]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
