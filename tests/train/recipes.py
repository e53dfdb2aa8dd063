"""A recipe that trains in a tenth of a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.train.recipe import Recipe

Sections = Mapping[str, Mapping[str, Any]]

_SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "preset": "tiny",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 64,
    },
    "batch": {"batch_size": 4, "context": 24, "accumulation": 2},
    "schedule": {
        "micro_steps": 12,
        "warmup_micro_steps": 2,
        "learning_rate": 3e-3,
        "final_learning_rate": 3e-4,
    },
    "evaluation": {"every_micro_steps": 4, "windows": 8},
    "machine": {"device": "cpu", "precision": "float32"},
}


def small(train: Path, *changes: Sections) -> Recipe:
    """Returns the recipe for a text; each of the changes replaces single values of its sections."""
    fields = {**_SMALL, "data": {"train": [str(train)]}}
    for sections in changes:
        for name, values in sections.items():
            fields[name] = {**fields.get(name, {}), **values}
    return Recipe.model_validate(fields)
