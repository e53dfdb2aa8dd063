"""Reads PEFT's `adapter_config.json`; every function that uses an adapter reads it here.

Merging (`finetune/merge.py`) and adapter slots (`interchange/onnx_adapter.py`) therefore accept and reject the same adapters.
A field is one of three kinds:

- understood: a field of `AdapterFields`.
- harmless: it describes training, initialisation or the path of the base model.
- rejected: PEFT computes something with it that slm does not. Each has a reason. A value that disables the feature is
  accepted. Unknown fields are rejected too, unless their value disables them: PEFT's new fields are variants of LoRA.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm.core.config import first_mistake
from slm.core.errors import SlmError
from slm.core.files import read_json

ADAPTER_CONFIG_FILE = "adapter_config.json"
# PEFT's name for every linear layer except the head.
ALL_LINEAR = "all-linear"

_HARMLESS = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "lora_dropout", "megatron_core", "qalora_group_size"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "ensure_weight_tying"),
        "bias",  # trained biases would be tensors in the file, and Gemma 3 has none
        "fan_in_fan_out",  # PEFT disables it for Gemma 3's layers
    ]
)
_HARMLESS_NAME = re.compile(r"_.*|unsloth_.*")
_MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload, save_pretrained), then slm import"
_REFUSED = {
    "lora_bias": "slm's products have no bias",
    "modules_to_save": "it replaces whole modules of the base",
    "layer_replication": "it changes the number of layers",
    "target_parameters": "it adapts parameters that are not matrices of linear layers",
    "alora_invocation_tokens": "it activates the adapter after certain tokens only",
    "use_qalora": "slm does not compute QALoRA",
    "use_bdlora": "slm does not compute block-diagonal LoRA",
    "arrow_config": "slm does not compute Arrow's routing",
    "kasa_config": "KaSA truncates the base's weights",
    "velora_config": "slm does not compute VeLoRA",
    "monteclora_config": "slm does not compute MonteCLoRA",
    "megatron_config": "it is for Megatron's layers",
}
# Initialisations that do not change the base's weights. The others subtract the adapter's initial value from the base, so
# an adapter saved as trained does not fit the base model that it names.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Higher than the number of modules in the largest model, and than the number of rows in real adapters.
_MOST_NAMES = 4_000
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


class AdapterFields(BaseModel):
    """The fields that define what an adapter computes; missing fields have PEFT's defaults.

    The keys of `rank_pattern` and `alpha_pattern` are regular expressions; see `slm.core.name_patterns`.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    r: int = Field(default=8, ge=1)
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def targets(self, module: str) -> bool:
        """Returns whether the adapter targets a module, by PEFT's rules.

        If `target_modules` is a regular expression, the result is True: the names of the tensors define the modules.
        `slm.core.peft_adapter` compares the two if the expression can be matched in bounded time.
        """
        if isinstance(self.exclude_modules, list) and _among(module, self.exclude_modules):
            return False
        if isinstance(self.target_modules, str):
            return True
        if not _among(module, self.target_modules):
            return False
        layers, layer = self.layers_to_transform, re.match(r".*?\.[^.]*\.(\d+)\.", module)
        if layers is None or layers == [] or self.layers_pattern not in (None, "", [], "layers", ["layers"]):
            return True
        wanted = [layers] if isinstance(layers, int) else layers
        return layer is not None and int(layer.group(1)) in wanted


def _among(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_adapter(path: Path) -> bool:
    """Returns whether a directory contains PEFT's `adapter_config.json`."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def read_adapter_fields(path: Path) -> AdapterFields:
    """Reads the `adapter_config.json` of a directory.

    Raises:
        SlmError: If it is not LoRA's, is damaged, or sets a field that is not supported; the message names the field.
    """
    fields = read_json(path / ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise SlmError(f"{path}: adapters of type {fields.get('peft_type')!r} are not supported, only 'LORA'")
    for name, value in fields.items():
        if name in AdapterFields.model_fields or name in _HARMLESS or _HARMLESS_NAME.fullmatch(name) or value in _OFF:
            continue
        if name == "init_lora_weights":
            _check_initialisation(path, value)
            continue
        reason = _REFUSED.get(
            name, "slm does not know this field, and PEFT's new fields change what an adapter computes"
        )
        raise SlmError(
            f"{path}: the adapter sets {name}={_short(value)}, which is not supported: {reason}", _MERGE_WITH_PEFT
        )
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "trainable_token_indices"):
        if isinstance(fields.get(name), list) and len(fields[name]) > _MOST_NAMES:
            raise SlmError(f"{path}: {name} has {len(fields[name]):,} entries; the limit is {_MOST_NAMES:,}")
    # null means the same as a missing field.
    given = {name: fields[name] for name in AdapterFields.model_fields if fields.get(name) is not None}
    try:
        return AdapterFields.model_validate(given)
    except ValidationError as error:
        raise SlmError(f"{path / ADAPTER_CONFIG_FILE} is invalid: {first_mistake(error)}") from None


def _check_initialisation(path: Path, value: Any) -> None:
    if value not in _PLAIN_INITIALISATIONS:
        raise SlmError(
            f"{path}: the adapter sets init_lora_weights={_short(value)}, so it needs a base from which that initialisation"
            " was subtracted",
            "save it with path_initial_model_for_weight_conversion; see PEFT's documentation of the method",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
