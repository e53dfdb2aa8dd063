"""The configuration: strict, exact about sizes, and able to read both of transformers' spellings."""

from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from slm.core.config import FULL, HF_DEFAULTS, SLIDING, ModelConfig, RopeParameters, layer_pattern
from slm.core.errors import SlmError
from slm.core.hf_fields import unread_fields
from slm.core.nn import CausalLM
from slm.core.presets import PRESETS, preset

# Computed by hand from the shapes (docs/model.md shows the sum) and, for the 270M shape with GPT-2's exact vocabulary,
# published elsewhere as 132,490,496.
PARAMETERS = {
    "gemma3-270m": 132_520_576,
    "stories-4m": 4_398_080,
    "tiny": 1_511_296,
    "1m": 1_019_776,
    "10m": 10_106_624,
    "30m": 28_975_872,
    "100m": 102_277_120,
    "270m-wide": 268_643_584,
    "1b": 976_630_528,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    config = preset(name)
    with __import__("torch").device("meta"):
        model = CausalLM(config)
    assert config.parameter_count() == PARAMETERS[name] == sum(p.numel() for p in model.parameters())


def test_the_270m_preset_is_gemma3_270m() -> None:
    config = preset("gemma3-270m")
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == [5, 11, 17]
    assert (config.sliding_window, config.num_key_value_heads, config.head_dim) == (512, 1, 256)
    assert {kind: rope.rope_theta for kind, rope in config.rope_parameters.items()} == {SLIDING: 1e4, FULL: 1e6}
    gpt2_exactly = config.model_copy(update={"vocab_size": 50_257})
    assert gpt2_exactly.parameter_count() == 132_490_496
    assert gpt2_exactly.model_copy(update={"tie_word_embeddings": False}).parameter_count() == 164_654_976


BASE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
# The older spelling left out.
NEW_ALONE: dict[str, Any] = {"rope_theta": None, "rope_local_base_freq": None}
LINEAR = BASE | {"rope_type": "linear", "factor": 8.0}


def test_what_is_left_out_is_what_transformers_takes() -> None:
    theirs = transformers.Gemma3TextConfig()
    assert {name: getattr(theirs, name) for name in HF_DEFAULTS} == HF_DEFAULTS
    ours = ModelConfig.from_hf({"model_type": "gemma3_text"})
    assert list(ours.layer_types) == theirs.layer_types
    assert {kind: rope.rope_theta for kind, rope in ours.rope_parameters.items()} == {
        kind: rope["rope_theta"] for kind, rope in theirs.rope_parameters.items()
    }


@pytest.mark.parametrize("spelling", ["old", "both", "new"])
def test_stretched_positions_in_every_spelling(config: ModelConfig, spelling: str) -> None:
    fields = config.to_hf()
    if spelling == "new":
        fields["rope_parameters"][FULL] |= {"rope_type": "linear", "factor": 8.0}
    else:
        del fields["rope_parameters"]
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
        if spelling == "both":
            fields["rope_scaling"]["type"] = "linear"
    read = ModelConfig.from_hf(fields)
    assert read.rope_parameters[FULL] == RopeParameters(rope_theta=10_000.0, rope_type="linear", factor=8.0)
    assert read.rope_parameters[SLIDING] == config.rope_parameters[SLIDING]
    assert ModelConfig.from_hf(read.to_hf()) == read
    del (written := read.to_hf())["rope_parameters"]  # what transformers 4.57 looks at
    assert ModelConfig.from_hf(written) == read


def test_round_trip_through_hugging_face(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_reads_the_old_spelling(config: ModelConfig) -> None:
    fields = config.to_hf()
    del fields["rope_parameters"], fields["layer_types"]
    fields["sliding_window_pattern"] = 3
    read = ModelConfig.from_hf(fields)
    assert read.rope_parameters == config.rope_parameters
    assert read.layer_types == layer_pattern(4, 3) == (SLIDING, SLIDING, FULL, SLIDING)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": [SLIDING]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": ["linear"] * 4}, "layer_types.0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_activation": "mish"}, "hidden_activation"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "rope_parameters": None}, "rope_type"),
        ({"rope_parameters": {k: LINEAR for k in (SLIDING, FULL)}} | NEW_ALONE, "scales sliding layers"),
        (
            {"rope_parameters": {SLIDING: BASE, FULL: BASE | {"factor": 2.0}}} | NEW_ALONE,
            "needs the rope_type 'linear'",
        ),
        (
            {"rope_theta": 5e5},
            "full_attention layers, rope_parameters has rope_theta=10000.0, but the older fields have 5",
        ),
        ({"rope_local_base_freq": 5e5}, "for sliding_attention layers, rope_parameters has rope_theta=100.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "contradicts itself"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": None}, "'linear' but no rope_type"),
        ({"sliding_window": None}, "no sliding_window"),
        ({"use_bidirectional_attention": True}, "is causal"),
        ({"is_causal": False}, "is causal"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config=.*quantized"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "per_layer_config"),
        # not known to transformers, and named like a part of the computation
        ({"attention_sink_size": 4}, "attention_sink_size=4"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"eos_token_id": 320}, "eos_token_id 320"),
        ({"model_type": "llama"}, "'llama'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(config: ModelConfig, change: dict[str, Any], said: str) -> None:
    with pytest.raises(SlmError, match=said):
        ModelConfig.from_hf(config.to_hf() | change)


INERT: dict[str, Any] = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.8.1",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "attn_implementation": "eager",
    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
    "_commit_hash": "0f",
    "_sliding_window_pattern": 2,  # transformers reads layer_types
    "use_sliding_window": False,
    "hidden_act": "silu",  # transformers reads hidden_activation
    "torch_dtype": "bfloat16",
    "temperature": 0.5,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "vision_config": {"hidden_size": 1152},
    "mm_tokens_per_image": 256,
    "boi_token_index": 255_999,
    "image_token_index": 262_144,
    "num_labels": 3,
    "id2label": {"0": "A"},
    "surprise": {"made by": "a tool"},
    "quantization_config": None,
    "mlp_bias": False,
    "num_experts": 0,
    "attn_logit_softcapping": None,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": None,  # null is a field that is left out
}


