"""The model's configuration: the fields of Hugging Face's Gemma 3 text configuration, all explicit and validated.

Hugging Face's `config.json` spells the rotary bases in two ways (`rope_theta` / `rope_local_base_freq` up to transformers
4.57, `rope_parameters` from 5.0), and may give a pattern instead of `layer_types`. slm reads every form. It writes both
spellings and the explicit list, so that both versions load the same model. Missing fields have the defaults of transformers'
`Gemma3TextConfig`: the text part of a multimodal configuration states little more than sizes. `slm.core.hf_fields` decides
which other fields are accepted.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slm.core.errors import SlmError
from slm.core.hf_fields import unread_fields

LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

# The defaults of transformers' Gemma3TextConfig, for fields that a config.json omits; 4.57 and 5.x agree.
HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Larger than the sizes of any model, and within the range of every format that stores them.
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 1024
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
# Older fields, which are converted to layer_types and rope_parameters.
_OLD_SPELLINGS = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
_ROPE_UNREAD = ("original_max_position_embeddings", "type")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LOG = logging.getLogger(__name__)

Activation = Literal["gelu_pytorch_tanh", "gelu", "silu", "relu"]
Dtype = Literal["float32", "float16", "bfloat16"]


class RopeParameters(BaseModel):
    """Rotary embedding of one kind of layer (arXiv:2104.09864).

    The type "linear" divides every frequency by `factor` (arXiv:2306.15595). Gemma 3 from 4B up uses a factor of 8 in its
    global layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_theta: float = Field(gt=0)
    rope_type: Literal["default", "linear"] = "default"
    factor: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope_type == "default" and self.factor != 1:
            raise ValueError(f"a factor of {self.factor:g} needs the rope_type 'linear'")
        return self


