"""Texts by token ids, as tests generate them."""

from collections.abc import Collection, Sequence
from typing import Any

from slm.runtime.backend import Decoder
from slm.runtime.generation import Generation, Request, Result
from slm.runtime.sampling import Sampling
from slm.runtime.scheduler import SLOTS, run_batch
from slm.runtime.streaming import run


def started(
    decoder: Decoder, prompt: Sequence[int], sampling: Sampling, new: int, stop: Collection[int] = (), **options: Any
) -> Generation:
    """Returns a checked text that has not begun."""
    return Generation(Request(prompt, sampling, new, stop, **options), decoder.context, decoder.vocab_size)


def completed(
    decoder: Decoder, prompt: Sequence[int], sampling: Sampling, new: int, stop: Collection[int] = (), **options: Any
) -> Result:
    """Returns the result of a text that runs alone."""
    return run(decoder, started(decoder, prompt, sampling, new, stop, **options)).finish()


def completed_together(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    new: int,
    stop: Collection[int] = (),
    slots: int = SLOTS,
) -> list[list[int]]:
    """Returns the tokens of texts that run together."""
    texts = [started(decoder, *each, new, stop) for each in zip(prompts, samplings, strict=True)]
    return [result.tokens for result in run_batch(decoder, texts, slots)]
