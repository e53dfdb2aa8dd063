"""Handles completion requests: submits them to the engine, and sends the result whole or as a stream of events.

One event loop serves every client, so that nothing here may block it for long: work whose size depends on the request runs in
a thread, or in pieces.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as Connection
from fastapi import Response
from fastapi.responses import StreamingResponse

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.constraint import Busy
from slm.runtime.generation import Generation, Piece, Request, Result
from slm.runtime.guide import Constraint
from slm.runtime.sampling import Sampling
from slm.runtime.token_bytes import token_bytes
from slm.serve.engine import Closed
from slm.serve.errors import Refused, said
from slm.serve.events import Inbox, Post
from slm.serve.formatting import Shape, answer_of, choice, finish_of, usage_of
from slm.serve.log import record_answers
from slm.serve.queue import Full
from slm.serve.requests import ApiRequest
from slm.serve.service import Service
from slm.serve.tools import ToolUse

Value = TypeVar("Value")

# How often to check for a disconnected client, in seconds.
_LOOK_S = 0.5
# Requests with more characters, tokens and biases than this are processed in a thread: so many characters take up to 1.5 ms,
# and a request's texts, stop texts and biases add up.
_SHORT = 1024
# Threads for texts longer than this: tokenizing a megabyte of text takes hundreds of megabytes.
_LONG = 4096
_ASIDE = ThreadPoolExecutor(2, "slm-aside")
# Responses beyond this many bytes are sent in pieces of this size.
_LARGE = 1 << 18
# Normalization shortens a text by at most this factor, except for whitespace that it strips.
_SHRINKS = 4
# Keeps only the most likely token, as 0 does in OpenAI's API.
_LEAST_TOP_P = 1e-9
# The most pieces per event; with 20 log-probabilities each they take 5 ms to write.
_PIECES = 64


@dataclass(frozen=True)
class Completions:
    """The completions that one HTTP request asks for.

    Attributes:
        request: The request.
        prompts: Token ids; each prompt gets as many completions as the request wants.
        new_tokens: The most new tokens of each completion; None for the server's limit.
        logprobs: The number of most likely tokens per token; None for no log-probabilities.
        shape: The JSON format.
        tools: The tools that the completions may call; None for none.
    """

    request: ApiRequest
    prompts: Sequence[Sequence[int]]
    new_tokens: int | None
    logprobs: int | None
    shape: Shape
    tools: ToolUse | None = None

    @property
    def count(self) -> int:
        """The number of completions."""
        return len(self.prompts) * (self.request.n or 1)

    @property
    def size(self) -> int:
        """Tokens, characters and biases to process before the completions can run."""
        request = self.request
        biases = self.count * len(request.logit_bias or ())
        return sum(map(len, self.prompts)) + sum(map(len, request.stops)) + biases

    def generation(self, service: Service, index: int, constraint: Constraint | None) -> Request:
        """Returns the request of one completion to the engine."""
        limit, count = service.limits.new_tokens, self.request.n or 1
        return Request(
            prompt=self.prompts[index // count],
            sampling=_sampling(self.request, index % count),
            max_new_tokens=min(self.new_tokens or limit, limit),
            stop_tokens=() if self.request.ignore_eos else frozenset(service.model.stop_token_ids),
            stop=tuple(self.request.stops),
            logprobs=self.logprobs,
            constraint=constraint,
            shown=() if self.tools is None else self.tools.shown,
        )


@dataclass
class _Submitted:
    """The texts that one request submitted to the engine.

    Attributes:
        prompts: Token ids of each prompt.
        texts: The texts, in the order of the choices.
        inbox: Receives their events.
        ended: The result of each text, by index.
    """

    prompts: Sequence[Sequence[int]]
    texts: list[Generation]
    inbox: Inbox
    ended: dict[int, Result] = field(default_factory=dict)

    @property
    def logprobs(self) -> bool:
        """Whether the response includes log-probabilities."""
        return self.texts[0].request.logprobs is not None


async def answer(service: Service, connection: Connection, wanted: Completions) -> Response:
    """Runs the completions of a request and returns its response, whole or as a stream.

    Args:
        service: The served models and limits.
        connection: The HTTP request, which reports whether the client is still connected.
        wanted: The completions.

    Raises:
        Refused: If the request is invalid, or cannot be accepted now.
    """
    request, prompts, shape = wanted.request, wanted.prompts, wanted.shape
    adapter = adapter_of(service, request.model)
    _check_count(service, wanted.count, "n")
    _check_lengths(service, prompts)
    constraints = await _constraints(service, wanted)
    name = service.name if request.model is None else request.model
    head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": name}
    post = service.post(asyncio.get_running_loop())
    submit = partial(_submit, service, post, wanted, adapter, constraints)
    submitted = await aside(wanted.size, submit) if wanted.size > _SHORT else submit()
    record_answers(connection.scope, name, prompts, submitted.texts, submitted.ended)
    if request.stream:
        options = request.stream_options
        events = _stream(service, submitted, shape, head, options is not None and bool(options.include_usage))
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    try:
        choices, done = await _whole(service, submitted, shape, connection)
    finally:
        _cancel(service, submitted.texts)
    body = answer_of({**head, "object": shape.kind}, choices, usage=usage_of(prompts, done)).encode()
    if len(body) <= _LARGE:
        return Response(body, media_type="application/json")
    sizes = {"content-length": str(len(body))}
    return StreamingResponse(_cut(body), headers=sizes, media_type="application/json")


async def _cut(body: bytes) -> AsyncIterator[bytes]:
    """Yields a large response in pieces, between which the event loop serves other clients."""
    for start in range(0, len(body), _LARGE):
        yield body[start : start + _LARGE]


def adapter_of(service: Service, name: str | None) -> Adapter | None:
    """Returns the adapter that a request names as its model; None for the base model.

    Args:
        service: The served models.
        name: The request's model; it may be absent if there is only one.

    Raises:
        Refused: If the model does not exist, or the request names none of several models.
    """
    known = ", ".join((service.name, *service.adapters))
    if name is None and service.adapters:
        raise Refused(400, f"model is required: this server has {known}", param="model")
    if name is None or name == service.name:
        return None
    if name not in service.adapters:
        raise Refused(
            404,
            f"the model {name[:100]!r} does not exist; this server has {known}",
            param="model",
            code="model_not_found",
        )
    return service.adapters[name]


async def prompts_of(
    service: Service, prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]]
) -> list[list[int]]:
    """Returns the token ids of one or several prompts, given as texts or ids.

    Raises:
        Refused: If there is no prompt, or more than the limit.
    """
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    several: Sequence[Any] = [prompt] if one else prompt
    if not several or [] in several:
        raise Refused(400, "the prompt is empty", param="prompt")
    _check_count(service, len(several), "prompt")
    check_size(service, several, "prompt")
    encode = partial(_encoded, service, several)
    size = sum(len(each) for each in several if isinstance(each, str))
    return await aside(size, encode) if size > _SHORT else encode()


def _encoded(service: Service, prompts: Sequence[Any]) -> list[list[int]]:
    return [service.model.tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]


async def aside(size: int, function: Callable[[], Value]) -> Value:
    """Calls a function in a thread if it processes many characters or tokens; the largest share a few threads."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_ASIDE if size > _LONG else None, function)


