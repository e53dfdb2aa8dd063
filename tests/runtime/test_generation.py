"""One text as a state machine, fed by hand and by both drivers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Generation, Piece, Request
from slm.runtime.sampling import GREEDY, Sampling
from slm.runtime.scheduler import Scheduler, run_batch
from slm.runtime.streaming import run
from tests.runtime.texts import started

PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], [8, 5, 200, 31]]
# Log-probabilities of a row alone and in a batch, in float32.
TOLERANCE = 1e-5


def likely(token: int, vocab_size: int = 10) -> np.ndarray[Any, Any]:
    return (np.arange(vocab_size) == token).astype(np.float32)


def fed(generation: Generation, *tokens: int) -> list[int | None]:
    return [piece.token for token in tokens for piece in generation.feed(likely(token), 0.0)]


class Countdown:
    """Allows 3 tokens of one kind, and no other token."""

    def __init__(self, vocab_size: int, hold: Event | None = None) -> None:
        self.left, self.vocab_size, self.hold = 3, vocab_size, hold

    def allowed(self) -> np.ndarray[Any, Any]:
        if self.hold is not None:
            assert self.hold.wait(60)
        return np.arange(self.vocab_size) == 5 + self.left

    def accept(self, token: int) -> bool:
        self.left -= 1
        return not self.left


def test_logits_go_in_and_pieces_come_out() -> None:
    generation = Generation(Request([1, 2], GREEDY, 3, stop_tokens=[9], logprobs=1), context=8, vocab_size=10)
    generation.begin()
    assert generation.unread == [1, 2] and not generation.done
    (piece,) = generation.feed(likely(4), 0.0)
    assert piece.token == 4 and piece.top == ((4, piece.logprob),) and generation.unread == [4]
    assert fed(generation, 5, 6) == [5, 6] and generation.done
    result = generation.result
    assert (result.tokens, result.stopped, result.prompt_tokens, result.steps) == ([4, 5, 6], "length", 2, 2)
    assert generation.end("cancelled") == [] and generation.result.stopped == "length"  # it has ended


def test_an_end_token_and_a_full_context_end_it() -> None:
    ended = Generation(Request([1], GREEDY, 9, stop_tokens=[9]), context=8, vocab_size=10)
    assert fed(ended, 4, 9) == [4] and ended.result.stopped == "end" and ended.result.tokens == [4]
    full = Generation(Request([1, 2], GREEDY, 9), context=3, vocab_size=10)
    assert fed(full, 4, 5) == [4, 5] and full.result.stopped == "context"


def test_a_full_context_slides() -> None:
    generation = Generation(Request([1, 2, 3], GREEDY, 4, on_full="slide", keep=1), context=4, vocab_size=10)
    assert fed(generation, 4) == [4] and not generation.slid
    assert fed(generation, 5) == [5] and generation.slid and generation.unread == [1, 4, 5]
    assert fed(generation, 6) == [6] and not generation.slid and generation.unread == [6]
    assert generation.result.slides == 1


def test_held_back_text_may_complete_a_stop_text(tokenizer: Tokenizer) -> None:
    """A text that ends within a character ends with U+FFFD."""
    half = tokenizer.encode_literal("é")[0]
    request = Request([5], GREEDY, 1, stop=["\ufffd"])
    generation = Generation(request, 256, 320, tokenizer)
    assert [piece.text for piece in generation.feed(likely(half, 320), 0.0)] == [""]
    assert generation.result.stopped == "stop" and generation.result.text == ""


def test_a_text_waits_for_its_constraint() -> None:
    hold = Event()
    with ThreadPoolExecutor(1) as threads:
        generation = Generation(Request([1], GREEDY, 3, constraint=Countdown(10, hold)), context=8, vocab_size=10)
        generation.begin(threads)
        assert generation.feed(likely(4), 0.0) == [] and generation.waiting
        assert generation.resume() == [] and generation.waiting
        hold.set()
        assert [piece.token for piece in generation.resume(60)] == [8]
        while not generation.done:
            generation.resume(60) if generation.waiting else generation.feed(likely(4), 0.0, 60)
    assert generation.result.tokens == [8, 7, 6] and generation.result.stopped == "end"  # complete with its last token


def requests(vocab_size: int) -> dict[str, Callable[[list[int]], Request]]:
    bold = Sampling(temperature=1.3, seed=3, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={7: 1.0})
    return {
        "sampled": lambda prompt: Request(prompt, bold, 30, stop_tokens=[0, 2]),
        "stop": lambda prompt: Request(prompt, bold, 40, stop=["e", " a"]),
        "logprobs": lambda prompt: Request(prompt, Sampling(seed=1), 10, logprobs=3),
        "constraint": lambda prompt: Request(prompt, GREEDY, 9, constraint=Countdown(vocab_size)),
        "cut": lambda prompt: Request(prompt, GREEDY, 2, constraint=Countdown(vocab_size)),
        "context": lambda prompt: Request(prompt, GREEDY, 1000),
    }


@pytest.mark.parametrize("name", list(requests(0)))
def test_both_drivers_give_the_same(name: str, shared_bundle: Bundle) -> None:
    decoder, tokenizer = OnnxDecoder(shared_bundle, threads=1), Tokenizer.load(shared_bundle.path)
    make = requests(decoder.vocab_size)[name]

    def texts() -> list[Generation]:
        return [Generation(make(each), decoder.context, decoder.vocab_size, tokenizer) for each in PROMPTS]

    alone = [(list(stream), stream.result) for stream in (run(decoder, each) for each in texts())]
    scheduler = Scheduler(Batch(OnnxDecoder(shared_bundle, threads=1), len(PROMPTS)), prefill_tokens=16)
    together = texts()
    pieces: dict[Generation, list[Piece]] = {each: [] for each in together}
    for each in together:
        scheduler.admit(each)
    while scheduler.running:
        for events in scheduler.turn():
            for generation, new in events:
                pieces[generation] += new
    for (wanted, result), generation in zip(alone, together, strict=True):
        found = generation.result
        assert [(each.text, each.token, each.raw) for each in pieces[generation]] == [
            (each.text, each.token, each.raw) for each in wanted
        ]
        assert (found.text, found.tokens, found.stopped) == (result.text, result.tokens, result.stopped)
        np.testing.assert_allclose(
            [each.chosen for each in found.logprobs], [each.chosen for each in result.logprobs], atol=TOLERANCE
        )
    assert scheduler.free == len(PROMPTS) and scheduler.work.new_tokens == sum(len(each.tokens) for each in together)


def test_a_token_that_cannot_be_chosen_is_an_error_in_both(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle, threads=1)
    nothing = Sampling(temperature=0, logit_bias=dict.fromkeys(range(decoder.vocab_size), -np.inf))
    with pytest.raises(SlmError, match="no token can be chosen"):
        run(decoder, started(decoder, [5], nothing, 3)).finish()
    with pytest.raises(SlmError, match="no token can be chosen"):
        run_batch(decoder, [started(decoder, [5], GREEDY, 3), started(decoder, [5], nothing, 3)])