@pytest.mark.parametrize("name", INERT)
@torch.no_grad()
def test_a_field_that_changes_nothing_is_accepted(config: ModelConfig, name: str) -> None:
    """transformers computes the same with it: that is what makes it harmless."""
    fields = config.to_hf()
    plain = {k: v for k, v in fields.items() if k != name}
    assert ModelConfig.from_hf(fields | {name: INERT[name]}) == ModelConfig.from_hf(plain)
    if name in ("_flash_attn_2_enabled", "_attn_implementation", "quantization_config", "max_position_embeddings"):
        return  # transformers needs a kernel for the one, and rejects null for the others
    logits = []
    for each in (plain, plain | {name: INERT[name]}):
        torch.manual_seed(0)
        read = transformers.Gemma3TextConfig.from_dict({k: v for k, v in each.items() if k != "auto_map"})
        logits.append(transformers.Gemma3ForCausalLM(read).eval()(torch.arange(40)[None]).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)  # another attention kernel adds in another order


def test_what_is_accepted_unread_is_listed(config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    fields = config.to_hf() | {"unsloth_fixed": True, "surprise": 1}
    assert unread_fields(fields, ModelConfig.model_fields | {"rope_theta": 0, "rope_local_base_freq": 0}) == (
        "unsloth_fixed",
        "surprise",
    )
    with caplog.at_level("DEBUG"):
        ModelConfig.from_hf(fields)
    assert "'unsloth_fixed', 'surprise'" in caplog.text


def test_rope_parameters_that_leave_something_out(config: ModelConfig) -> None:
    """As transformers: what one spelling leaves out comes from the other, then from the default."""
    fields = {k: v for k, v in config.to_hf().items() if k not in ("rope_theta", "rope_local_base_freq")}
    fields["rope_parameters"] = {FULL: {"rope_type": "linear", "factor": 2.0}}
    ours = ModelConfig.from_hf(fields).rope_parameters
    theirs = transformers.Gemma3TextConfig.from_dict(fields).rope_parameters
    assert ours[FULL] == RopeParameters(rope_theta=1e6, rope_type="linear", factor=2.0)
    assert {kind: rope.rope_theta for kind, rope in ours.items()} == {
        kind: rope["rope_theta"] for kind, rope in theirs.items()
    }


def test_is_frozen(config: ModelConfig) -> None:
    with pytest.raises(ValidationError):
        config.hidden_size = 1  # type: ignore[misc]


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(SlmError) as caught:
        preset("huge")
    assert caught.value.hint is not None and "gemma3-270m" in caught.value.hint