def check_size(service: Service, texts: Sequence[object], param: str) -> None:
    """Rejects a text that cannot fit into the context, before it is tokenized.

    Raises:
        Refused: If the text is too long.
    """
    longest = token_bytes(service.model.tokenizer).longest
    most = _SHRINKS * longest * service.model.decoder.context
    for text in texts:
        if isinstance(text, str) and len(text) > most:
            raise Refused(
                400,
                f"a text of {len(text):,} characters is longer than the context of {service.model.decoder.context:,} tokens",
                param=param,
                code="context_length_exceeded",
            )


async def _constraints(service: Service, wanted: Completions) -> Sequence[Constraint | None]:
    """Returns the constraint of each completion."""
    request, texts, form = wanted.request, wanted.count, wanted.request.response_format
    if wanted.tools is None and (form is None or form.type == "text"):
        return [None] * texts
    if request.ignore_eos:
        with_what = "a JSON schema" if wanted.tools is None else "tools"
        raise Refused(400, f"ignore_eos is not supported with {with_what}", param="ignore_eos")
    param = "response_format"
    try:
        if wanted.tools is None:
            schema = None if form is None or form.json_schema is None else form.json_schema.schema_
            return await asyncio.wrap_future(service.grammars.submit(schema, texts))
        replies = wanted.tools.replies
        if replies.answer is not None:  # its error names this schema, and the limits of schemas apply
            await asyncio.wrap_future(service.grammars.submit(replies.answer, 0))
        param = "tools"
        return await asyncio.wrap_future(service.grammars.submit_calls(replies, texts))
    except Busy as error:
        raise _too_many(said(error), 2) from None
    except SlmError as error:
        raise Refused(400, said(error), param=param) from None


