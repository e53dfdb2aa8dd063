"""Checkpoints: a Hugging Face Gemma 3 directory plus `slm.json`, which says how it was made."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from slm.core.config import ModelConfig
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, read_json
from slm.core.manifest import CONFIG_FILE, GENERATION_CONFIG_FILE
from slm.core.nn.model import CausalLM
from slm.core.runs import INFO_FILE, WEIGHTS_FILE, is_checkpoint
from slm.core.tokenizer import Tokenizer


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Loads a checkpoint that slm or transformers saved, in evaluation mode.

    Raises:
        SlmError: When the directory is not a checkpoint, its weights are damaged, or tensors are missing, left over or
            of another shape than the configuration says; each is named.
    """
    config = read_config(path)
    try:
        tensors = safetensors.torch.load_file(path / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise SlmError(f"cannot read the weights: {path / WEIGHTS_FILE} ({error})", "copy or train it again") from None
    with torch.device("meta"):
        model = CausalLM(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, {n: tuple(s) for n, s in wanted.items()}, path)
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True).eval()


def read_config(path: Path) -> ModelConfig:
    """Reads the configuration of a checkpoint.

    Raises:
        SlmError: When the directory is not a checkpoint or its configuration cannot be run.
    """
    if not is_checkpoint(path):
        kind = "not found" if not path.exists() else "not a checkpoint"
        raise SlmError(f"{kind}: {path}", f"a checkpoint is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    return ModelConfig.from_hf(read_json(path / CONFIG_FILE, CONFIG_FILE))


def check_tensors(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], path: Path) -> None:
    """Compares names and shapes of tensors with those that a configuration asks for.

    Raises:
        SlmError: That names the first tensors missing, left over or of the wrong shape.
    """
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    shapes = [
        f"{n} {found[n]} instead of {wanted[n]}" for n in sorted(wanted.keys() & found.keys()) if found[n] != wanted[n]
    ]
    parts = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", sorted(missing)), ("left over", sorted(extra)), ("wrong shape", shapes))
        if names
    ]
    if parts:
        raise SlmError(f"{path}: the weights do not fit the configuration; {'; '.join(parts)}")


def save_checkpoint(path: Path, model: CausalLM, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    """Writes a checkpoint in float32, whole or not at all; a tied head is stored once, as the embedding.

    Args:
        path: The directory to make or replace.
        model: The model; its configuration names the special tokens.
        tokenizer: The tokenizer that it was trained with.
        info: How it was made, for `slm.json`.
    """
    config = model.config
    state = {
        name: parameter.detach().to("cpu", torch.float32).contiguous() for name, parameter in model.named_parameters()
    }
    with atomic_directory(path) as directory:
        safetensors.torch.save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        tokenizer.save(directory)
        generation = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }
        documents = {
            CONFIG_FILE: config.to_hf(),
            GENERATION_CONFIG_FILE: generation,
            INFO_FILE: info,
        }
        for name, content in documents.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
