"""The generation loop, the same for every backend, and what it measures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.core.errors import SlmError
from slm.runtime.decoder import Decoder
from slm.runtime.sampling import Sampling

StopReason = Literal["end", "length", "context"]


@dataclass
class Run:
    """One generated text, filled in as it comes.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        tokens: The new tokens, the one that ended the text left out.
        ttft_ms: Time to first token: from the first prompt token read to the first new token chosen.
        decode_s: From the first new token to the last.
        stopped: Why it ended: an end token, `max_new_tokens`, or the context was full.
    """

    prompt_tokens: int
    tokens: list[int]
    ttft_ms: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    stopped: StopReason = "length"

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens read a second."""
        return self.prompt_tokens / (self.ttft_ms / 1e3)

    @property
    def decode_tok_s(self) -> float | None:
        """New tokens a second after the first; None when there were no steps to time."""
        return self.steps / self.decode_s if self.steps else None


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[int],
) -> tuple[Run, Iterator[int]]:
    """Starts a text.

    Args:
        decoder: The model; it forgets what it read before.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        max_new_tokens: How many at most.
        stop: Tokens that end the text; they are not yielded.

    Returns:
        The run, complete once the iterator is exhausted, and the iterator over new tokens.

    Raises:
        SlmError: When the prompt is empty or fills the whole context.
    """
    if not prompt:
        raise SlmError("the prompt has no tokens", "give some text")
    if not 0 <= min(prompt) <= max(prompt) < decoder.vocab_size:
        raise SlmError(
            f"the prompt has a token of id {max(prompt):,}, and the model {decoder.vocab_size:,} of them",
            "a token for pictures, perhaps, which this model does not see; leave it out",
        )
    if len(prompt) >= decoder.context:
        raise SlmError(
            f"the prompt has {len(prompt):,} tokens and the context {decoder.context:,}", "shorten the prompt"
        )
    if max_new_tokens < 1:
        raise SlmError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    run = Run(prompt_tokens=len(prompt), tokens=[])
    return run, _tokens(run, decoder, prompt, sampling, max_new_tokens, frozenset(stop))


def _tokens(
    run: Run, decoder: Decoder, prompt: Sequence[int], sampling: Sampling, limit: int, stop: frozenset[int]
) -> Iterator[int]:
    chance = sampling.generator()
    decoder.reset()
    started = time.perf_counter()
    logits = decoder.read(prompt)
    token = sampling.choose(logits, chance)
    first = time.perf_counter()
    run.ttft_ms = (first - started) * 1e3
    while True:
        if token in stop:
            run.stopped = "end"
            return
        run.tokens.append(token)
        yield token
        if len(run.tokens) == limit:
            return
        if decoder.length == decoder.context:
            run.stopped = "context"
            return
        before = time.perf_counter()
        token = sampling.choose(decoder.read([token]), chance)
        run.decode_s += time.perf_counter() - before  # the time a listener takes is not the model's
        run.steps += 1