def _check_lengths(service: Service, prompts: Sequence[Sequence[int]]) -> None:
    context = service.model.decoder.context
    most = context - 1 if service.limits.prompt_tokens is None else min(context - 1, service.limits.prompt_tokens)
    for ids in prompts:
        if len(ids) > most:
            raise Refused(
                400,
                f"the prompt has {len(ids):,} tokens; the limit is {most:,}, in a context of {context:,}",
                param="prompt",
                code="context_length_exceeded",
            )


def _check_count(service: Service, answers: int, param: str) -> None:
    if answers > service.limits.texts:
        raise Refused(400, f"{answers:,} completions in one request; the limit is {service.limits.texts}", param=param)


def _sampling(request: ApiRequest, index: int) -> Sampling:
    """Returns the sampling settings. The defaults are OpenAI's, which keep every token."""
    seed = int(uuid.uuid4().int % 2**32) if request.seed is None else request.seed % 2**63
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        typical_p=1.0 if request.typical_p is None else request.typical_p,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias or 0.0 for token, bias in (request.logit_bias or {}).items()},
        seed=seed + index,
    )


def _submit(
    service: Service,
    post: Post,
    wanted: Completions,
    adapter: Adapter | None,
    constraints: Sequence[Constraint | None],
) -> _Submitted:
    """Submits all texts to the engine, or none."""
    inbox, texts = Inbox(), list[Generation]()
    try:
        for index, constraint in enumerate(constraints):
            request = wanted.generation(service, index, constraint)
            deadline = time.monotonic() + service.limits.seconds
            deliver = post.to(inbox, index)
            texts.append(service.engine.submit(request, deliver, adapter=adapter, deadline=deadline))
    except SlmError as error:
        _cancel(service, texts)
        raise _not_now(service, error) from None
    return _Submitted(wanted.prompts, texts, inbox)


def _not_now(service: Service, error: SlmError) -> Refused:
    if isinstance(error, Full):
        return _too_many(said(error), int(service.engine.expected_wait_s()))
    if isinstance(error, Closed):
        return Refused(503, said(error), "server_error")
    return Refused(400, said(error))


def _too_many(why: str, after_s: int) -> Refused:
    after = {"Retry-After": str(after_s)}
    return Refused(429, why, "rate_limit_error", code="rate_limit_exceeded", headers=after)


def _cancel(service: Service, texts: Sequence[Generation]) -> None:
    for text in texts:
        service.engine.cancel(text)


