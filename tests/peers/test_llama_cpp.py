"""llama.cpp opens the GGUF files that slm writes and chooses the same tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import slm
from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer

pytestmark = pytest.mark.peer

Greedy = Callable[[Path, Sequence[str], int], list[list[int]]]
Run = Callable[..., Any]

PROMPTS = ["Once upon a time", " The  fox\n\nran", "é 🦊 and"]
TOKENS = 40

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
    "padded vocabulary": {"vocab_size": 384},
}


def ours(checkpoint: Path, prompts: Sequence[str]) -> list[list[int]]:
    model = slm.load(checkpoint)
    texts = []
    for prompt in prompts:
        model.generate(prompt, max_new_tokens=TOKENS, temperature=0)
        assert model.last_run is not None
        texts.append(model.last_run.tokens)
    return texts


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
    wanted = ours(checkpoint, PROMPTS)
    assert len({token for text in wanted for token in text}) > 10  # texts with some variety, or this proves little
    result = slm("export", "--gguf", checkpoint, "--gguf-type", "f32", "--out", "x.gguf")
    assert result.code == 0, result.err
    theirs = llama_cpp(Path("x.gguf"), PROMPTS, TOKENS)
    assert [len(text) for text in theirs] == [TOKENS] * len(PROMPTS)
    assert theirs == wanted


@pytest.mark.parametrize("knob", ["window", "local base", "scale"])
def test_a_wrong_setting_is_noticed(
    llama_cpp: Greedy, made: Callable[..., Path], slm: Run, monkeypatch: pytest.MonkeyPatch, knob: str
) -> None:
    import json

    checkpoint = made()
    wanted = ours(checkpoint, PROMPTS)
    fields = json.loads((checkpoint / "config.json").read_text())
    if knob == "window":
        fields["sliding_window"] = 4
    elif knob == "local base":
        fields["rope_parameters"]["sliding_attention"]["rope_theta"] = 130.0
    else:
        fields["query_pre_attn_scalar"] = 40
    (checkpoint / "config.json").write_text(json.dumps(fields))
    assert slm("export", "--gguf", checkpoint, "--gguf-type", "f32", "--out", "x.gguf").code == 0
    assert llama_cpp(Path("x.gguf"), PROMPTS, TOKENS) != wanted


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_types_begin_alike(llama_cpp: Greedy, made: Callable[..., Path], slm: Run, kind: str) -> None:
    """From the same file; llama.cpp rounds activations as well, so a random model's texts part somewhere."""
    checkpoint = made()
    assert slm("export", "--gguf", checkpoint, "--gguf-type", kind, "--out", "x.gguf").code == 0
    assert slm("import", "x.gguf", "--out", "back").code == 0
    theirs, wanted = llama_cpp(Path("x.gguf"), PROMPTS, TOKENS), ours(Path("back"), PROMPTS)
    alike = [
        next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), TOKENS)
        for texts in zip(theirs, wanted, strict=True)
    ]
    assert sum(alike) >= TOKENS / 2, alike
