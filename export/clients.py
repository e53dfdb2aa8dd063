"""Files of a bundle for other programs: transformers.js, transformers, and onnxruntime-genai with its derivatives.

docs/clients.md lists which program opens which bundle, and the code that a user writes.
"""

import json
from pathlib import Path
from typing import Any

from slm.core.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE
from slm.core.config import ModelConfig
from slm.core.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, Target
from slm.core.files import read_json
from slm.core.manifest import Manifest, Precision
from slm.core.tokenizer import Tokenizer
from slm.core.tokenizer_config import TOKENIZER_CONFIG_FILE

GENAI_CONFIG_FILE = "genai_config.json"

# transformers.js builds the file names in core.manifest.MODEL_NAMES from these.
_JS_DTYPES: dict[Precision, str] = {"float32": "fp32", "float16": "fp16", "int8": "q8", "int4": "q4"}
# Fields of generation_config.json that have the same names in genai_config.json.
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def write_client_files(directory: Path, config: ModelConfig, manifest: Manifest) -> None:
    """Writes config.json, genai_config.json and tokenizer_config.json for other programs, before the bundle is sealed.

    Args:
        directory: The bundle's directory, with its tokenizer and generation_config.json in it.
        config: The model's shape.
        manifest: The bundle's manifest; `files` is ignored.
    """
    file = directory / GENERATION_CONFIG_FILE
    generation = read_json(file, GENERATION_CONFIG_FILE) if file.is_file() else {}
    _write(directory / CONFIG_FILE, config.to_hf() | {"transformers.js_config": _transformers_js(manifest)})
    _write(directory / GENAI_CONFIG_FILE, _genai(config, manifest, generation))
    file = directory / TOKENIZER_CONFIG_FILE
    if file.is_file():
        tokenizer = Tokenizer.load(directory)
        _write(file, read_json(file, TOKENIZER_CONFIG_FILE) | _tokenizer(manifest.target, tokenizer))


def _tokenizer(target: Target, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the fields to add to tokenizer_config.json."""
    # Without this list, transformers also passes token types, and then refuses to generate.
    fields: dict[str, Any] = {"model_input_names": [INPUT_IDS, ATTENTION_MASK]}
    begins, ends = tokenizer.prefix_ids, tokenizer.suffix_ids
    if len(begins) <= 1:  # onnxruntime-genai ignores tokenizer.json here and adds an end token by default
        fields |= {"add_bos_token": bool(begins), "add_eos_token": bool(ends)}
    if target == "portable":  # rows of a batch must end together, so that all can continue
        fields["padding_side"] = "left"
    return fields


def _transformers_js(manifest: Manifest) -> dict[str, Any]:
    """Returns the default precision for transformers.js, and that the weights are in a separate file."""
    return {"dtype": _JS_DTYPES[manifest.precision], "use_external_data_format": True}


def _genai(config: ModelConfig, manifest: Manifest, generation: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of genai_config.json (onnxruntime.ai/docs/genai/reference/config).

    onnxruntime-genai supports the caches of a fused graph. With a portable graph it is limited to the window, because it
    expects every cache to grow with the sequence.
    """
    windows = {cache.layer: cache.window for cache in manifest.cache if cache.window is not None}
    fused = manifest.target == "fused"
    decoder: dict[str, Any] = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [] if manifest.device == "cpu" else [{manifest.device: {}}],
        },
        "filename": manifest.model,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    if fused and windows:
        decoder["sliding_window"] = {
            "window_size": config.sliding_window,
            "layers": sorted(windows),
            "cache_slack": max(cache.slack for cache in manifest.cache),
            # The attention operator slides the cache.
            "slide_key_value_cache": False,
            "slide_inputs": False,
        }
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = {
        "type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "context_length": manifest.context,
        **{name: token for name, token in tokens.items() if token is not None},  # onnxruntime-genai rejects null
        "decoder": decoder,
    }
    search = {
        "max_length": manifest.context if fused or not windows else min(manifest.context, config.sliding_window),
        "past_present_share_buffer": fused,
        **{name: generation[name] for name in _SEARCH if generation.get(name) is not None},
    }
    return {"model": model, "search": search}


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
