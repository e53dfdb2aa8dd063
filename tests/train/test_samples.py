"""What the model writes while it trains: the same dice, the same text, and nothing else is touched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.tokenizer import Tokenizer
from slm.train.parallel import Alone
from slm.train.samples import continue_prompts

PROMPTS = ("Once upon a time", "The dog", "")


@pytest.fixture
def model(config: ModelConfig, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(config)


def never_ending(model: CausalLM) -> CausalLM:
    model.config = model.config.model_copy(update={"eos_token_id": (999,)})
    return model


def test_the_same_dice_write_the_same_text(model: CausalLM, tokenizer: Tokenizer) -> None:
    first = continue_prompts(model, tokenizer, PROMPTS, 20, seed=1)
    torch.rand(5)
    assert first == continue_prompts(model, tokenizer, PROMPTS, 20, seed=1)
    assert first != continue_prompts(model, tokenizer, PROMPTS, 20, seed=2)
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(first, PROMPTS, strict=True))


def test_every_prompt_has_dice_of_its_own(model: CausalLM, tokenizer: Tokenizer) -> None:
    together = continue_prompts(model, tokenizer, PROMPTS, 20, seed=1)
    assert together == [continue_prompts(model, tokenizer, [prompt], 20, seed=1)[0] for prompt in PROMPTS]


def test_the_first_process_throws_the_dice_for_all(model: CausalLM, tokenizer: Tokenizer) -> None:
    """Whatever the others' logits are: here they are another model's."""
    told: list[Any] = []

    class First(Alone):
        def from_first(self, value: Any) -> Any:
            told.append(value)
            return value

    class Second(Alone):
        def from_first(self, value: Any) -> Any:
            return told.pop(0)

    first = continue_prompts(model, tokenizer, PROMPTS, 20, 1, First())
    model.model.embed_tokens.weight.data.mul_(-1)
    assert continue_prompts(model, tokenizer, PROMPTS, 20, 1) != first
    assert continue_prompts(model, tokenizer, PROMPTS, 20, 1, Second()) == first
    assert told == []


def test_the_cache_changes_nothing(model: CausalLM, tokenizer: Tokenizer) -> None:
    """Beyond the window of 16: the text is drawn from what the model says of all tokens at once."""
    never_ending(model)
    (text,) = continue_prompts(model, tokenizer, ["Once"], 40, seed=3)
    dice, ids, written = torch.Generator().manual_seed(3), tokenizer.encode("Once"), []
    for _ in range(40):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written]))[0, -1]
        written.append(int(torch.multinomial(torch.softmax(logits / 0.7, -1), 1, generator=dice)))
    assert text == "Once" + tokenizer.decode(written)


def test_it_leaves_everyone_elses_dice_and_the_models_mode_alone(model: CausalLM, tokenizer: Tokenizer) -> None:
    for module in (model.model, *model.model.layers):
        module.dropout = 0.5
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        texts = [continue_prompts(model, tokenizer, PROMPTS, 10, seed=1) for _ in range(2)]
        assert texts[0] == texts[1]  # no dropout
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training is training
        assert all(module.training is training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_it_stops_where_a_text_ends(model: CausalLM, tokenizer: Tokenizer) -> None:
    stop = model.config.stop_token_ids[0]
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, torch.tensor([stop]), 100.0))
    assert continue_prompts(model, tokenizer, ["The dog"], 20, seed=1) == ["The dog"]


def test_it_fits_into_the_models_longest_text(model: CausalLM, tokenizer: Tokenizer) -> None:
    never_ending(model)
    prompt = "a b " * 200
    room = model.config.max_position_embeddings - len(tokenizer.encode(prompt))
    assert room < 0
    assert continue_prompts(model, tokenizer, [prompt], 20, seed=1) == [prompt]
    prompt = "a" * (model.config.max_position_embeddings - 3)
    assert len(tokenizer.encode(prompt)) > model.config.max_position_embeddings - 20
    (text,) = continue_prompts(model, tokenizer, [prompt], 20, seed=1)
    assert len(text) > len(prompt)
