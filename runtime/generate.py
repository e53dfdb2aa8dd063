"""The generation loop, the same for every backend, and what it measures."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from slm.core.arguments import MAX_COUNT, is_whole
from slm.core.errors import SlmError
from slm.runtime.decoder import Decoder
from slm.runtime.logprobs import Logprobs, logprobs_of
from slm.runtime.sampling import Sampler, Sampling

StopReason = Literal["end", "stop", "length", "context", "interrupted"]
OnFull = Literal["stop", "slide"]

# New tokens as they are chosen.
Generated = Generator[int, None, None]


@dataclass
class Run:
    """One generated text, filled in as it comes.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        tokens: The new tokens, an end token left out. Those of a stop text are among them: it may begin within a token.
        logprobs: How likely each new token was, when that was asked for.
        ttft_ms: Time to first token: from the first prompt token read to the first new token chosen.
        decode_s: From the first new token to the last, reading again what stays of a full context included.
        steps: New tokens chosen in `decode_s`.
        slides: How often the context was full and its older part forgotten.
        seed: What the tokens were drawn with; None where nothing is drawn (greedy).
        stopped: Why it ended: an end token, a stop text, `max_new_tokens`, the context was full; interrupted until then, by
            Ctrl-C or because nobody listened any longer.
    """

    prompt_tokens: int
    tokens: list[int]
    logprobs: list[Logprobs] = field(default_factory=list)
    ttft_ms: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    slides: int = 0
    seed: int | None = None
    stopped: StopReason = "interrupted"

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens read a second; 0 until they are."""
        return self.prompt_tokens / (self.ttft_ms / 1e3) if self.ttft_ms else 0.0

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
    *,
    logprobs: int | None = None,
    on_full: OnFull = "stop",
    keep: int = 0,
) -> tuple[Run, Generated]:
    """Starts a text.

    Args:
        decoder: The model; it forgets what it read before.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        max_new_tokens: How many at most.
        stop: Tokens that end the text; they are not yielded.
        logprobs: Record in the run how likely each token was, and this many of the likeliest; None records nothing.
        on_full: What to do when the context is full: stop, or slide, which forgets the older part (`what_stays`) and reads
            the rest again, from position 0 on. The model does not see then what was forgotten.
        keep: Tokens at the beginning that sliding never forgets.

    Returns:
        The run, complete once the iterator is exhausted, and the iterator over new tokens.

    Raises:
        SlmError: When the prompt is empty or fills the whole context, or a value will not do.
    """
    check_request(decoder, prompt, max_new_tokens, logprobs)
    if on_full not in ("stop", "slide"):
        raise SlmError(f'on_full is {on_full!r}; it must be "stop" or "slide"')
    if not 0 <= keep <= decoder.context - 2:  # one of the others must stay, and there must be room for another
        raise SlmError(f"keep is {keep:,}; it must be from 0 to {decoder.context - 2:,}, the context less two")
    run = Run(prompt_tokens=len(prompt), tokens=[], seed=sampling.seed)
    sampler = Sampler(sampling, prompt, decoder.vocab_size)
    return run, _tokens(run, decoder, prompt, sampler, max_new_tokens, frozenset(stop), logprobs, on_full, keep)


def check_request(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, logprobs: int | None) -> None:
    """Checks what a text is to be made from, before anything is read.

    Raises:
        SlmError: When the prompt is empty, has tokens that the model lacks or fills the context, or a number will not do.
    """
    if not prompt:
        raise SlmError("the prompt has no tokens", "give some text")
    if min(prompt) < 0:
        raise SlmError(f"the prompt has a token of id {min(prompt):,}", f"ids are from 0 to {decoder.vocab_size - 1:,}")
    if max(prompt) >= decoder.vocab_size:
        raise SlmError(
            f"the prompt has a token of id {max(prompt):,}, and the model {decoder.vocab_size:,} of them",
            "a token for pictures, perhaps, which this model does not see; leave it out",
        )
    if len(prompt) >= decoder.context:
        raise SlmError(
            f"the prompt has {len(prompt):,} tokens and the context {decoder.context:,}", "shorten the prompt"
        )
    if not is_whole(max_new_tokens, 1, MAX_COUNT):
        raise SlmError(f"max_new_tokens is {max_new_tokens}; it must be from 1 to {MAX_COUNT:,}")
    if not 0 <= (logprobs or 0) <= decoder.vocab_size:
        raise SlmError(f"logprobs is {logprobs}; it must be from 0 to {decoder.vocab_size:,}, the tokens of the model")


def what_stays(read: Sequence[int], keep: int) -> list[int]:
    """Returns what a full context keeps when it slides: its first `keep` tokens and the later half of the rest."""
    rest = read[keep:]
    return [*read[:keep], *rest[len(rest) - len(rest) // 2 :]]


def _tokens(
    run: Run,
    decoder: Decoder,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    stop: frozenset[int],
    logprobs: int | None,
    on_full: OnFull,
    keep: int,
) -> Generated:
    decoder.reset()
    started = time.perf_counter()
    logits = decoder.read(prompt)
    token = sampler.choose(logits)
    run.ttft_ms = (time.perf_counter() - started) * 1e3
    read = list(prompt)  # what the decoder has read since it was reset
    while token not in stop:
        run.tokens.append(token)
        if logprobs is not None:
            run.logprobs.append(logprobs_of(logits, token, logprobs))
        yield token
        if len(run.tokens) == limit:
            run.stopped = "length"
            return
        before = time.perf_counter()
        if decoder.length < decoder.context:
            logits = decoder.read([token])
        elif on_full == "slide":
            read = what_stays(read, keep)
            decoder.reset()
            logits = decoder.read([*read, token])
            run.slides += 1
        else:
            run.stopped = "context"
            return
        read.append(token)
        token = sampler.choose(logits)
        run.decode_s += time.perf_counter() - before  # the time a listener takes is not the model's
        run.steps += 1
    run.stopped = "end"
