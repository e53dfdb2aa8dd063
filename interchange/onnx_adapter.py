"""PEFT's LoRA adapters as onnxruntime's `.onnx_adapter` files, in numpy.

A slot is one for each product of the graph: q, k and v are one, gate and up are one. Their A stand beside each other and
their B on a diagonal. Dimensions: K inputs, N outputs, r rank.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from slm.core.adapter_base import check_base
from slm.core.config import ModelConfig, first_mistake
from slm.core.contract import product_sizes, slot_names
from slm.core.errors import SlmError
from slm.core.files import atomic_file, check_readable, read_json
from slm.core.manifest import Bundle
from slm.runtime.adapters import Adapter, check_slots_of, checked, model_version

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

Array = NDArray[Any]


def is_peft(path: Path) -> bool:
    """Says whether a directory looks like PEFT's."""
    return (path / CONFIG_FILE).is_file()


def adapter_from_peft(path: Path, bundle: Bundle) -> Adapter:
    """Reads PEFT's directory for a bundle with slots.

    Raises:
        SlmError: When the bundle has no slots, or the adapter is for another base, or more than slots hold: DoRA's
            magnitudes, rows of the embedding.
    """
    check_slots_of(bundle)
    check_base(path, bundle.path, bundle.manifest.provenance.get("weights_sha256"))
    return checked(Adapter(path.resolve().name, slot_arrays(path, bundle.config)), bundle, path)


def write_onnx_adapter(path: Path, adapter: Adapter, weights_sha256: object) -> None:
    """Writes a `.onnx_adapter` file, whole or not at all.

    Args:
        path: The file.
        adapter: What is in it.
        weights_sha256: Of the base, whose beginning the file keeps.
    """
    format_ = ort.AdapterFormat()
    format_.set_adapter_version(1)
    format_.set_model_version(model_version(weights_sha256))
    format_.set_parameters(adapter.values)
    with atomic_file(path) as file:
        format_.export_adapter(str(file))


def slot_arrays(path: Path, config: ModelConfig) -> dict[str, Array]:
    """Returns A (1, K, r) and B (1, r, N), scale included, of each product that an adapter changes, by input.

    Raises:
        SlmError: When it holds what slots do not.
    """
    try:
        fields = _Fields.model_validate(read_json(path / CONFIG_FILE, CONFIG_FILE))
    except ValidationError as error:
        raise SlmError(f"{path / CONFIG_FILE} is wrong: {first_mistake(error)}") from None
    tensors = _tensors(path)
    if fields.use_dora:
        raise SlmError(f"{path} is DoRA, whose magnitudes depend on the weights", _MERGE)
    widths = _widths(config)
    arrays: dict[str, Array] = {}
    for product, inputs, outputs in product_sizes(config):
        parent, _, name = product.rpartition(".")
        parts: list[tuple[Array, Array]] = []  # A (K, r) and B (r, N) of each projection
        start = 0
        for projection in _PARTS[name]:
            width = widths[projection]
            full = f"{parent}.{projection}"
            low, high = (tensors.pop(f"{_PREFIX}{full}.lora_{side}.weight", None) for side in "AB")
            if low is not None and high is not None:
                _check(path, full, low, high, inputs, width)
                spread = np.zeros((low.shape[0], outputs), np.float32)
                spread[:, start : start + width] = high.T * np.float32(_scale(fields, full, low.shape[0]))
                parts.append((low.T, spread))
            start += width
        if parts:
            a, b = slot_names(product)
            arrays[a] = np.ascontiguousarray(np.concatenate([low for low, _ in parts], axis=1)[None])
            arrays[b] = np.ascontiguousarray(np.concatenate([high for _, high in parts], axis=0)[None])
    if tensors:
        raise SlmError(f"{path} changes more than the slots' products: {min(tensors)}", _MERGE)
    return arrays


_MERGE = "merge it: slm export --onnx --adapter DIR"
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def _widths(config: ModelConfig) -> dict[str, int]:
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    inner, hidden = config.intermediate_size, config.hidden_size
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden} | {
        "gate_proj": inner,
        "up_proj": inner,
        "down_proj": hidden,
    }


def _tensors(path: Path) -> dict[str, Array]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise SlmError(
            "reading PEFT's adapters needs safetensors", "pip install safetensors, or name an .onnx_adapter file"
        ) from None
    check_readable(path / WEIGHTS_FILE, "the adapter")
    try:
        return {name: array.astype(np.float32) for name, array in load_file(path / WEIGHTS_FILE).items()}
    except (SafetensorError, OSError, TypeError, KeyError) as error:  # bfloat16, which numpy does not have, too
        raise SlmError(f"cannot read the adapter: {path / WEIGHTS_FILE} ({error})", "copy or train it again") from None


class _Fields(BaseModel):
    """The fields of adapter_config.json that change what an adapter computes here; null is as if it were left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


def _scale(fields: _Fields, path: str, rank: int) -> float:
    patterns = fields.alpha_pattern or {}
    default = rank if fields.lora_alpha is None else fields.lora_alpha
    alpha = next((value for end, value in patterns.items() if path.endswith(end)), default)
    return float(alpha / (math.sqrt(rank) if fields.use_rslora else rank))


def _check(path: Path, name: str, low: Array, high: Array, inputs: int, outputs: int) -> None:
    fits = low.ndim == high.ndim == 2 and low.shape == (high.shape[1], inputs) and high.shape[0] == outputs
    if not fits:
        raise SlmError(
            f"{path} does not fit the model: {name} is {low.shape} and {high.shape}, for {inputs} inputs and {outputs} outputs",
            "it was trained on another base",
        )
