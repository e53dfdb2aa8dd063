"""llama.cpp opens the GGUF files that slm writes and chooses the same tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer

pytestmark = pytest.mark.peer

Greedy = Callable[[Path, Sequence[str], int], list[list[int]]]
Run = Callable[..., Any]

PROMPTS = ["Once upon a time", " The  fox\n\nran", "é 🦊 and", "A b c", "She said", "\tno"]
TOKENS = 40
# llama.cpp looks GELU up in a table of half precision: where two tokens are closer than this, either may be chosen, and
# what follows is another text.
NEAR_TIE = 0.003

SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},  # another pattern than every sixth, another local base, another scale of attention
    "every sixth": {"num_hidden_layers": 6, "layer_types": (SLIDING,) * 5 + (FULL,)},
    "untied": {"tie_word_embeddings": False},
    "stretched": {
        "rope_parameters": {
            SLIDING: RopeParameters(rope_theta=100.0),
            FULL: RopeParameters(rope_theta=1e4, rope_type="linear", factor=8.0),
        }
    },
    "all global": {"layer_types": (FULL,) * 4},
    "no period": {"layer_types": (FULL, SLIDING, FULL, FULL)},
    "padded vocabulary": {"vocab_size": 384},
}


def ours(checkpoint: Path) -> list[list[int]]:
    """Our greedy tokens for each prompt, up to the first near tie."""
    model = slm.load(checkpoint)
    texts = []
    for prompt in PROMPTS:
        tokens = model.complete(prompt, max_new_tokens=TOKENS, temperature=0).tokens
        read = model.tokenizer.encode(prompt)
        best = np.sort(model.logits([read + tokens])[0, len(read) - 1 : -1], axis=-1)
        ties = np.flatnonzero(best[:, -1] - best[:, -2] < NEAR_TIE)
        texts.append(tokens[: ties[0]] if len(ties) else tokens)
    return texts


def alike(texts: list[list[int]], wanted: list[list[int]]) -> list[int]:
    """How many tokens of each text are the wanted ones before the first that is not."""
    pairs = (zip(text, want, strict=False) for text, want in zip(texts, wanted, strict=True))
    lengths = (len(want) for want in wanted)
    return [next((i for i, (a, b) in enumerate(pair) if a != b), n) for pair, n in zip(pairs, lengths, strict=True)]


@pytest.fixture
def made(config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> Callable[..., Path]:
    """Saves a checkpoint that only ever chooses tokens of ASCII text.

    llama.cpp's server reports no token whose bytes are half a character, and ends at any that is spelt like an end.
    """

    def make(**changes: Any) -> Path:
        model = make_model(config.model_copy(update=changes), seed=3)
        spelt = [tokenizer.decode([i]) for i in range(model.config.vocab_size)]
        others = [i for i, text in enumerate(spelt) if not text or not text.isascii()]
        model.lm_head.weight.data[others] = 0
        save_checkpoint(Path("c"), model, tokenizer, {})
        return Path("c")

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_greedy_tokens(llama_cpp: Greedy, made: Callable[..., Path], slm: Run, shape: str) -> None:
    checkpoint = made(**SHAPES[shape])
    wanted = ours(checkpoint)
    # Texts with some length and variety, or this proves little.
    assert sum(map(len, wanted)) >= 2 * TOKENS and len({token for text in wanted for token in text}) > 10
    result = slm("export", "--gguf", checkpoint, "--gguf-type", "f32", "--out", "x.gguf")
    assert result.code == 0, result.err
    theirs = llama_cpp(Path("x.gguf"), PROMPTS, TOKENS)
    assert [len(text) for text in theirs] == [TOKENS] * len(PROMPTS)
    assert alike(theirs, wanted) == [len(text) for text in wanted]


@pytest.mark.parametrize("knob", ["window", "local base", "scale"])
def test_a_wrong_setting_is_noticed(
    llama_cpp: Greedy, made: Callable[..., Path], slm: Run, monkeypatch: pytest.MonkeyPatch, knob: str
) -> None:
    import json

    checkpoint = made()
    wanted = ours(checkpoint)
    fields = json.loads((checkpoint / "config.json").read_text())
    if knob == "window":
        fields["sliding_window"] = 4
    elif knob == "local base":
        fields["rope_parameters"]["sliding_attention"]["rope_theta"] = fields["rope_local_base_freq"] = 130.0
    else:
        fields["query_pre_attn_scalar"] = 40
    (checkpoint / "config.json").write_text(json.dumps(fields))
    assert slm("export", "--gguf", checkpoint, "--gguf-type", "f32", "--out", "x.gguf").code == 0
    assert alike(llama_cpp(Path("x.gguf"), PROMPTS, TOKENS), wanted) != [len(text) for text in wanted]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_types_begin_alike(llama_cpp: Greedy, made: Callable[..., Path], slm: Run, kind: str) -> None:
    """From the same file; llama.cpp rounds activations as well, so a random model's texts part somewhere."""
    checkpoint = made()
    assert slm("export", "--gguf", checkpoint, "--gguf-type", kind, "--out", "x.gguf").code == 0
    assert slm("import", "x.gguf", "--out", "back").code == 0
    theirs = llama_cpp(Path("x.gguf"), PROMPTS, TOKENS)
    assert sum(alike(theirs, ours(Path("back")))) >= TOKENS
