"""Texts that PyTorch continues together: each is the text that it is alone, and likelihoods are those of whole rows."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slm.core.config import ModelConfig
from slm.core.nn import CausalLM
from slm.core.nn.decoder import TorchDecoder
from slm.core.task import Question, TaskRow
from slm.finetune.adapter import TunableLM, attach
from slm.finetune.frozen import lighten
from slm.finetune.replies import generate, reply_likelihoods
from slm.finetune.settings import FinetuneSettings
from slm.runtime.generation import Generation, Request, Result
from slm.runtime.sampling import GREEDY
from slm.runtime.streaming import run
from slm.runtime.task import likelihoods

MakeModel = Callable[..., CausalLM]
# Sums of some ten float32 log-probabilities, added in another order.
ROUNDING = 1e-4
NEW = 10


def prompts(config: ModelConfig, count: int) -> list[list[int]]:
    """Prompts of very different lengths, some of them longer than the window."""
    draw = random.Random(0)
    return [[draw.randrange(4, 320) for _ in range(draw.choice((1, 3, 9, 40)))] for _ in range(count)]


def requests(config: ModelConfig, texts: list[list[int]], ends: tuple[int, ...]) -> list[Generation]:
    size = config.max_position_embeddings, config.vocab_size
    return [Generation(Request(ids, GREEDY, NEW, ends), *size) for ids in texts]


@pytest.mark.parametrize("chunk", [512, 8])
def test_texts_together_are_those_alone(
    config: ModelConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("slm.finetune.replies._CHUNK", chunk)
    model = make_model(config)
    texts = prompts(config, 24)  # more than are read together
    assert max(map(len, texts)) > config.sliding_window
    decoder = TorchDecoder(model)
    free = [run(decoder, each).finish() for each in requests(config, texts, ())]
    ends = tuple({result.tokens[4] for result in free[::3]})  # so that texts end at different steps
    alone = [run(decoder, each).finish() for each in requests(config, texts, ends)]
    assert len({len(result.tokens) for result in alone}) > 3

    together = requests(config, texts, ends)
    order: list[Generation] = []
    model.train()
    before = torch.random.get_rng_state()
    generate(TunableLM(model), together, None, order.append)
    assert torch.equal(torch.random.get_rng_state(), before)

    def essence(result: Result) -> tuple[list[int], str]:
        return result.tokens, result.stopped

    assert [essence(each.result) for each in together] == [essence(result) for result in alone]
    assert sorted(map(id, order)) == sorted(map(id, together))


def test_a_full_context_ends_a_text(config: ModelConfig, make_model: MakeModel) -> None:
    small = config.model_copy(update={"max_position_embeddings": 20})
    (text,) = requests(small, [[5] * 15], ())
    generate(make_model(small), [text], None, lambda _: None)
    assert text.result.stopped == "context" and len(text.result.tokens) == 6


def test_likelihoods_are_those_of_reading_alone(config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    draw = random.Random(1)
    replies = [[draw.randrange(4, 320) for _ in range(n % 7 + 1)] for n in range(20)]  # in two groups
    prompt = [draw.randrange(4, 320) for _ in range(25)]
    question = Question(TaskRow("", "", ""), tuple(prompt), (), tuple(map(tuple, replies)))
    wanted = likelihoods(TorchDecoder(model), question)
    found = reply_likelihoods(TunableLM(model), prompt, replies, None)
    assert found == pytest.approx(wanted, abs=ROUNDING)
    assert found != pytest.approx(reply_likelihoods(model, prompt[1:], replies, None), abs=ROUNDING)  # negative control


def test_stopping_is_asked_for_between_steps(config: ModelConfig, make_model: MakeModel) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt

    texts = requests(config, prompts(config, 2), ())
    with pytest.raises(KeyboardInterrupt):
        generate(make_model(config), texts, None, lambda _: None, check)
    assert len(texts[0].tokens) == 3


@torch.no_grad()
def test_trained_rows_of_the_head_need_no_copy_of_it_at_each_step(config: ModelConfig, make_model: MakeModel) -> None:
    model = attach(make_model(config), FinetuneSettings(rank=2), Path("base"), [3, 5]).get_base_model()
    lighten(model, None)

    def merged(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the head was copied")

    model.lm_head.forward = merged
    found = requests(config, prompts(config, 3), ())
    generate(model, found, None, lambda _: None)
    assert all(len(each.result.tokens) == NEW for each in found)
