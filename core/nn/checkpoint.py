"""Loads and saves PyTorch models as checkpoints."""

from pathlib import Path
from typing import Any

import torch

from slm.core.checkpoint import open_weights, read_config, tensor_shapes, write_checkpoint
from slm.core.nn.model import CausalLM
from slm.core.tokenizer import Tokenizer


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Returns the model of a checkpoint that slm or transformers saved, in evaluation mode.

    Raises:
        SlmError: If the directory is not a checkpoint, its weights are damaged, or tensors are missing, unknown or of
            another shape than the configuration requires; the message names them.
    """
    config = read_config(path)
    weights = open_weights(path, config)  # before PyTorch: the configuration's sizes may be impossible
    with torch.device("meta"):
        model = CausalLM(config)
    state = {name: torch.from_numpy(weights.float32(name)).to(dtype) for name in tensor_shapes(config)}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def save_checkpoint(path: Path, model: CausalLM, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    """Writes a checkpoint in float32, completely or not at all; a tied head is stored once, as the embedding.

    Args:
        path: The directory to create or replace.
        model: The model; its configuration has the ids of special tokens.
        tokenizer: The tokenizer that the model was trained with.
        info: Metadata for `slm.json`.
    """
    tensors = {
        name: parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        for name, parameter in model.named_parameters()
    }
    write_checkpoint(path, model.config, tensors, tokenizer, info)
