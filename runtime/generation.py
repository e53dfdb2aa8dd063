"""One text as a state machine: logits go in, pieces of text come out.

A `Generation` knows no decoder. Two drivers feed it: `slm.runtime.streaming.run` for one text on any backend, and
`slm.runtime.scheduler.Scheduler` for many texts on one bundle. It needs neither onnxruntime nor torch.

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
from slm.core.tokenizer import TextStream, Tokenizer
from slm.runtime.guide import Constraint, Guide
from slm.runtime.logprobs import Logprobs, logprobs_of
from slm.runtime.sampling import Sampler, Sampling
from slm.runtime.stopping import StopTexts
from slm.runtime.token_bytes import token_bytes

Array = NDArray[Any]
OnFull = Literal["stop", "slide"]
StopReason = Literal["end", "stop", "length", "context", "interrupted", "cancelled", "deadline", "error", "stalled"]


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        max_new_tokens: The most new tokens.
        stop_tokens: Tokens that end the text; they are not part of it.
        stop: Texts that end the text; they are not part of it.
        logprobs: How many of the likeliest tokens each piece names; None records no log-probabilities.
        on_full: What to do when the context is full: stop, or slide, which drops the older part (`what_stays`) and reads
            the rest again from position 0. The model no longer sees what was dropped.
        keep: Tokens at the beginning that sliding never drops.
        constraint: What the text must follow; None for nothing.
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


@dataclass(frozen=True)
class Piece:
    """A token, and the text that became certain with it.

    The texts of all pieces are the whole text. One is empty while a character is incomplete, or a stop text may have begun.

    Attributes:
        text: Whole characters; those that earlier tokens began come with the one that completes them.
        token: The token; None in a last piece, for text that was held back when the text ended.
        logprob: The natural logarithm of its probability in the model's own distribution, before bias, penalties,
            temperature and all else in `Sampling`; None unless requested.
        top: The likeliest tokens there, with theirs, likeliest first; as many as were requested.
        raw: The token's own bytes, also where it is part of a character; of a special token, those of its spelling.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    raw: bytes = b""


