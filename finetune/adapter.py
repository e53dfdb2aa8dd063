"""LoRA through peft on `CausalLM`: attaching, saving and loading an adapter.

Its tensors are called `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` and so on, the names that PEFT
gives them on transformers' Gemma 3, so that `peft.PeftModel.from_pretrained` puts them there.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from slm.core.checkpoint import check_tensors
from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import check_readable, read_json
from slm.core.nn import CausalLM
from slm.finetune.settings import FinetuneSettings

# What peft calls an adapter that nobody names.
ADAPTER = "default"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

# In a regular expression: matching so many with a name as long as modules have takes a tenth of a second at most.
_MOST_REPETITIONS = 5

# Fields of adapter_config.json that do not change what the adapter computes.
_INERT = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}


class _AdapterFields(BaseModel):
    """The fields of adapter_config.json that are followed.

    Every other one must be at peft's default: some change the arithmetic in ways that no test here covers, and one names
    a module to import.
    """

    model_config = ConfigDict(strict=True)

    r: int = Field(ge=1)
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class TunableLM(nn.Module):
    """A `CausalLM`'s two children under the same names, with what peft expects of a model beside them.

    peft replaces modules inside the children, so the `CausalLM` itself changes with them.
    """

    # peft would make the embedding's output require a gradient, which only gradient checkpointing needs.
    is_gradient_checkpointing = False

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        # The head's matrix as products take it, where that is another one; see `slm.finetune.frozen`.
        self.head_weight: Tensor | None = None
        # A plain dictionary is what peft takes where there is no transformers configuration.
        self.config = model.config.to_hf()
        tied = model.config.tie_word_embeddings
        # Read by peft, so that trained rows of a tied embedding are the head's rows too.
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, which peft wraps when rows of it are trained."""
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        """Maps ids (B, T) to logits (B, T, V)."""
        out: Tensor = self.lm_head(self.model(input_ids))
        return out


def attach(model: CausalLM, settings: FinetuneSettings, base: Path, token_ids: Sequence[int] = ()) -> PeftModel:
    """Puts a fresh adapter, which changes nothing yet, on a model and freezes everything else.

    Args:
        model: The base; its modules are wrapped in place.
        settings: Rank, scale, dropout and which projections.
        base: The base's directory, recorded for `AutoPeftModelForCausalLM`.
        token_ids: Rows of the embedding, and of the head, that are trained with the adapter.
    """
    rows = list(token_ids)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=list(settings.target_modules),
        # A head that is not tied has rows of its own for the same tokens.
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
    """Returns the matrix (V, D) of an embedding or a head, and the ids and rows (R, D) that stand in place of some of its."""
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
    # peft keeps target_modules in a set, whose order differs from one process to the next.
    text = json.dumps(fields, indent=2, sort_keys=True, default=sorted)
    (directory / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def is_adapter(path: Path) -> bool:
    """Says whether a directory looks like an adapter."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def load_adapter(model: CausalLM, path: Path) -> PeftModel:
    """Puts a saved LoRA adapter on a model, from safetensors only.

    Raises:
        SlmError: When the directory is not a LoRA adapter, its file is damaged, its tensors do not fit the model, or
            its configuration asks for something that slm does not compute; it is named.
    """
    config = _read_config(path)
    check_readable(path / ADAPTER_WEIGHTS_FILE, "the adapter")
    try:
        tensors = safetensors.torch.load_file(path / ADAPTER_WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise SlmError(
            f"cannot read the adapter: {path / ADAPTER_WEIGHTS_FILE} ({error})", "copy or train it again"
        ) from None
    try:
        adapter = PeftModel(TunableLM(model.requires_grad_(False)), config)
    except (ValueError, TypeError, KeyError, IndexError) as error:  # target modules or token rows that the model lacks
        raise SlmError(f"the adapter does not fit the model: {path} ({error})") from None
    head = adapter.get_base_model().lm_head
    if model.config.tie_word_embeddings and any(isinstance(m, LoraLayer) for m in (model.model.embed_tokens, head)):
        # The two would get different updates, which one shared matrix cannot hold.
        raise SlmError(f"{path}: the adapter changes the embedding or the head, and the base ties the two")
    wanted = adapter_state(adapter)
    check_tensors({n: tuple(t.shape) for n, t in tensors.items()}, {n: tuple(t.shape) for n, t in wanted.items()}, path)
    load_state(adapter, {name: tensor.float() for name, tensor in tensors.items()})
    return adapter.eval()


def _check_pattern(pattern: str, file: Path) -> None:
    """Makes sure that a regular expression, which peft matches with every module's name, is one and takes no time.

    Time grows without bound where what is repeated holds a repetition, and with the number of repetitions.

    Raises:
        SlmError: When it is none, or may take long.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise SlmError(f"{file} is wrong: {pattern!r} is no regular expression ({error})") from None
    repetitions = re.findall(r"[*+{]|(?<![*+}(])[?]", pattern)
    if len(repetitions) > _MOST_REPETITIONS or re.search(r"[)][*+{]", pattern):
        raise SlmError(f"{file}: the regular expression {pattern!r} may take very long", "list the modules instead")


def _read_config(path: Path) -> LoraConfig:
    if not is_adapter(path):
        kind = "not found" if not path.exists() else "not an adapter"
        hint = (
            f"an adapter is a directory with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}; slm finetune makes one"
        )
        raise SlmError(f"{kind}: {path}", hint)
    fields = read_json(path / ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise SlmError(f"{path}: an adapter of type {fields.get('peft_type')!r}, not 'LORA'")
    default = LoraConfig().to_dict()
    for name, value in fields.items():
        followed = name in _AdapterFields.model_fields or name in _INERT
        if not followed and value != default.get(name) and value not in (None, False, [], {}):
            raise SlmError(f"{path}: the adapter asks for {name}={value!r}, which slm does not compute")
    try:
        followed_fields = _AdapterFields.model_validate(fields)
    except ValidationError as error:
        raise SlmError(f"{path / ADAPTER_CONFIG_FILE} is wrong: {first_mistake(error)}") from None
    patterns = [*followed_fields.rank_pattern, *followed_fields.alpha_pattern]
    if isinstance(followed_fields.target_modules, str):
        patterns.append(followed_fields.target_modules)
    for pattern in patterns:
        _check_pattern(pattern, path / ADAPTER_CONFIG_FILE)
    return LoraConfig(**followed_fields.model_dump(), inference_mode=True, task_type=TaskType.CAUSAL_LM)
