"""The model's shape: the fields of Hugging Face's Gemma 3 text configuration, strict and with nothing implied.

Hugging Face's `config.json` has had two spellings of the rotary bases (`rope_theta` / `rope_local_base_freq` up to
transformers 4.57, `rope_parameters` from 5.0) and lets `layer_types` be implied by a pattern. Both are read; what is
written carries both spellings and the explicit list, so that either version sees the same model.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slm.core.errors import SlmError

LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

# Fields of config.json that do not change what the model computes at inference.
_INERT = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "cache_implementation",
        "attention_dropout",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "_name_or_path",
        "transformers.js_config",
    ]
)
# Fields that would change it, with the only value that this implementation computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
}


class RopeParameters(BaseModel):
    """Rotary embedding of one kind of layer (arXiv:2104.09864)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rope_theta: float = Field(gt=0)
    rope_type: Literal["default"] = "default"


class ModelConfig(BaseModel):
    """Shape of a Gemma 3 text decoder, under Hugging Face's field names (arXiv:2503.19786).

    `query_pre_attn_scalar` is the number whose inverse square root scales the attention scores. `sliding_window`
    counts positions, the current one included: a token sees itself and the `sliding_window - 1` before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    sliding_window: int = Field(gt=0)
    layer_types: tuple[LayerType, ...]
    rope_parameters: dict[LayerType, RopeParameters]
    query_pre_attn_scalar: int = Field(gt=0)
    max_position_embeddings: int = Field(default=32768, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
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
        missing = set(self.layer_types) - set(self.rope_parameters)
        if missing:
            raise ValueError(f"rope_parameters lacks {', '.join(sorted(missing))}")
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
        """The tokens that end a text, however `eos_token_id` spells them."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def window(self, layer: int) -> int | None:
        """Returns the window of a layer in positions, None for a layer that sees everything."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def parameter_count(self) -> int:
        """Returns the number of parameters, a tied head counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 4 * self.hidden_size + 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + norms) + self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` that transformers 4.57 and 5.x read alike."""
        fields = self.model_dump(mode="json")
        old_rope = {"rope_theta": FULL, "rope_local_base_freq": SLIDING}
        bases = {
            name: self.rope_parameters[kind].rope_theta
            for name, kind in old_rope.items()
            if kind in self.rope_parameters
        }
        return (
            {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
            | fields
            | bases
            | {"dtype": "float32"}
        )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the contents of a `config.json`.

        Raises:
            SlmError: When it is not a Gemma 3 text model, or names something that would be computed wrongly.
        """
        if fields.get("model_type") != "gemma3_text":
            raise SlmError(
                f"config.json describes {fields.get('model_type')!r}, not 'gemma3_text'",
                "slm runs Gemma 3 text models",
            )
        for name, allowed in _FIXED.items():
            if fields.get(name) not in allowed:
                raise SlmError(f"config.json asks for {name}={fields[name]!r}, which slm does not compute")
        known = {k: v for k, v in fields.items() if k not in _INERT and k not in _FIXED}
        full, sliding = known.pop("rope_theta", 1e6), known.pop("rope_local_base_freq", 1e4)
        if known.get("rope_parameters") is None:
            known["rope_parameters"] = {FULL: {"rope_theta": full}, SLIDING: {"rope_theta": sliding}}
        if known.get("layer_types") is None and "num_hidden_layers" in known:
            every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6
            known["layer_types"] = layer_pattern(known["num_hidden_layers"], every)
        return cls.checked(known)

    @classmethod
    def checked(cls, fields: Mapping[str, Any]) -> Self:
        """Validates, with the first mistake as an SlmError."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"the model configuration is wrong: {first_mistake(error)}") from None


def first_mistake(error: ValidationError) -> str:
    """Returns the first mistake of a validation as one line: where, what, and what was given."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def layer_pattern(layers: int, every: int = 6) -> tuple[LayerType, ...]:
    """Returns Gemma 3's pattern: each `every`-th layer sees everything, the others slide."""
    return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(layers))
