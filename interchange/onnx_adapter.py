"""Conversion of PEFT's LoRA adapters to onnxruntime's `.onnx_adapter` files, in numpy.

Every product of the graph has one slot; q, k and v share a product, and so do gate and up. Their matrices A are concatenated,
and their matrices B form a block diagonal. Dimensions: K inputs, N outputs, r rank.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slm.core.adapter_base import check_base
from slm.core.config import ModelConfig
from slm.core.contract import module_rows, product_sizes, slot_names
from slm.core.errors import SlmError
from slm.core.files import atomic_file
from slm.core.manifest import Bundle
from slm.core.peft_adapter import read_peft_adapter
from slm.runtime.adapters import Adapter, check_slots_of, checked, model_version

Array = NDArray[Any]


def adapter_from_peft(path: Path, bundle: Bundle) -> Adapter:
    """Reads PEFT's directory for a bundle with slots.

    Raises:
        SlmError: When the bundle has no slots, or the adapter is for another base or has parts for which there is no slot:
            DoRA's magnitudes, rows of the embedding.
    """
    check_slots_of(bundle)
    check_base(path, bundle.path, bundle.manifest.provenance.get("weights_sha256"))
    return checked(Adapter(path.resolve().name, slot_arrays(path, bundle.config)), bundle, path)


def write_onnx_adapter(path: Path, adapter: Adapter, weights_sha256: object) -> None:
    """Writes a `.onnx_adapter` file, whole or not at all.

    Args:
        path: The file.
        adapter: The adapter.
        weights_sha256: SHA-256 of the base's weights; the file stores its first digits.
    """
    format_ = ort.AdapterFormat()
    format_.set_adapter_version(1)
    format_.set_model_version(model_version(weights_sha256))
    format_.set_parameters(adapter.values)
    with atomic_file(path) as file:
        format_.export_adapter(str(file))


def slot_arrays(path: Path, config: ModelConfig) -> dict[str, Array]:
    """Returns A (1, K, r) and B (1, r, N), including the scale, of each product that an adapter changes, by graph input.

    Raises:
        SlmError: As `slm.core.peft_adapter.read_peft_adapter`, and when the adapter has parts for which there is no slot.
    """
    adapter = read_peft_adapter(path, config)
    if adapter.fields.use_dora:
        raise SlmError(f"{path} is DoRA, whose magnitudes depend on the weights", _MERGE)
    if more := [*adapter.embedding, *adapter.rows, *adapter.copies]:
        raise SlmError(f"{path} changes more than the slots' products: {more[0]}", _MERGE)
    arrays: dict[str, Array] = {}
    for product, _, outputs in product_sizes(config):
        parts: list[tuple[Array, Array]] = []  # A (K, r) and B (r, N) of each projection
        for module, rows in module_rows(product, config).items():
            if update := adapter.updates.get(module):
                spread = np.zeros((update.rank, outputs), np.float32)
                spread[:, rows] = update.high.T * np.float32(update.scale)
                parts.append((update.low.T, spread))
        if parts:
            a, b = slot_names(product)
            arrays[a] = np.ascontiguousarray(np.concatenate([low for low, _ in parts], axis=1)[None])
            arrays[b] = np.ascontiguousarray(np.concatenate([high for _, high in parts], axis=0)[None])
    return arrays


_MERGE = "merge it: slm export --onnx --adapter DIR"
