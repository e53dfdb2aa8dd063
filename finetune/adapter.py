"""LoRA on `CausalLM` through peft: attaching, saving and loading adapters.

Tensors have the names that PEFT gives them on transformers' Gemma 3, such as
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, so that `peft.PeftModel.from_pretrained` loads them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from slm.core.checkpoint import check_tensors
from slm.core.errors import SlmError
from slm.core.manifest import Scheme
from slm.core.nn import CausalLM
from slm.core.peft_adapter import ADAPTER_WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from slm.core.peft_adapter import PeftAdapter, read_peft_adapter
from slm.core.peft_fields import ADAPTER_CONFIG_FILE as ADAPTER_CONFIG_FILE
from slm.core.peft_fields import is_adapter as is_adapter
from slm.finetune.settings import FinetuneSettings

# peft's default name of an adapter.
ADAPTER = "default"
_PREFIX = "base_model.model."
_PRODUCT_KINDS = ("lora_A.weight", "lora_B.weight")


class TunableLM(nn.Module):
    """The two children of a `CausalLM` under the same names, with the attributes that peft expects of a model.

    peft replaces modules inside the children, so the `CausalLM` changes with them.
    """

    # If true, peft makes the embedding's output require a gradient, which only gradient checkpointing needs.
    is_gradient_checkpointing = False

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        # The head's matrix in the type of the products, if it differs; see `slm.finetune.frozen`.
        self.head_weight: Tensor | None = None
        # The grid of embedding and head in quantization-aware training; see `slm.finetune.on_grid`.
        self.head_scheme: Scheme | None = None
        # peft accepts a plain dictionary in place of a transformers configuration.
        self.config = model.config.to_hf()
        tied = model.config.tie_word_embeddings
        # peft reads this, so that trained rows of a tied embedding are the head's rows too.
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, which peft wraps when rows of it are trained."""
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ids (B, T) to logits (B, T, V)."""
        out: Tensor = self.lm_head(self.model(input_ids))
        return out


def attach(model: CausalLM, settings: FinetuneSettings, base: Path, token_ids: Sequence[int] = ()) -> PeftModel:
    """Attaches a new adapter, which does not change the output yet, and freezes all other weights.

    Args:
        model: The base; its modules are wrapped in place.
        settings: Rank, scale, dropout and target modules.
        base: The base's directory, recorded for `AutoPeftModelForCausalLM`.
        token_ids: Tokens whose rows of the embedding, and of the head, are trained with the adapter.
    """
    rows = list(token_ids)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=list(settings.target_modules),
        # An untied head has its own rows for these tokens.
        trainable_token_indices=_token_indices(model, rows),
        base_model_name_or_path=str(base.resolve()),
        task_type=TaskType.CAUSAL_LM,
    )
    return PeftModel(TunableLM(model.requires_grad_(False)), config)


def _token_indices(model: CausalLM, rows: list[int]) -> list[int] | dict[str, list[int]] | None:
    if not rows:
        return None
    return rows if model.config.tie_word_embeddings else {"embed_tokens": rows, "lm_head": rows}


def trained_rows(module: nn.Module) -> tuple[Tensor, tuple[list[int], Tensor] | None]:
    """Returns the matrix (V, D) of an embedding or head, and the ids and rows (R, D) that replace some of its rows."""
    if not isinstance(module, TrainableTokensWrapper):
        weight: Tensor = module.weight  # type: ignore[assignment]  # an embedding's or a linear layer's
        return weight, None
    tokens = module.token_adapter
    return tokens.base_layer.weight, (list(tokens.token_indices[ADAPTER]), tokens.trainable_tokens_delta[ADAPTER])


def adapter_state(adapter: PeftModel) -> dict[str, Tensor]:
    """Returns the adapter's tensors under the names of its file; they share memory with the model."""
    state: dict[str, Tensor] = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    return state


def load_state(adapter: PeftModel, state: dict[str, Tensor]) -> None:
    """Copies an adapter's tensors into the model."""
    set_peft_model_state_dict(adapter, state)


def save_adapter(directory: Path, adapter: PeftModel, state: dict[str, Tensor]) -> None:
    """Writes PEFT's two files into a directory, with the tensors in float32."""
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    fields = adapter.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    # peft keeps target_modules in a set, whose order differs between processes.
    text = json.dumps(fields, indent=2, sort_keys=True, default=sorted)
    (directory / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8", newline="")


def load_adapter(model: CausalLM, path: Path) -> PeftModel:
    """Attaches a saved LoRA adapter to a model; reads safetensors only.

    Raises:
        SlmError: As `slm.core.peft_adapter.read_peft_adapter`, and when the adapter replaces the embedding or the head.
    """
    read = read_peft_adapter(path, model.config)
    matrices = {"model.embed_tokens": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight}
    for name, copy in read.copies.items():
        if not torch.equal(matrices[name].detach(), torch.from_numpy(copy)):
            raise SlmError(
                f"{path} replaces the matrix of {name}, which is not the base's",
                "merge it with PEFT (merge_and_unload, save_pretrained), then slm import",
            )
    adapter = PeftModel(TunableLM(model.requires_grad_(False)), _lora_config(read))
    state = _state(read)
    wanted = adapter_state(adapter)
    check_tensors({n: tuple(t.shape) for n, t in state.items()}, {n: tuple(t.shape) for n, t in wanted.items()}, path)
    load_state(adapter, state)
    return adapter.eval()


def _lora_config(read: PeftAdapter) -> LoraConfig:
    """Returns the configuration that attaches modules of the same ranks and scales to a model.

    It names each module, so that peft matches no regular expression from the file.
    """
    fields, updates = read.fields, read.updates | read.embedding
    return LoraConfig(
        r=fields.r,
        lora_alpha=fields.lora_alpha,
        use_rslora=fields.use_rslora,
        use_dora=fields.use_dora,
        target_modules=list(updates),
        rank_pattern={re.escape(name): each.rank for name, each in updates.items() if each.rank != fields.r},
        alpha_pattern={
            re.escape(name): each.alpha for name, each in updates.items() if each.alpha != fields.lora_alpha
        },
        trainable_token_indices=fields.trainable_token_indices,
        inference_mode=True,
        task_type=TaskType.CAUSAL_LM,
    )


def _state(read: PeftAdapter) -> dict[str, Tensor]:
    """Returns the tensors under peft's names."""
    arrays: dict[str, Any] = {}
    for name, each in read.updates.items():
        arrays |= {f"{name}.lora_A.weight": each.low, f"{name}.lora_B.weight": each.high}
        if each.magnitude is not None:
            arrays[f"{name}.lora_magnitude_vector"] = each.magnitude
    for name, each in read.embedding.items():
        # The matrices of an embedding are parameters of the layer itself; a head is a linear layer like the others.
        kinds = ("lora_embedding_A", "lora_embedding_B") if name == "model.embed_tokens" else _PRODUCT_KINDS
        arrays |= {f"{name}.{kind}": array for kind, array in zip(kinds, (each.low, each.high), strict=True)}
        if each.magnitude is not None:
            arrays[f"{name}.lora_magnitude_vector"] = each.magnitude
    arrays |= {f"{name}.token_adapter.trainable_tokens_delta": rows for name, rows in read.rows.items()}
    return {f"{_PREFIX}{name}": torch.from_numpy(array) for name, array in arrays.items()}
