"""Reads LoRA adapters in PEFT's format with numpy, for merging, for adapter slots and for `.onnx_adapter` files.

The names of the tensors define the adapted modules. `adapter_config.json` defines the scale, and must match the tensors.
Dimensions: K inputs, N outputs, r rank, D hidden size, R trained rows.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.checkpoint import tensor_shapes
from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import check_readable
from slm.core.name_patterns import by_pattern, whole_matches
from slm.core.peft_fields import ADAPTER_CONFIG_FILE, ALL_LINEAR, AdapterFields, is_adapter, read_adapter_fields
from slm.core.weights import EMBEDDING, HEAD

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

Array = NDArray[Any]

_PREFIX = "base_model.model."
# The kind of a tensor, after its module's name. PEFT omits the adapter's name, "default"; other tools keep it.
_KIND = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(\.default)?(\.weight)?"
)
# Prefixes of the text part in a multimodal model: of transformers before 4.52, and of later versions.
_TEXT_PREFIX = re.compile(r"^(?:language_model\.(?=lm_head)|language_model\.(model\.)|(model\.)language_model\.)")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_ROWS = "token_adapter.trainable_tokens_delta"
_EMBEDDING, _HEAD = EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
_TIED = (_EMBEDDING, _HEAD)
_FLOATS = ("F64", "F32", "F16", "BF16")
_AGAIN = "copy or train it again"


@dataclass
class Update:
    """An adapter's update of one linear layer: scale * B A, and for DoRA the magnitude of each output channel.

    Attributes:
        low: A (r, K) float32.
        high: B (N, r) float32.
        alpha: The module's alpha.
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA.
        magnitude: DoRA's magnitudes (N,) float32; None for other adapters.
    """

    low: Array
    high: Array
    alpha: float
    scale: float
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.low)


@dataclass
class PeftAdapter:
    """An adapter that fits a model.

    Attributes:
        path: The adapter's directory.
        fields: The adapter's configuration.
        updates: The updates by path of the linear layer ("model.layers.0.self_attn.q_proj"), in the model's order.
        embedding: The update of the embedding ("model.embed_tokens"); only untied models can have one.
        rows: Trained rows (R, D) float32 by path of the matrix: "model.embed_tokens", "lm_head".
        copies: Copies (V, D) of the base's embedding and head, which PEFT stores beside updates of them. A base with other
            values is another model.
    """

    path: Path
    fields: AdapterFields
    updates: dict[str, Update] = field(default_factory=dict)
    embedding: dict[str, Update] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)
    copies: dict[str, Array] = field(default_factory=dict)


def read_peft_adapter(path: Path, config: ModelConfig) -> PeftAdapter:
    """Reads an adapter's directory for a model.

    Raises:
        SlmError: If the directory is not a LoRA adapter, is damaged, does not fit the model, contradicts itself, or uses a
            feature that is not supported.
    """
    if not is_adapter(path):
        kind = "not found" if not path.exists() else "not an adapter"
        hint = (
            f"an adapter is a directory with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}; slm finetune writes one"
        )
        raise SlmError(f"{kind}: {path}", hint)
    fields = read_adapter_fields(path)
    adapter = PeftAdapter(path, fields)
    tensors, as_spelt = _by_module(adapter, _tensors(path))
    _check_complete(adapter, config, tensors)
    _check_targets(adapter, tensors, as_spelt)
    where = f"{path / ADAPTER_CONFIG_FILE}: "
    ranks = by_pattern(fields.rank_pattern, as_spelt.values(), f"{where}rank_pattern")
    alphas = by_pattern(fields.alpha_pattern, as_spelt.values(), f"{where}alpha_pattern")
    shapes = tensor_shapes(config) | {HEAD: (config.vocab_size, config.hidden_size)}
    order = {name.removesuffix(".weight"): i for i, name in enumerate(shapes)}
    for module in sorted(tensors, key=lambda name: order.get(name, len(order))):
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise SlmError(
                f"{path} does not fit the model, which has no linear layer {module}", "it was trained on another base"
            )
        parts, spelt = tensors[module], as_spelt[module]
        if _ROWS in parts:
            adapter.rows[module] = _checked_rows(adapter, module, parts.pop(_ROWS), shape[1])
        if parts:
            rank = ranks.get(spelt, fields.r)
            alpha = float(alphas.get(spelt, fields.lora_alpha))
            (adapter.embedding if module in _TIED else adapter.updates)[module] = _update(
                adapter, module, parts, shape, rank, alpha
            )
    _check_rows(adapter, config)
    if not adapter.updates and not adapter.embedding:
        raise SlmError(f"{path} has no LoRA tensors", _AGAIN)
    if config.tie_word_embeddings and any(name in _TIED for name in (*adapter.updates, *adapter.embedding)):
        # The updates of the two would differ, but they share one matrix.
        raise SlmError(f"{path}: the adapter changes the embedding or the head, but the base ties the two")
    return adapter


def _tensors(path: Path) -> dict[str, Array]:
    """Returns the tensors of the adapter's file in float32."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise SlmError(
            "reading PEFT's adapters needs safetensors", "pip install safetensors, or name an .onnx_adapter file"
        ) from None
    file = path / ADAPTER_WEIGHTS_FILE
    check_readable(file, "the adapter")
    found: dict[str, Array] = {}
    try:
        with safe_open(str(file), framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                kind = opened.get_slice(name).get_dtype()
                if kind not in _FLOATS:
                    raise SlmError(
                        f"{path}: {name} is stored as {kind}, which is not supported", "slm reads float adapters"
                    )
                if kind == "BF16":
                    import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy
                found[name] = np.ascontiguousarray(opened.get_tensor(name).astype(np.float32))
    except ImportError:
        raise SlmError("reading a bfloat16 adapter needs ml_dtypes", "pip install ml_dtypes") from None
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise SlmError(f"cannot read the adapter: {file} ({error})", _AGAIN) from None
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise SlmError(f"{path}: {name} has values that are NaN or infinite", _AGAIN)
    return found


def _by_module(
    adapter: PeftAdapter, tensors: Mapping[str, Array]
) -> tuple[dict[str, dict[str, Array]], dict[str, str]]:
    """Returns the tensors by the text model's module and by kind, and each module's name as spelled in the file."""
    modules: dict[str, dict[str, Array]] = {}
    as_spelt: dict[str, str] = {}
    for name, array in tensors.items():
        if not name.startswith(_PREFIX):
            raise SlmError(f"{adapter.path}: {name} is not a tensor name of PEFT's, which start with {_PREFIX}")
        inner = name.removeprefix(_PREFIX)
        if _VISION.match(inner):
            continue  # slm runs only the text part
        match = _KIND.fullmatch(inner)
        copied = _TEXT_PREFIX.sub(_text_part, inner).removesuffix(".weight").removesuffix(".base_layer")
        if match is None and inner.endswith(".weight") and copied in _TIED:
            adapter.copies[copied] = array
            continue
        if match is None:
            what = "a bias" if inner.endswith(".bias") else "more than low-rank updates"
            raise SlmError(
                f"{adapter.path} has {what}, which is not supported: {name}",
                "merge it with PEFT (merge_and_unload, save_pretrained), then slm import",
            )
        module, kind = match["module"], match["kind"]
        as_text = _TEXT_PREFIX.sub(_text_part, module)
        if as_spelt.setdefault(as_text, module) != module or kind in modules.get(as_text, {}):
            raise SlmError(f"{adapter.path}: {as_text} has two tensors {kind}", _AGAIN)
        modules.setdefault(as_text, {})[kind.replace("lora_embedding_", "lora_")] = array
    return modules, as_spelt


def _text_part(match: re.Match[str]) -> str:
    return match[1] or match[2] or ""


def _check_targets(
    adapter: PeftAdapter, tensors: Mapping[str, Mapping[str, Array]], as_spelt: Mapping[str, str]
) -> None:
    """Checks that the configuration targets all modules with tensors: PEFT ignores tensors of other modules."""
    fields, where = adapter.fields, adapter.path / ADAPTER_CONFIG_FILE
    modules = {as_spelt[module]: module for module, parts in tensors.items() if not parts.keys() <= {_ROWS}}
    left_out = {spelt for spelt in modules if not fields.targets(spelt)}
    if isinstance(fields.target_modules, str) and fields.target_modules != ALL_LINEAR:
        matched = whole_matches(fields.target_modules, modules, f"{where}: target_modules")
        left_out |= set() if matched is None else modules.keys() - matched
    if isinstance(fields.exclude_modules, str):
        left_out |= whole_matches(fields.exclude_modules, modules, f"{where}: exclude_modules") or set()
    if left_out:
        raise SlmError(
            f"{adapter.path} contradicts itself: it has tensors for {modules[min(left_out)]}, but target_modules,"
            " exclude_modules and layers_to_transform leave it out",
            "copy both files of one adapter",
        )


def _check_complete(adapter: PeftAdapter, config: ModelConfig, tensors: Mapping[str, Mapping[str, Array]]) -> None:
    """Checks that every module in a list of target modules has tensors, and that the model has such modules."""
    fields = adapter.fields
    if isinstance(fields.target_modules, str):
        return
    products = [name.removesuffix(".weight") for name, shape in tensor_shapes(config).items() if len(shape) == 2]
    modules = [*products, *[_HEAD] * (_HEAD not in products)]
    if not any(f".{m}".endswith(f".{name}") for m in (*modules, *tensors) for name in fields.target_modules):
        named = ", ".join(fields.target_modules[:3]) or "none"
        raise SlmError(
            f"{adapter.path} does not fit the model, which has none of the target modules: {named}",
            "it was trained on another base",
        )
    missing = [m for m in modules if fields.targets(m) and not tensors.get(m, {}).keys() - {_ROWS}]
    tied = [m for m in missing if m in _TIED and config.tie_word_embeddings]
    if tied:
        raise SlmError(f"{adapter.path}: the adapter changes the embedding or the head, but the base ties the two")
    if missing and not isinstance(fields.exclude_modules, str):
        raise SlmError(f"{adapter.path} lacks tensors of its target modules; missing: {', '.join(missing[:3])}", _AGAIN)


def _update(
    adapter: PeftAdapter, module: str, parts: Mapping[str, Array], shape: tuple[int, ...], rank: int, alpha: float
) -> Update:
    path, dora = adapter.path, adapter.fields.use_dora
    low, high, magnitude = (parts.get(kind) for kind in ("lora_A", "lora_B", "lora_magnitude_vector"))
    for kind, array in (("lora_A", low), ("lora_B", high), *[("lora_magnitude_vector", magnitude)] * dora):
        if array is None:
            raise SlmError(f"{path} lacks tensors of its target modules; missing: {module}.{kind}", _AGAIN)
    assert low is not None and high is not None
    if magnitude is not None and not dora:
        raise SlmError(f"{path} contradicts itself: use_dora is false, but {module} has magnitudes", _AGAIN)
    # An embedding's table (V, D) is looked up, not multiplied: its A is (r, V), and its B (D, r).
    inputs, outputs = shape if module == _EMBEDDING else shape[::-1]
    fits = low.ndim == high.ndim == 2 and low.shape[1] == inputs and high.shape == (outputs, low.shape[0])
    if not fits or (magnitude is not None and magnitude.size != outputs):
        raise SlmError(
            f"{path} does not fit the model: {module} has the shapes {low.shape} and {high.shape}, but the layer has"
            f" {inputs} inputs and {outputs} outputs",
            "it was trained on another base",
        )
    if len(low) != rank:
        raise SlmError(
            f"{path} contradicts itself: {ADAPTER_CONFIG_FILE} has rank {rank} for {module}, but its tensors have rank"
            f" {len(low)}",
            "the scale depends on the rank; copy both files of one adapter",
        )
    scale = alpha / (math.sqrt(rank) if adapter.fields.use_rslora else rank)
    return Update(low, high, alpha, scale, None if magnitude is None else magnitude.reshape(-1))


def _checked_rows(adapter: PeftAdapter, module: str, rows: Array, width: int) -> Array:
    if module not in _TIED or rows.ndim != 2 or rows.shape[1] != width:
        raise SlmError(f"{adapter.path} does not fit the model: trained rows of {module} have the shape {rows.shape}")
    return rows


def _check_rows(adapter: PeftAdapter, config: ModelConfig) -> None:
    """Checks that the configuration lists the trained rows in the file."""
    indices = adapter.fields.trainable_token_indices
    named: dict[str, list[int]] = {}
    if isinstance(indices, dict):
        named = {_HEAD if name.endswith(_HEAD) else _EMBEDDING: ids for name, ids in indices.items() if ids}
    elif indices:
        named = {_EMBEDDING: indices}
    if config.tie_word_embeddings and _HEAD in named:
        raise SlmError(f"{adapter.path}: the adapter trains rows of the head, but the base ties it to the embedding")
    for name in sorted({*named, *adapter.rows}):
        ids, rows = named.get(name, []), adapter.rows.get(name)
        if rows is None or len(rows) != len(ids):
            raise SlmError(
                f"{adapter.path} contradicts itself: trainable_token_indices lists {len(ids)} rows of {name}, but the file"
                f" has {0 if rows is None else len(rows)}",
                _AGAIN,
            )
        if not all(0 <= token < config.vocab_size for token in ids):
            raise SlmError(f"{adapter.path} does not fit the model: it trains rows beyond the end of {name}")
