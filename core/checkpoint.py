"""Reads and writes checkpoints without PyTorch: a checkpoint is a Hugging Face directory with `slm.json`."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slm.core.config import Dtype, ModelConfig
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_json
from slm.core.licence import NOTICE_FILE, Notices, foreign_notices, recorded_notices, write_notice
from slm.core.tokenizer import TOKENIZER_FILE, Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE
from slm.core.weights import EMBEDDING, HEAD, WEIGHTS_FILE, Array, Shape, Weights, has_weights

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
INFO_FILE = "slm.json"
# All files of a checkpoint.
CHECKPOINT_FILES = frozenset(
    (CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHTS_FILE, INFO_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, NOTICE_FILE)
)

Shapes = Mapping[str, Shape]


def now() -> str:
    """Returns the creation time for an artifact, in UTC; SOURCE_DATE_EPOCH replaces it in reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch.isascii() and epoch.isdigit() else datetime.now(UTC)
    return moment.isoformat(timespec="microseconds")


def is_checkpoint(path: Path) -> bool:
    """Returns whether a directory looks like a checkpoint: it has a configuration and weights."""
    return (path / CONFIG_FILE).is_file() and has_weights(path)


def read_config(path: Path) -> ModelConfig:
    """Reads the configuration of a checkpoint.

    Raises:
        SlmError: If the directory is not a checkpoint or its configuration is not supported.
    """
    if not is_checkpoint(path):
        if path.is_file() and path.suffix == ".gguf":
            raise SlmError(f"a GGUF file is not a checkpoint: {path}", f"slm import {path}")
        kind = "not found" if not path.exists() else "not a checkpoint"
        raise SlmError(f"{kind}: {path}", f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    return ModelConfig.from_hf(with_stop_tokens(read_json(path / CONFIG_FILE, CONFIG_FILE), path))


def with_stop_tokens(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the contents of config.json with `eos_token_id` from `generation_config.json`, if that file has it.

    Some instruction-tuned models list their end-of-turn tokens only there.
    """
    file = path / GENERATION_CONFIG_FILE
    stops = read_json(file, GENERATION_CONFIG_FILE).get("eos_token_id") if file.is_file() else None
    return dict(fields) if stops is None else {**fields, "eos_token_id": stops}


def read_info(path: Path) -> dict[str, Any]:
    """Returns the contents of `slm.json`, a checkpoint's metadata; empty for a checkpoint that slm did not write."""
    file = path / INFO_FILE
    return read_json(file, INFO_FILE) if file.is_file() else {}


def notices_of(path: Path) -> Notices:
    """Returns the licence notices of a checkpoint: the recorded ones, or those of a directory that slm did not write."""
    if (path / INFO_FILE).is_file():
        return recorded_notices(read_info(path))
    return foreign_notices(path, read_json(path / CONFIG_FILE, CONFIG_FILE))


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the name and shape of every tensor in a checkpoint of this configuration; a tied head is not repeated."""
    hidden, wide = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
    }
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def is_norm(name: str) -> bool:
    """Returns whether a tensor is the weight of a norm, which the model adds to 1."""
    return name.endswith("norm.weight")


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint, completely or not at all.

    Args:
        path: The directory to create or replace.
        config: The model's configuration, with the ids of special tokens.
        tensors: Every tensor under Hugging Face's name, all of one float dtype; a tied head once, as the embedding.
        tokenizer: The tokenizer that the model was trained with.
        info: Metadata for `slm.json`; its "notices" also become the file NOTICE.
        generation: Further fields of `generation_config.json`.
    """
    with atomic_directory(path, CHECKPOINT_FILES) as directory:
        fill_checkpoint(directory, config, tensors, tokenizer, info, generation)


def fill_checkpoint(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes the files of a checkpoint to a directory; the arguments are those of `write_checkpoint`."""
    from safetensors.numpy import save_file

    dtype: Dtype = tensors[EMBEDDING].dtype.name  # type: ignore[assignment]  # one of the floats
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents = {
        CONFIG_FILE: config.to_hf(dtype),
        GENERATION_CONFIG_FILE: dict(generation or {}) | tokens,
        INFO_FILE: {**info, "created": now()},
    }
    save_file(dict(tensors), directory / WEIGHTS_FILE, metadata={"format": "pt"})
    tokenizer.save(directory)
    write_notice(directory, recorded_notices(dict(info)))
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="")


def open_weights(path: Path, config: ModelConfig) -> Weights:
    """Opens the weights of a checkpoint. Reads only the headers of the files.

    Raises:
        SlmError: If the weights are damaged, or tensors are missing, unknown or of another shape than the configuration
            requires; the message names them.
    """
    weights = Weights(path)
    check_tensors(weights.untied(config), tensor_shapes(config), path)
    return weights


def check_tensors(found: Shapes, wanted: Shapes, path: Path) -> None:
    """Compares the names and shapes of tensors with those that a configuration requires.

    Raises:
        SlmError: If they differ; the message names the first tensors that are missing, unknown or of the wrong shape.
    """
    common = sorted(wanted.keys() & found.keys())
    complaints = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "wrong shape": [f"{n} {found[n]} instead of {wanted[n]}" for n in common if found[n] != wanted[n]],
    }
    parts = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in complaints.items()
        if names
    ]
    if parts:
        hint = None
        if complaints["missing"] == [HEAD]:
            hint = "config.json says tie_word_embeddings false; set it to true if the head is the embedding"
        raise SlmError(f"{path}: the weights do not fit the configuration; {'; '.join(parts)}", hint)