@dataclass(frozen=True)
class Result:
    """A generated text and how it was generated.

    Attributes:
        text: The new text; empty where no tokenizer was given.
        prompt_tokens: Tokens of the prompt.
        tokens: The new tokens without the end token. Those of a stop text are included: it may begin within a token.
        logprobs: How likely each new token was, where that was requested.
        stopped: Why the text ended: an end token, a stop text, `max_new_tokens`, or a full context; "interrupted" until then,
            by Ctrl-C or because the iterator was not read to its end. A server also ends texts as "cancelled", at a
            "deadline", with an "error", or because a step has "stalled".
        seed: Seed of the sampling; None for greedy decoding.
        slides: How often the context was full and its older part was dropped.
        reused_tokens: Tokens of the prompt that were not read, because an earlier text began with them.
        waited_s: Seconds from the request to the beginning of the prompt.
        ttft_ms: Milliseconds from the beginning of the prompt to the first new token; 0 where there was none.
        took_s: Seconds from the request to the end.
        decode_s: Seconds that the steps after the first token took, without the time between steps.
        steps: New tokens chosen in `decode_s`.
        error: What went wrong, where something did.
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
        """Prompt tokens read a second; 0 where there was no new token."""
        return self.prompt_tokens / (self.ttft_ms / 1e3) if self.ttft_ms else 0.0

    @property
    def decode_tok_s(self) -> float | None:
        """New tokens a second after the first; None when there were no steps to time."""
        return self.steps / self.decode_s if self.steps else None


class Generation:
    """A request and how far it has come.

    A driver calls `begin`, then repeats: the model reads `unread` (after a reset when `slid`), and `feed` takes the logits of
    the last of these tokens and returns the pieces that they lead to, until `done`. While `waiting`, `resume` takes the place
    of reading and feeding.

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
            request: What to generate.
            context: The model's context, in tokens.
            vocab_size: The number of its logits.
            tokenizer: Makes text of tokens; without it pieces have no text, and stop texts are not possible.
            stops: The request's stop texts, where they have been read before; a fresh copy.
            choose: Chooses the next token by logits (V,), in place of the request's sampling.

        Raises:
            SlmError: When the prompt is empty, has tokens that the model lacks or fills the context, or an option is out of
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
        self._next = choose or Sampler(request.sampling, request.prompt, vocab_size).choose
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._raw = None if tokenizer is None else token_bytes(tokenizer)
        self._stops = stops or StopTexts(request.stop, tokenizer)
        self._guide: Guide | None = None
        self._held: tuple[Array, float] | None = None  # logits that wait for the guide, and when their step began
        self._read: list[int] = []  # since the last reset
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
    def slid(self) -> bool:
        """Whether the model has to forget what it read before it reads `unread`."""
        return bool(self._slides) and not self._read

    @property
    def waiting(self) -> bool:
        """Whether the text waits for its constraint: for the tokens allowed next, or to know whether its last completes it."""
        return self._guide is not None and (self._held is not None or self._full() is not None)

    def begin(self, threads: Executor | None = None) -> None:
        """Starts the clock, and the constraint where there is one.

        Args:
            threads: Where the constraint computes; None computes in the calling thread.
        """
        self._begun = time.perf_counter()
        if self.request.constraint is not None:
            self._guide = Guide(self.request.constraint, threads)

    def feed(self, logits: Array, began: float, patience_s: float = 0.0) -> list[Piece]:
        """Takes the logits (V,) after `unread`, and chooses the next token.

        Args:
            logits: They are not changed, and copied where they are needed later.
            began: When the step that computed them began, in seconds of `time.perf_counter`.
            patience_s: How long to wait for the constraint, in seconds; after that the text is `waiting`.

        Raises:
            SlmError: When no token can be chosen, or the constraint cannot be followed further.
        """
        self._read += self.unread
        if self._guide is not None and not self._guide.ready(patience_s):
            self._held = logits.copy(), began
            return []
        return self._choose(logits, began)

    def resume(self, patience_s: float = 0.0) -> list[Piece]:
        """Goes on with a text that is `waiting`, where its constraint is ready within `patience_s` seconds; see `feed`."""
        assert self._guide is not None
        if not self._guide.ready(patience_s):
            return []
        held, self._held = self._held, None
        if held is not None:
            return self._choose(*held)
        return self.end("end" if self._guide.complete else self._full() or "length")

    def end(self, reason: StopReason, error: str | None = None) -> list[Piece]:
        """Ends the text; returns one more piece where text was held back."""
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
            )  # a constraint first says whether it is complete
        if len(self._read) >= self._context:
            self.unread, self._read = [*what_stays(self._read, request.keep), token], []
            self._slides += 1
        return [piece]

    def _full(self) -> StopReason | None:
        """Returns why the text can have no further token, or None."""
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
    """Returns what a full context keeps when it slides: its first `keep` tokens and the later half of the rest."""
    rest = read[keep:]
    return [*read[:keep], *rest[len(rest) - len(rest) // 2 :]]


def _check(request: Request, context: int, vocab_size: int) -> None:
    """Raises an SlmError when a request cannot be generated from; see `Generation`."""
    prompt = request.prompt
    if not prompt:
        raise SlmError("the prompt has no tokens", "give some text")
    if min(prompt) < 0:
        raise SlmError(f"the prompt has a token of id {min(prompt):,}", f"ids are from 0 to {vocab_size - 1:,}")
    if max(prompt) >= vocab_size:
        raise SlmError(
            f"the prompt has a token of id {max(prompt):,}, and the model {vocab_size:,} of them",
            "a token for pictures, perhaps, which this model does not see; leave it out",
        )
    if len(prompt) >= context:
        raise SlmError(f"the prompt has {len(prompt):,} tokens and the context {context:,}", "shorten the prompt")
    if not is_whole(request.max_new_tokens, 1, MAX_COUNT):
        raise SlmError(f"max_new_tokens is {request.max_new_tokens}; it must be from 1 to {MAX_COUNT:,}")
    if not 0 <= (request.logprobs or 0) <= vocab_size:
        raise SlmError(f"logprobs is {request.logprobs}; it must be from 0 to {vocab_size:,}, the tokens of the model")
    if request.on_full not in get_args(OnFull):
        raise SlmError(f'on_full is {request.on_full!r}; it must be "stop" or "slide"')
    if request.keep and not 0 <= request.keep <= context - 2:  # one of the others must stay, with room for a new one
        raise SlmError(f"keep is {request.keep:,}; it must be from 0 to {context - 2:,}, the context less two")
