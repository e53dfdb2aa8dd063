"""A trimmed checkpoint in other tools: transformers and llama.cpp split text as slm does, and compute the source's logits."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slm
from slm.core.chat import turn_ids
from slm.core.config import ModelConfig
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.interchange.trim.checkpoint import Trimmed, trim_checkpoint
from slm.interchange.trim.choice import Wanted
from slm.interchange.trim.texts import Texts

pytestmark = pytest.mark.peer

TOLERANCE = 3e-5
TOKENS = 40
# llama.cpp looks GELU up in a table of half precision: where two tokens are closer than this, either may be chosen.
NEAR_TIE = 0.003


@pytest.fixture
def trimmed(
    config: ModelConfig, make_model: Callable[..., CausalLM], gemma_like: Tokenizer, stories: list[str]
) -> Trimmed:
    """A Gemma-like checkpoint in `c` that chooses tokens of ASCII text only, and a part of its vocabulary in `t`."""
    shape = {"vocab_size": gemma_like.vocab_size, "bos_token_id": 2, "eos_token_id": (1, 5), "pad_token_id": 0}
    model = make_model(config.model_copy(update=shape), seed=3)
    spelt = [gemma_like.decode([i]) for i in range(gemma_like.vocab_size)]
    model.lm_head.weight.data[[i for i, text in enumerate(spelt) if not text or not text.isascii()]] = 0
    save_checkpoint(Path("c"), model, gemma_like, {})
    data, held_out = Texts(lambda: iter(stories[:20]), "data"), Texts(lambda: iter(stories[20:30]), "held out")
    return trim_checkpoint(Path("c"), Path("t"), data, held_out, Wanted(keep=1408))


@torch.no_grad()
def test_transformers(transformers4: Callable[..., Any], trimmed: Trimmed, stories: list[str]) -> None:
    after, kept = Tokenizer.load(Path("t")), trimmed.choice.ids
    ids = after.encode(stories[0])[:60]
    answer = transformers4("logits", "t", "logits.npy", json.dumps(ids))
    assert answer["text ids"] == [after.encode(text) for text in ("Once upon a time.", " two  spaces\n", "é 🦊")]
    assert answer["chat ids"] == turn_ids(after, "Hi")
    source = load_checkpoint(Path("c"))(torch.tensor([kept[ids].tolist()])).numpy()[..., kept]
    assert np.abs(np.load("logits.npy") - source).max() < TOLERANCE
    assert np.abs(np.load("logits.npy") - source[..., ::-1]).max() > 100 * TOLERANCE  # the control


def test_llama_cpp(
    llama_cpp: Callable[[Path, Sequence[str], int], list[list[int]]],
    trimmed: Trimmed,
    stories: list[str],
    slm: Callable[..., Any],
) -> None:
    prompts = ["Once upon a time", stories[0][:200], stories[5][:90], " The  fox\n\nran", "é 🦊 and 東京"]
    result = slm("export", "--gguf", "t", "--gguf-type", "f32", "--out", "x.gguf")
    assert result.code == 0, result.err
    theirs = llama_cpp(Path("x.gguf"), prompts, TOKENS)
    compared = 0
    for prompt, text in zip(prompts, theirs, strict=True):
        wanted = ours(prompt)
        assert text[: len(wanted)] == wanted, prompt
        compared += len(wanted)
    assert compared >= 2 * TOKENS


def ours(prompt: str) -> list[int]:
    """Our greedy tokens, up to the first near tie."""
    model = slm.load("t")
    tokens = model.complete(prompt, max_new_tokens=TOKENS, temperature=0).tokens
    read = model.tokenizer.encode(prompt)
    best = np.sort(model.logits([read + tokens])[0, len(read) - 1 : -1], axis=-1)
    ties = np.flatnonzero(best[:, -1] - best[:, -2] < NEAR_TIE)
    return tokens[: ties[0]] if len(ties) else tokens
