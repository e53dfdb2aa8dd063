"""Checkpoints to models and back: a Hugging Face Gemma 3 directory plus `slm.json`, which says how it was made."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from slm.core.checkpoint import (
    CHECKPOINT_FILES,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INFO_FILE,
    WEIGHTS_FILE,
    check_tensors,
    read_config,
)
from slm.core.errors import SlmError
from slm.core.files import atomic_directory, check_readable
from slm.core.nn.model import CausalLM
from slm.core.tokenizer import Tokenizer


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Loads a checkpoint that slm or transformers saved, in evaluation mode.

    Raises:
        SlmError: When the directory is not a checkpoint, its weights are damaged, or tensors are missing, left over or
            of another shape than the configuration says; each is named.
    """
    config = read_config(path)
    check_readable(path / WEIGHTS_FILE, "the weights")
    try:
        tensors = safetensors.torch.load_file(path / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise SlmError(f"cannot read the weights: {path / WEIGHTS_FILE} ({error})", "copy or train it again") from None
    with torch.device("meta"):
        model = CausalLM(config)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, path)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


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
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    documents = {
        CONFIG_FILE: config.to_hf(),
        GENERATION_CONFIG_FILE: {name: getattr(config, name) for name in tokens},
        INFO_FILE: info,
    }
    with atomic_directory(path, CHECKPOINT_FILES) as directory:
        safetensors.torch.save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        tokenizer.save(directory)
        for name, content in documents.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