async def _whole(
    service: Service, submitted: _Submitted, shape: Shape, connection: Connection
) -> tuple[list[str], list[Result]]:
    """Returns the JSON of each text's choice, and its result. Stops if the client disconnects."""
    own = token_bytes(service.model.tokenizer)
    scores = [shape.scores(own) for _ in submitted.texts]
    done = submitted.ended
    clock = asyncio.get_running_loop().time
    look = clock() + _LOOK_S
    while len(done) < len(submitted.texts):
        if clock() >= look:
            if await connection.is_disconnected():
                raise Refused(499, "the client disconnected")
            look = clock() + _LOOK_S
        try:
            async with asyncio.timeout_at(look):
                events = await submitted.inbox.take(_PIECES)
        except TimeoutError:
            continue
        for index, event in events:
            if isinstance(event, Result):
                done[index] = event
            elif submitted.logprobs:
                scores[index].add(event)
        await asyncio.sleep(0)
    choices = []
    results = [done[index] for index in range(len(submitted.texts))]
    for index, result in enumerate(results):
        _check(service, result)
        told = scores[index].taken() if submitted.logprobs else None
        content = shape.whole(result.text)
        choices.append(choice(index, content, finish_of(result, content), told))
    return choices, results


def _check(service: Service, result: Result) -> None:
    if result.stopped == "error":
        if service.engine.failed is None and result.error is not None:
            raise Refused(400, result.error)
        raise Refused(500, "internal server error", "server_error")
    if result.stopped == "stalled":
        raise Refused(503, result.error or "the engine is stuck", "server_error")
    if result.stopped == "cancelled":
        raise Refused(503, "the server is shutting down", "server_error")
    if result.stopped == "deadline" and not result.ttft_ms:
        raise Refused(503, f"no token was generated within {service.limits.seconds:g} seconds", "server_error")


async def _stream(
    service: Service, submitted: _Submitted, shape: Shape, head: Mapping[str, Any], usage_too: bool
) -> AsyncIterator[bytes]:
    """Yields server-sent events. An event has all pieces of a text since the previous event, often several tokens."""

    def event(choices: list[str], **more: Any) -> bytes:
        usage = {"usage": None} if usage_too else {}
        return b"data: %s\n\n" % answer_of({**head, "object": shape.chunk}, choices, **(usage | more)).encode()

    own = token_bytes(service.model.tokenizer)
    scores = [shape.scores(own) for _ in submitted.texts]
    readers = [shape.reader() for _ in submitted.texts]
    called: set[int] = set()

    def written(index: int, pieces: Sequence[Piece]) -> bytes:
        contents = readers[index].read("".join(piece.text for piece in pieces))
        told = None
        if submitted.logprobs:
            for piece in pieces:
                scores[index].add(piece)
            told, contents = scores[index].taken(), contents or [shape.part("")]
        return sent(index, contents, told)

    def sent(index: int, contents: Sequence[Mapping[str, Any]], told: str | None = None) -> bytes:
        events = []
        for content in contents:
            if "tool_calls" in content.get("delta", ()):
                called.add(index)
            events.append(event([choice(index, content, None, told)]))
            told = None
        return b"".join(events)

    ended = submitted.ended
    try:
        opening = shape.opening()
        if opening is not None:
            yield event([choice(index, opening) for index in range(len(submitted.texts))])
        while len(ended) < len(submitted.texts):
            pieces: dict[int, list[Piece]] = {}
            ends: dict[int, Result] = {}
            for index, found in await submitted.inbox.take(_PIECES):
                if isinstance(found, Result):
                    ends[index] = found
                else:
                    pieces.setdefault(index, []).append(found)
            parts = [written(index, some) for index, some in pieces.items()]
            ended |= ends
            for index, end in ends.items():
                try:
                    _check(service, end)
                except Refused as refused:
                    yield b"".join(parts) + b"data: %s\n\n" % json.dumps(refused.body).encode()
                    return
                parts.append(sent(index, readers[index].finish()))
                content = shape.part(None)
                parts.append(event([choice(index, content, finish_of(end, content, index in called))]))
            if chunk := b"".join(parts):
                yield chunk
            await asyncio.sleep(0)
        if usage_too:
            yield event([], usage=usage_of(submitted.prompts, [ended[index] for index in range(len(ended))]))
        yield b"data: [DONE]\n\n"
    finally:  # also runs when the client disconnects
        _cancel(service, submitted.texts)