class ModelConfig(BaseModel):
    """Configuration of a Gemma 3 text decoder, under Hugging Face's field names (arXiv:2503.19786).

    Attention scores are multiplied by `query_pre_attn_scalar ** -0.5`. `sliding_window` counts positions, the current one
    included: a token attends to itself and to the `sliding_window - 1` tokens before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = Field(gt=0, le=MAX_SIZE)
    hidden_size: int = Field(gt=0, le=MAX_SIZE)
    intermediate_size: int = Field(gt=0, le=MAX_SIZE)
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_attention_heads: int = Field(gt=0, le=MAX_SIZE)
    num_key_value_heads: int = Field(gt=0, le=MAX_SIZE)
    head_dim: int = Field(gt=0, le=MAX_SIZE, multiple_of=2)
    sliding_window: int = Field(gt=0, le=MAX_SIZE)
    layer_types: tuple[LayerType, ...]
    rope_parameters: dict[LayerType, RopeParameters]
    query_pre_attn_scalar: int = Field(gt=0, le=MAX_SIZE)
    max_position_embeddings: int = Field(default=32768, gt=0, le=MAX_SIZE)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    hidden_activation: Activation = "gelu_pytorch_tanh"
    initializer_range: float = Field(default=0.02, gt=0)
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.hidden_size % self.num_attention_heads:
            # slm would not need this, but transformers rejects such a config.json.
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        missing = set(self.layer_types) - set(self.rope_parameters)
        if missing:
            raise ValueError(f"rope_parameters lacks {', '.join(sorted(missing))}")
        if SLIDING in self.rope_parameters and self.rope_parameters[SLIDING].factor != 1:
            # transformers 4.57 cannot express this and would compute something else from the config.json that slm writes.
            raise ValueError("rope_parameters scales sliding layers, but Gemma 3 scales global layers only")
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        for token in self.stop_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"eos_token_id {token} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text, as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def window(self, layer: int) -> int | None:
        """Returns the window of a layer in positions; None for a layer with global attention."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def parameter_count(self) -> int:
        """Returns the number of parameters; a tied head is counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 4 * self.hidden_size + 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + norms) + self.hidden_size

    def to_hf(self, dtype: Dtype = "float32") -> dict[str, Any]:
        """Returns the contents of a `config.json` for which transformers 4.57 and 5.x load the same model.

        Args:
            dtype: The dtype of the stored weights.
        """
        fields = self.model_dump(mode="json")
        for rope in fields["rope_parameters"].values():
            if rope["rope_type"] == "default":
                del rope["factor"]
        old: dict[str, Any] = {}
        if FULL in self.rope_parameters:
            rope = self.rope_parameters[FULL]
            old["rope_theta"] = rope.rope_theta
            if rope.rope_type != "default":
                old["rope_scaling"] = {"rope_type": rope.rope_type, "factor": rope.factor}
        if SLIDING in self.rope_parameters:
            old["rope_local_base_freq"] = self.rope_parameters[SLIDING].rope_theta
        return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"} | fields | old | {"dtype": dtype}

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """Parses the contents of a `config.json`.

        Raises:
            SlmError: If the model is not a Gemma 3 text model, a field is not supported, or fields contradict each other.
        """
        if fields.get("model_type") != "gemma3_text":
            raise SlmError(
                f"config.json describes {fields.get('model_type')!r}, not 'gemma3_text'",
                "slm runs Gemma 3 text models; slm import extracts the text part of a multimodal one",
            )
        understood = (*cls.model_fields, *_OLD_SPELLINGS)
        if unread := cls.unread(fields):
            _LOG.debug("config.json: fields without effect: %r", unread)
        # null means the same as a missing field, except for a special token, which it removes.
        given = {k: fields[k] for k in understood if fields.get(k) is not None or (k in fields and k in _TOKENS)}
        known = HF_DEFAULTS | given
        known["rope_parameters"] = _rope_parameters(known)
        if known.get("layer_types") is None:
            every = given.get("sliding_window_pattern") or 6  # transformers reads no other name for it
            if not isinstance(every, int) or every < 1:
                raise SlmError(f"config.json has sliding_window_pattern={every!r}, which is not a number of layers")
            layers = known["num_hidden_layers"]
            possible = isinstance(layers, int) and layers <= MAX_LAYERS
            known["layer_types"] = layer_pattern(layers, every) if possible else ()
        if "sliding_window" in fields and fields["sliding_window"] is None and SLIDING in known["layer_types"]:
            raise SlmError("config.json has sliding layers but no sliding_window", "transformers cannot run it either")
        for name in _OLD_SPELLINGS:
            known.pop(name, None)
        return cls.checked(known)

    @classmethod
    def unread(cls, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of fields of a `config.json` that have no effect, except those that transformers writes.

        Raises:
            SlmError: If a field would change what the model computes.
        """
        return unread_fields(fields, (*cls.model_fields, *_OLD_SPELLINGS))

    @classmethod
    def checked(cls, fields: Mapping[str, Any]) -> Self:
        """Validates fields; raises the first error as an SlmError."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"the model configuration is invalid: {first_mistake(error)}") from None


def _rope_parameters(fields: Mapping[str, Any]) -> Any:
    """Returns the rotary embeddings of both kinds of layers, from either of transformers' spellings.

    Raises:
        SlmError: If the two spellings differ: transformers 4.57 reads the older one, 5.x the newer one.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(fields.get(name, {}), dict):
            raise SlmError(f"config.json has {name}={fields[name]!r}, which is not an object")
    found: dict[str, Any] = fields.get("rope_parameters", {})
    scaling = dict(fields.get("rope_scaling", {}))
    if scaling.pop("type", "default") != "default" and "rope_type" not in scaling and not found:
        raise SlmError(
            f"config.json has rope_scaling with the type {fields['rope_scaling']['type']!r} but no rope_type",
            "transformers 4.57 scales the positions, 5.x does not; add rope_type if the model was trained with scaling",
        )
    if found and not found.keys() & {FULL, SLIDING}:
        raise SlmError("config.json has rope_parameters without a kind of layer", f"Gemma 3's are {FULL} and {SLIDING}")
    old = {
        FULL: {name: fields[name] for name in ("rope_theta",) if name in fields} | scaling,
        SLIDING: {"rope_theta": fields["rope_local_base_freq"]} if "rope_local_base_freq" in fields else {},
    }
    ropes: dict[str, Any] = {}
    for kind, base in ((FULL, _GLOBAL_BASE), (SLIDING, _LOCAL_BASE)):
        new = found.get(kind) or {}
        if not isinstance(new, dict):
            ropes[kind] = new  # validation rejects it later
            continue
        older = old[kind]
        differing = [name for name, value in older.items() if new.get(name, value) != value]
        if differing:
            raise SlmError(
                f"config.json contradicts itself: for {kind} layers, rope_parameters has"
                f" {differing[0]}={new[differing[0]]!r}, but the older fields have {older[differing[0]]!r}",
                "transformers 4.57 reads rope_theta, rope_local_base_freq and rope_scaling, 5.x rope_parameters; keep one",
            )
        known = {"rope_theta": base} | older | {name: value for name, value in new.items() if value is not None}
        # Fields that these two types of scaling do not use.
        ropes[kind] = {name: value for name, value in known.items() if name not in _ROPE_UNREAD}
    return ropes


# A part of pydantic's errors about nested settings.
_CLASS = re.compile(r" or instance of \w+")
# Pydantic's terms from Python, and plain replacements for users.
_PLAIN = {
    "Input should be": "must be",
    "a valid tuple": "a list, as in [a, b]",
    "a valid list": "a list, as in [a, b]",
    "a valid dictionary": "a mapping, as in {a: b}",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "Tuple should": "must",
    " after validation": "",
}


def first_mistake(error: ValidationError) -> str:
    """Returns the first error of a validation in one line: the field and the problem."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    for python, plain in _PLAIN.items():
        what = what.replace(python, plain)
    what = _CLASS.sub("", what)
    return f"{where}: {what}" if where else what


def layer_pattern(layers: int, every: int = 6) -> tuple[LayerType, ...]:
    """Returns Gemma 3's layer types: one global layer after `every - 1` sliding layers."""
    return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(layers))
