"""Generates one text as a state machine: logits in, pieces of text out.

A `Generation` has no decoder. Two drivers feed it: `slm.runtime.streaming.run` for one text on any backend, and
`slm.runtime.scheduler.Scheduler` for many texts on one bundle. The module needs neither onnxruntime nor torch.

Dimensions: V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from slm.core.arguments import MAX_COUNT, is_whole
from slm.core.errors import SlmError
from slm.core.text_stream import TextStream
from slm.core.tokenizer import Tokenizer
from slm.runtime.guide import Constraint, Guide
from slm.runtime.head import looks_far
from slm.runtime.logprobs import Logprobs, logprobs_of
from slm.runtime.sampling import Sampler, Sampling
from slm.runtime.stopping import StopTexts
from slm.runtime.token_bytes import token_bytes

Array = NDArray[Any]
OnFull = Literal["stop", "slide"]
StopReason = Literal["end", "stop", "length", "context", "interrupted", "cancelled", "deadline", "error", "stalled"]


@dataclass(frozen=True)
class Request:
    """A prompt and the settings of its completion.

    Attributes:
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        max_new_tokens: The most new tokens.
        stop_tokens: End tokens. The result does not include them.
        stop: Stop texts. The result does not include them.
        logprobs: The number of most likely tokens recorded per piece; None records no log-probabilities.
        on_full: What to do when the context is full: stop, or slide, which drops the older part (`what_stays`) and reads
            the rest again from position 0. The model no longer sees dropped tokens.
        keep: Tokens at the beginning that sliding never drops.
        constraint: The grammar that the text must follow; None for no constraint.
        shown: Special tokens whose spelling is part of the text.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop_tokens: Collection[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    on_full: OnFull = "stop"
    keep: int = 0
    constraint: Constraint | None = None
    shown: Collection[int] = ()


@dataclass(frozen=True)
class Piece:
    """A token, and the text that became certain with it.

    The texts of all pieces add up to the whole text. A piece's text is empty while a character is incomplete or a stop text
    may have begun.

    Attributes:
        text: Whole characters. A character of several tokens comes with the token that completes it.
        token: The token; None in a last piece, for text that was held back until the end.
        logprob: Natural logarithm of the token's probability in the model's own distribution, before bias, penalties,
            temperature and every other setting of `Sampling`; None unless requested.
        top: The most likely tokens and their log-probabilities, most likely first; as many as were requested.
        raw: The token's own bytes, even if it is part of a character; for a special token, those of its spelling.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    raw: bytes = b""


@dataclass(frozen=True)
class Result:
    """A generated text and its figures.

    Attributes:
        text: The new text; empty without a tokenizer.
        prompt_tokens: Tokens of the prompt.
        tokens: The new tokens without the end token. Tokens of a stop text are included: it may begin within a token.
        logprobs: The log-probabilities of each new token, if requested.
        stopped: Why the text ended: an end token, a stop text, `max_new_tokens`, or a full context. Until then, and after
            Ctrl-C or if the iterator was not read to its end, "interrupted". A server also ends texts as "cancelled", at a
            "deadline", with an "error", or because a step has "stalled".
        seed: Seed of the sampling; None for greedy decoding.
        slides: How often the context was full and its older part was dropped.
        reused_tokens: Tokens of the prompt that were not read, because their state was cached.
        waited_s: Seconds from the request to the start of its prefill.
        ttft_ms: Milliseconds from the start of the prefill to the first new token; 0 without a new token.
        took_s: Seconds from the request to the end.
        decode_s: Seconds of the steps after the first token, without the time between steps.
        steps: New tokens chosen in `decode_s`.
        error: The error message, if an error ended the text.
    """

    text: str
    prompt_tokens: int
    tokens: list[int]
    logprobs: list[Logprobs] = field(default_factory=list)
    stopped: StopReason = "interrupted"
    seed: int | None = None
    slides: int = 0
    reused_tokens: int = 0
    waited_s: float = 0.0
    ttft_ms: float = 0.0
    took_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    error: str | None = None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second; 0 without a new token."""
        return self.prompt_tokens / (self.ttft_ms / 1e3) if self.ttft_ms else 0.0

    @property
    def decode_tok_s(self) -> float | None:
        """New tokens per second after the first token; None without decoding steps."""
        return self.steps / self.decode_s if self.steps else None


class Generation:
    """The state of one text that is being generated.

    A driver calls `begin`, then repeats until `done`: the model reads `unread` (after a reset if `slid`), and `feed` takes
    the logits of the last of these tokens and returns the resulting pieces. While `waiting`, the driver calls `resume`
    instead of reading and feeding.

    Attributes:
        request: The request.
        tokens: The new tokens so far.
        unread: Tokens that the model has to read next.
        reused: Tokens of the prompt that the driver did not have to read.
        done: Whether the text has ended.
    """

    def __init__(
        self,
        request: Request,
        context: int,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        *,
        stops: StopTexts | None = None,
        choose: Callable[[Array], int] | None = None,
    ) -> None:
        """Checks the request.

        Args:
            request: The prompt and its settings.
            context: The model's context, in tokens.
            vocab_size: The number of the model's logits.
            tokenizer: Decodes tokens to text. Without it, pieces have no text and stop texts are not possible.
            stops: A fresh copy of the request's stop texts, if they were parsed before.
            choose: Chooses the next token from logits (V,), instead of the request's sampling.

        Raises:
            SlmError: If the prompt is empty, has tokens outside the vocabulary or fills the context, or an option is out of
                range.
        """
        _check(request, context, vocab_size)
        assert tokenizer is not None or not request.stop
        self.request = request
        self.tokens: list[int] = []
        self.unread: Sequence[int] = request.prompt
        self.reused = 0
        self.done = False
        self._context = context
        self._needs_whole = (
            choose is not None
            or request.logprobs is not None
            or request.constraint is not None
            or looks_far(request.sampling, vocab_size)
        )
        self._next = choose or Sampler(request.sampling, request.prompt, vocab_size).choose
        self._text = None if tokenizer is None else TextStream(tokenizer, request.shown)
        self._raw = None if tokenizer is None else token_bytes(tokenizer)
        self._stops = stops or StopTexts(request.stop, tokenizer)
        self._guide: Guide | None = None
        self._held: tuple[Array, float] | None = (
            None  # logits that wait for the guide, and the start time of their step
        )
        self._read: list[int] = []  # tokens read since the last reset
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []
        self._stopped: StopReason = "interrupted"
        self._error: str | None = None
        self._slides = self._steps = 0
        self._decode_s = 0.0
        self._ttft_s: float | None = None
        self._created = time.perf_counter()
        self._begun: float | None = None
        self._ended: float | None = None

    @property
    def result(self) -> Result:
        """The result so far; final once `done`."""
        now = time.perf_counter()
        return Result(
            text="".join(self._texts),
            prompt_tokens=len(self.request.prompt),
            tokens=list(self.tokens),
            logprobs=list(self._logprobs),
            stopped=self._stopped,
            seed=self.request.sampling.seed,
            slides=self._slides,
            reused_tokens=self.reused,
            waited_s=(now if self._begun is None else self._begun) - self._created,
            ttft_ms=(self._ttft_s or 0.0) * 1e3,
            took_s=(now if self._ended is None else self._ended) - self._created,
            decode_s=self._decode_s,
            steps=self._steps,
            error=self._error,
        )

    @property
    def needs_whole(self) -> bool:
        """Whether a choice or a log-probability depends on the logits of unlikely tokens (`slm.runtime.head`)."""
        return self._needs_whole

    @property
    def slid(self) -> bool:
        """Whether the model has to be reset before it reads `unread`."""
        return bool(self._slides) and not self._read

    @property
    def waiting(self) -> bool:
        """Whether the text waits for its constraint: for the allowed tokens, or to know whether it is complete."""
        return self._guide is not None and (self._held is not None or self._full() is not None)

    def begin(self, threads: Executor | None = None) -> None:
        """Starts the clock, and the constraint if there is one.

        Args:
            threads: Runs the constraint; None runs it in the calling thread.
        """
        self._begun = time.perf_counter()
        if self.request.constraint is not None:
            self._guide = Guide(self.request.constraint, threads)

    def feed(self, logits: Array, began: float, patience_s: float = 0.0) -> list[Piece]:
        """Takes the logits (V,) after `unread`, and chooses the next token.

        Args:
            logits: The logits. They are not modified, and copied if they are needed later.
            began: Start time of the step that computed the logits (`time.perf_counter`, seconds).
            patience_s: How long to wait for the constraint, in seconds; after that the text is `waiting`.

        Raises:
            SlmError: If no token can be chosen, or the constraint cannot continue.
        """
        self._read += self.unread
        if self._guide is not None and not self._guide.ready(patience_s):
            self._held = logits.copy(), began
            return []
        return self._choose(logits, began)

    def resume(self, patience_s: float = 0.0) -> list[Piece]:
        """Continues a text that is `waiting`, if its constraint is ready within `patience_s` seconds; see `feed`."""
        assert self._guide is not None
        if not self._guide.ready(patience_s):
            return []
        held, self._held = self._held, None
        if held is not None:
            return self._choose(*held)
        return self.end("end" if self._guide.complete else self._full() or "length")

    def end(self, reason: StopReason, error: str | None = None) -> list[Piece]:
        """Ends the text. Returns one more piece if text was held back."""
        if self.done:
            return []
        self.done, self._stopped, self._error, self._ended = True, reason, error, time.perf_counter()
        if self._text is None:
            return []
        rest = self._stops.push(self._text.finish()) + self._stops.finish()
        if self._stops.found and reason in ("end", "length", "context"):
            self._stopped = "stop"
        self._texts.append(rest)
        return [Piece(rest)] if rest else []

    def _choose(self, logits: Array, began: float) -> list[Piece]:
        guide, request = self._guide, self.request
        if guide is not None and guide.complete:
            return self.end("end")
        token = self._next(logits if guide is None else guide.masked(logits))
        self._count(began)
        if token in request.stop_tokens:
            return self.end("end")
        if guide is not None:
            guide.advance(token)
        self.tokens.append(token)
        self.unread = [token]
        piece = self._piece(token, logits)
        if self._stops.found:
            return [piece, *self.end("stop")]
        full = self._full()
        if full is not None:
            return (
                [piece] if guide is not None else [piece, *self.end(full)]
            )  # the constraint first reports whether the text is complete
        if len(self._read) >= self._context:
            self.unread, self._read = [*what_stays(self._read, request.keep), token], []
            self._slides += 1
        return [piece]

    def _full(self) -> StopReason | None:
        """Returns why the text cannot have another token, or None if it can."""
        if len(self.tokens) >= self.request.max_new_tokens:
            return "length"
        return "context" if len(self._read) >= self._context and self.request.on_full == "stop" else None

    def _count(self, began: float) -> None:
        now = time.perf_counter()
        if self._ttft_s is None:
            self._ttft_s = now - (began if self._begun is None else self._begun)
        else:
            self._decode_s += now - began
            self._steps += 1

    def _piece(self, token: int, logits: Array) -> Piece:
        text, raw = "", b""
        if self._text is not None and self._raw is not None:
            raw = self._raw.at(token, first=not self._text.begun)
            text = self._stops.push(self._text.push(token), token)
            self._texts.append(text)
        if self.request.logprobs is None:
            return Piece(text, token, raw=raw)
        known = logprobs_of(logits, token, self.request.logprobs)
        self._logprobs.append(known)
        return Piece(text, token, known.chosen, known.top, raw)


def what_stays(read: Sequence[int], keep: int) -> list[int]:
    """Returns the tokens that stay when a full context slides: the first `keep` and the later half of the rest."""
    rest = read[keep:]
    return [*read[:keep], *rest[len(rest) - len(rest) // 2 :]]


def _check(request: Request, context: int, vocab_size: int) -> None:
    """Checks a request.

    Raises:
        SlmError: If it is invalid; see `Generation`.
    """
    prompt = request.prompt
    if not prompt:
        raise SlmError("the prompt has no tokens", "pass some text")
    if min(prompt) < 0:
        raise SlmError(f"the prompt has token id {min(prompt):,}", f"ids are from 0 to {vocab_size - 1:,}")
    if max(prompt) >= vocab_size:
        raise SlmError(
            f"the prompt has token id {max(prompt):,}, and the model's vocabulary has {vocab_size:,} tokens",
            "it may be an image token, which this model does not support; leave it out",
        )
    if len(prompt) >= context:
        raise SlmError(f"the prompt has {len(prompt):,} tokens and the context {context:,}", "shorten the prompt")
    if not is_whole(request.max_new_tokens, 1, MAX_COUNT):
        raise SlmError(f"max_new_tokens is {request.max_new_tokens}; it must be from 1 to {MAX_COUNT:,}")
    if not 0 <= (request.logprobs or 0) <= vocab_size:
        raise SlmError(f"logprobs is {request.logprobs}; it must be from 0 to {vocab_size:,}, the vocabulary size")
    if request.on_full not in get_args(OnFull):
        raise SlmError(f'on_full is {request.on_full!r}; it must be "stop" or "slide"')
    if (
        request.keep and not 0 <= request.keep <= context - 2
    ):  # at least one other token must stay, with room for a new one
        raise SlmError(f"keep is {request.keep:,}; it must be from 0 to {context - 2:,}, the context minus two")
