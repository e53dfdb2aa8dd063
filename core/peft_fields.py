"""What a PEFT `adapter_config.json` says, for every path that uses an adapter.

The merged path (`finetune/merge.py`) and the slots (`interchange/onnx_adapter.py`) read adapters here, so that they accept
and refuse the same ones. Fields are of three kinds:

- understood: `AdapterFields` has them.
- harmless: they say how the adapter was trained or initialised, or where its base was.
- refused: PEFT would compute something else with them than slm does. Each has a reason, and a value that switches the
  feature off is accepted. A field that is not known is refused too, unless it is off: PEFT's new fields are kinds of LoRA.
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
# PEFT's name for every linear layer but the head.
ALL_LINEAR = "all-linear"

_HARMLESS = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "lora_dropout", "megatron_core", "qalora_group_size"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "ensure_weight_tying"),
        "bias",  # trained biases would be tensors of the file, and Gemma 3 has none
        "fan_in_fan_out",  # PEFT switches it off for the layers that Gemma 3 has
    ]
)
_HARMLESS_NAME = re.compile(r"_.*|unsloth_.*")
_MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload, save_pretrained), then slm import"
_REFUSED = {
    "lora_bias": "slm's products have no bias",
    "modules_to_save": "it replaces whole modules of the base",
    "layer_replication": "it changes the number of layers",
    "target_parameters": "it adapts parameters that are no products",
    "alora_invocation_tokens": "it is active after some tokens only",
    "use_qalora": "slm does not compute QALoRA",
    "use_bdlora": "slm does not compute block-diagonal LoRA",
    "arrow_config": "slm does not compute Arrow's routing",
    "kasa_config": "KaSA truncates the base's weights",
    "velora_config": "slm does not compute VeLoRA",
    "monteclora_config": "slm does not compute MonteCLoRA",
    "megatron_config": "it is for Megatron's layers",
}
# Initialisations that leave the base's weights as they are. The others subtract what they put into the adapter from the
# base, so that an adapter that was saved as trained belongs to another base than the one it names.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# More than the largest model has modules, or anybody trains rows.
_MOST_NAMES = 4_000
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


class AdapterFields(BaseModel):
    """The fields that say what an adapter computes, at PEFT's defaults where the file leaves them out.

    `rank_pattern` and `alpha_pattern` have regular expressions; see `slm.core.name_patterns`.
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
        """Says whether the adapter is for a module, by PEFT's rule.

        A regular expression counts as one that matches: the tensors' names say which modules are meant. Where it can be
        matched in bounded time, `slm.core.peft_adapter` compares the two.
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
    """Says whether a directory looks like PEFT's."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def read_adapter_fields(path: Path) -> AdapterFields:
    """Reads the `adapter_config.json` of a directory.

    Raises:
        SlmError: When it is not LoRA's, is damaged, or asks for something that slm does not compute; it is named.
    """
    fields = read_json(path / ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise SlmError(f"{path}: an adapter of type {fields.get('peft_type')!r}, not 'LORA'")
    for name, value in fields.items():
        if name in AdapterFields.model_fields or name in _HARMLESS or _HARMLESS_NAME.fullmatch(name) or value in _OFF:
            continue
        if name == "init_lora_weights":
            _check_initialisation(path, value)
            continue
        reason = _REFUSED.get(
            name, "slm does not know this field, and PEFT's new fields change what an adapter computes"
        )
        raise SlmError(f"{path}: the adapter asks for {name}={_short(value)}: {reason}", _MERGE_WITH_PEFT)
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "trainable_token_indices"):
        if isinstance(fields.get(name), list) and len(fields[name]) > _MOST_NAMES:
            raise SlmError(f"{path}: {name} has {len(fields[name]):,} entries, at most {_MOST_NAMES:,}")
    # null is the same as a field that is left out.
    given = {name: fields[name] for name in AdapterFields.model_fields if fields.get(name) is not None}
    try:
        return AdapterFields.model_validate(given)
    except ValidationError as error:
        raise SlmError(f"{path / ADAPTER_CONFIG_FILE} is wrong: {first_mistake(error)}") from None


def _check_initialisation(path: Path, value: Any) -> None:
    if value not in _PLAIN_INITIALISATIONS:
        raise SlmError(
            f"{path}: the adapter asks for init_lora_weights={_short(value)}: it belongs to a base from which that"
            " initialisation was subtracted",
            "save it with path_initial_model_for_weight_conversion, as PEFT's documentation of the method says",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
