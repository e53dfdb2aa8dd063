"""The older transformers that many still run: it opens what slm wrote, computes the same, and slm opens what it saves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.core.chat import turn_ids
from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.finetune.adapter import load_adapter

pytestmark = pytest.mark.peer

TOLERANCE = 3e-5
IDS = [i * 7 % 320 for i in range(60)]

SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "untied": {"tie_word_embeddings": False},
    "stretched": {
        "rope_parameters": {
            SLIDING: RopeParameters(rope_theta=100.0),
            FULL: RopeParameters(rope_theta=1e4, rope_type="linear", factor=8.0),
        }
    },
    "silu": {"hidden_activation": "silu"},
    "another pattern": {"layer_types": (FULL, SLIDING, FULL, FULL)},
    "all sliding": {"layer_types": (SLIDING,) * 4},
    "all global": {"layer_types": (FULL,) * 4},
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_there_and_back(
    transformers4: Callable[..., Any],
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    tokenizer: Tokenizer,
    shape: str,
) -> None:
    model = make_model(config.model_copy(update=SHAPES[shape]))
    save_checkpoint(Path("ours"), model, tokenizer, {})
    answer = transformers4("logits", "ours", "logits.npy", json.dumps(IDS))
    assert answer["version"].startswith("4.57") and answer["class"] == "Gemma3ForCausalLM"
    ours = model(torch.tensor([IDS])).numpy()
    assert np.abs(np.load("logits.npy") - ours).max() < TOLERANCE
    texts = ("Once upon a time.", " two  spaces\n", "é 🦊")
    assert answer["text ids"] == [tokenizer.encode(text) for text in texts]
    assert answer["chat ids"] == turn_ids(tokenizer, "Hi")
    back = load_checkpoint(Path("saved"))  # in several files, in the old spelling
    assert len(list(Path("saved").glob("*.safetensors"))) > 1
    assert np.abs(back(torch.tensor([IDS])).numpy() - ours).max() < TOLERANCE
    assert Tokenizer.load(Path("saved")).encode(texts[0]) == tokenizer.encode(texts[0])


@torch.no_grad()
def test_a_wrong_base_is_noticed(transformers4: Callable[..., Any], shared_checkpoint: Path) -> None:
    """The control: the older spelling of the rotary bases is the one that it reads."""
    import shutil

    altered = Path(shutil.copytree(shared_checkpoint, "altered"))
    fields = json.loads((altered / "config.json").read_text())
    (altered / "config.json").write_text(json.dumps(fields | {"rope_local_base_freq": 101.0}))
    transformers4("logits", altered, "logits.npy", json.dumps(IDS))
    ours = load_checkpoint(shared_checkpoint)(torch.tensor([IDS])).numpy()
    assert np.abs(np.load("logits.npy") - ours).max() > 10 * TOLERANCE


def test_peft_on_it_loads_our_adapter(
    transformers4: Callable[..., Any], shared_checkpoint: Path, slm: Callable[..., Any]
) -> None:
    rows = [{"prompt": f"say {i}", "completion": "something else"} for i in range(16)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = slm("finetune", "--lora", "data.jsonl", "--base", shared_checkpoint, "--out", "adapter", "--epochs", "2")
    assert made.code == 0, made.err
    transformers4("adapter", shared_checkpoint, "logits.npy", "adapter", json.dumps(IDS))
    model = load_checkpoint(shared_checkpoint)
    with torch.no_grad():
        before = model(torch.tensor([IDS])).numpy()
        load_adapter(model, Path("adapter"))
        ours = model(torch.tensor([IDS])).numpy()
    assert np.abs(np.load("logits.npy") - ours).max() < TOLERANCE < np.abs(before - ours).max()
