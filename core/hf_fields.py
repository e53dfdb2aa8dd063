"""Reads the fields of a `config.json`: which ones can change what a Gemma 3 model computes.

transformers is the reference. Its `Gemma3TextConfig` keeps every field of the file, and its model uses a fixed set of them.
A field is therefore one of four kinds:

- understood: a field of `ModelConfig`, or another spelling of one.
- rejected: transformers computes something with it that slm does not. Each has a reason. A value that disables the feature
  is accepted.
- harmless: the model does not use it, or only for training, bookkeeping or speed.
- unknown: neither transformers 4.57 nor 5.x uses it. It is accepted and listed, unless its name contains a term of the
  model's computation ("attention", "rope", "expert") and its value enables something. Such a field may come from a newer
  version or from a fork that computes something else. It is rejected, and the hint says how to proceed.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from slm.core.errors import SlmError

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})

# For each rejected field: the values that disable it, and the reason why other values are not supported.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": (_OFF, "slm's projections have no bias"),
    "mlp_bias": (_OFF, "slm's projections have no bias"),
    "final_logit_softcapping": ((None,), "slm does not cap logits"),
    "attn_logit_softcapping": ((None,), "slm does not cap attention scores"),
    "use_bidirectional_attention": (_OFF, "slm's attention is causal"),
    "is_causal": ((None, True), "slm's attention is causal"),
    "is_encoder_decoder": (_OFF, "slm runs decoders"),
    "quantization_config": (_OFF, "the weights are quantized in another tool's format"),
    "compression_config": (_OFF, "the weights are compressed in another tool's format"),
    "per_layer_config": (_OFF, "slm's layers share one configuration"),
    "pruned_heads": (_OFF, "slm does not prune attention heads"),
    "partial_rotary_factor": ((None, 1), "slm rotates whole heads"),
    "position_embedding_type": ((None, "absolute", "rope"), "slm's positions are rotary"),
    "text_config": (_OFF, "the file describes the text model twice"),
}
_HINTS = {
    "quantization_config": "import the unquantized model or a GGUF file of it",
    "compression_config": "import the uncompressed model or a GGUF file of it",
}

# Fields that transformers' text model does not use at inference, or that do not change its logits.
_HARMLESS = frozenset(
    [
        # metadata
        *("architectures", "model_type", "transformers_version", "auto_map", "dtype", "torch_dtype", "name_or_path"),
        *("finetuning_task", "task_specific_params", "tokenizer_class", "transformers.js_config", "custom_pipelines"),
        # transformers' settings for running the model
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_commit_hash"),
        *("_sliding_window_pattern", "attn_implementation", "attn_implementation_autoset"),
        *("experts_implementation", "use_cache", "torchscript", "use_return_dict", "return_dict"),
        *("cache_implementation", "output_hidden_states", "output_attentions"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "use_bfloat16", "tf_legacy_loss", "pretraining_tp"),
        *("tie_last_hidden_states", "keys_to_ignore_at_inference", "loss_type", "attention_dropout", "hidden_dropout"),
        # fields of other architectures, which older versions of transformers write with default values
        *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "prefix"),
        *("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "use_sliding_window"),
        "hidden_act",  # Gemma 3 reads hidden_activation
        # generation settings, which older versions wrote to config.json
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"),
        *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "stop_strings", "penalty_alpha"),
        # the vision part of a multimodal model
        "vision_config",
    ]
)
# Private attributes, tools' own fields, vision and audio fields, token names, dropout, kernels.
_HARMLESS_NAME = re.compile(
    r"_.*|unsloth_.*|(vision|image|audio|video|mm|boi|eoi|boa|eoa)_.*|.*_token(_id|_index)?|.*(dropout|pdrop|flash).*"
)
_COMPUTATION = re.compile(
    r"attn|attention|rope|rotary|position|expert|moe|router|bias|norm|softcap|logit|scal(e|ing|ar)|multiplier|factor|window"
    r"|layer|head|activation|_act$|^act_|residual|embed|mask|causal|sink|mlp|ffn|hidden|altup|laurel|quant|prun|spars|compress",
    re.IGNORECASE,
)


def unread_fields(fields: Mapping[str, Any], understood: Collection[str]) -> tuple[str, ...]:
    """Returns the names of fields that have no effect, except those that transformers writes itself.

    Args:
        fields: The contents of a `config.json`.
        understood: The names of the fields that the caller reads.

    Raises:
        SlmError: If a field would change what the model computes.
    """
    unread = []
    for name, value in fields.items():
        if name in understood or name in _HARMLESS:
            continue
        if name in _REFUSED:
            off, reason = _REFUSED[name]
            if value not in off:
                raise SlmError(
                    f"config.json sets {name}={_short(value)}, which is not supported: {reason}", _HINTS.get(name)
                )
            continue
        if not _HARMLESS_NAME.fullmatch(name) and _COMPUTATION.search(name) and value not in _OFF:
            raise SlmError(
                f"config.json sets {name}={_short(value)}: slm does not know this field, and by its name it may change"
                " what the model computes",
                "transformers' Gemma 3 ignores it; remove it from config.json if the model was trained without it",
            )
        unread.append(name)
    return tuple(unread)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
