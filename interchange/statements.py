"""Contradictions between the files of a Hugging Face directory, and how they are resolved.

transformers 5 is the reference: if it resolves a contradiction without an error, slm does the same and reports it. If two
versions of transformers would run different models, `ModelConfig.from_hf` or `Weights` reject the directory.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.core.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE
from slm.core.config import ModelConfig, layer_pattern
from slm.core.files import read_json, read_text
from slm.core.tokenizer_config import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from slm.core.weights import INDEX_FILE, WEIGHTS_FILE

_MOST_NAMES = 8


def statement_notes(path: Path, fields: Mapping[str, Any], config: ModelConfig, types: Mapping[str, int]) -> list[str]:
    """Returns a line for each contradiction with its resolution, and a line with the ignored fields.

    Args:
        path: The directory.
        fields: The text model's fields of config.json, with the stop tokens in use.
        config: The resulting configuration.
        types: Number of tensors by stored type.
    """
    notes = []
    unread = ModelConfig.unread(fields)
    if unread:
        more = f" and {len(unread) - _MOST_NAMES} more" if len(unread) > _MOST_NAMES else ""
        # A name may contain control characters, which a terminal would obey.
        names = [name if name.isprintable() else ascii(name) for name in unread[:_MOST_NAMES]]
        notes.append(f"config.json: fields that change nothing: {', '.join(names)}{more}")
    original = read_json(path / CONFIG_FILE, CONFIG_FILE)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        notes += _token_note(path, name, original)
    every = fields.get("sliding_window_pattern")
    stated_twice = fields.get("layer_types") and isinstance(every, int) and every > 0
    if stated_twice and config.layer_types != layer_pattern(config.num_hidden_layers, every or 1):
        notes.append(f"config.json: layer_types is followed; sliding_window_pattern={every} says something else")
    stated = fields.get("dtype") or fields.get("torch_dtype")
    if isinstance(stated, str) and stated in ("float32", "float16", "bfloat16") and set(types) - {stated}:
        notes.append(f"config.json says dtype {stated}; the weights are read as they are stored: {', '.join(types)}")
    if (path / WEIGHTS_FILE).is_file() and (path / INDEX_FILE).is_file():
        notes.append(f"{WEIGHTS_FILE} is read; {INDEX_FILE} and its files are not")
    if (path / CHAT_TEMPLATE_FILE).is_file() and (path / TOKENIZER_CONFIG_FILE).is_file():
        other = read_json(path / TOKENIZER_CONFIG_FILE, TOKENIZER_CONFIG_FILE).get("chat_template")
        if other is not None and other != read_text(path / CHAT_TEMPLATE_FILE, "the chat template"):
            notes.append(f"{CHAT_TEMPLATE_FILE} is the chat template; {TOKENIZER_CONFIG_FILE} has another one")
    return notes


def _token_note(path: Path, name: str, original: Mapping[str, Any]) -> list[str]:
    """Returns a note if generation_config.json and config.json name different tokens."""
    file = path / GENERATION_CONFIG_FILE
    if not file.is_file():
        return []
    theirs, ours = read_json(file, GENERATION_CONFIG_FILE).get(name), original.get(name)
    if theirs is None or ours is None or theirs == ours or (isinstance(theirs, list) and ours in theirs):
        return []  # a chat model adds the end of a turn
    followed = GENERATION_CONFIG_FILE if name == "eos_token_id" else CONFIG_FILE
    said, said_there = reprlib.repr(ours), reprlib.repr(theirs)
    return [f"{name}: {CONFIG_FILE} says {said}, {GENERATION_CONFIG_FILE} {said_there}; {followed} is followed"]
