"""From a request to its answer: asked of the engine, then whole or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.sampling import Sampling
from slm.runtime.streaming import Piece
from slm.serve.constraint import JsonConstraint
from slm.serve.engine import Ask, Closed, Done, Full, Ticket
from slm.serve.inbox import Inbox
from slm.serve.log import record_answers
from slm.serve.refusals import Refused, said
from slm.serve.schema import Request as AnyRequest
from slm.serve.service import Service
from slm.serve.shapes import FINISH, Shape, usage_of

Value = TypeVar("Value")

# How often it is looked whether somebody who waits for a whole answer is still there.
_LOOK_S = 0.5
# Texts longer than this, in characters, are cut into tokens beside the event loop, which has others to serve.
_LONG = 4096


@dataclass
class _Asked:
    """What was asked of the engine.

    Attributes:
        prompts: Token ids of each prompt.
        texts: What was asked, in the order of the answers.
        tickets: And what the engine gave for it.
        inbox: Where the answers come.
        ended: How each text ended, by its index.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[Ask]
    tickets: list[Ticket]
    inbox: Inbox
    ended: dict[int, Done] = field(default_factory=dict)

    @property
    def logprobs(self) -> bool:
        """Whether tokens are to be told with how likely they were."""
        return self.texts[0].logprobs is not None


async def answer(
    service: Service,
    request: AnyRequest,
    connection: Request,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | None,
    logprobs: int | None,
    shape: Shape,
) -> Response:
    """Answers a request, whole or as a stream.

    Args:
        service: What answers.
        request: What was asked.
        connection: Tells whether the client is still there.
        prompts: Token ids; each gets as many answers as the request wants.
        new_tokens: At most, for each answer.
        logprobs: How many of the likeliest tokens are named; None for none of it.
        shape: Of the JSON.

    Raises:
        Refused: When it cannot be answered, or not now.
    """
    texts = await _texts(service, request, prompts, new_tokens, logprobs)
    head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": request.model}
    asked = _submit(service, prompts, texts)
    record_answers(connection.scope, request.model, prompts, asked.tickets, asked.ended)
    if request.stream:
        options = request.stream_options
        events = _stream(service, asked, shape, head, options is not None and options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    try:
        pieces, done = await _whole(asked, connection)
    finally:
        _cancel(service, asked.tickets)
    choices = []
    for index, (parts, end) in enumerate(zip(pieces, done, strict=True)):
        _check(service, end)
        scores = shape.logprobs(service.model, parts)[0] if asked.logprobs else None
        text = "".join(piece.text for piece in parts)
        choices.append({"index": index, **shape.whole(text), "logprobs": scores, "finish_reason": FINISH[end.reason]})
    body = {**head, "object": shape.kind, "choices": choices, "usage": usage_of(prompts, done)}
    return Response(json.dumps(body), media_type="application/json")


def adapter_of(service: Service, name: str) -> Adapter | None:
    """Returns the adapter that a request calls its model; None for the base.

    Raises:
        Refused: When there is no such model.
    """
    if name == service.name:
        return None
    if name not in service.adapters:
        known = ", ".join((service.name, *service.adapters))
        raise Refused(404, f"there is no model {name[:100]!r}; there is {known}", param="model", code="model_not_found")
    return service.adapters[name]


async def prompts_of(
    service: Service, prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]]
) -> list[list[int]]:
    """Returns the token ids of a prompt or several, texts or ids.

    Raises:
        Refused: When there is none, or more than may be answered at once.
    """
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
    several: Sequence[Any] = [prompt] if one else prompt
    if not several or [] in several:
        raise Refused(400, "the prompt is empty", param="prompt")
    _check_count(service, len(several), "prompt")
    encode = service.model.tokenizer.encode
    return [await aside(len(each), partial(encode, each)) if isinstance(each, str) else each for each in several]


async def aside(size: int, function: Callable[[], Value]) -> Value:
    """Calls what works on so many characters: beside the event loop where there are many."""
    return await asyncio.to_thread(function) if size > _LONG else function()


async def _texts(
    service: Service,
    request: AnyRequest,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | None,
    logprobs: int | None,
) -> list[Ask]:
    limits, adapter = service.limits, adapter_of(service, request.model)
    count = request.n or 1
    _check_count(service, len(prompts) * count, "n")
    if new_tokens is not None and new_tokens > limits.new_tokens:
        raise Refused(400, f"at most {limits.new_tokens:,} new tokens", param="max_tokens")
    for ids in prompts:
        if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
            raise Refused(
                400, f"the prompt has {len(ids):,} tokens; {limits.prompt_tokens:,} are possible", param="prompt"
            )
    constraints: Sequence[JsonConstraint | None] = [None] * (len(prompts) * count)
    form = request.response_format
    if form is not None and form.type != "text":
        if request.ignore_eos:
            raise Refused(400, "an answer that keeps to a schema ends where it is complete", param="ignore_eos")
        schema = None if form.json_schema is None else form.json_schema.schema_
        try:
            constraints = await asyncio.to_thread(service.grammars.json, schema, len(constraints))
        except SlmError as error:
            raise Refused(400, said(error), param="response_format") from None
    try:
        return [
            Ask(
                prompt=tuple(ids),
                sampling=_sampling(request, index),
                max_new_tokens=new_tokens or limits.new_tokens,
                stop=tuple(request.stops),
                logprobs=logprobs,
                adapter=adapter,
                constraint=constraints[place * count + index],
                ignore_end=bool(request.ignore_eos),
                deadline=time.monotonic() + limits.seconds,
            )
            for place, ids in enumerate(prompts)
            for index in range(count)
        ]
    except SlmError as error:
        raise Refused(400, said(error)) from None


def _check_count(service: Service, answers: int, param: str) -> None:
    if answers > service.limits.texts:
        raise Refused(400, f"{answers:,} answers at once; {service.limits.texts} are possible", param=param)


def _sampling(request: AnyRequest, index: int) -> Sampling:
    """Returns how tokens are chosen: OpenAI's defaults, which keep every token, where nothing else is said."""
    seed = int(uuid.uuid4().int % 2**32) if request.seed is None else request.seed % 2**63
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        typical_p=1.0 if request.typical_p is None else request.typical_p,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        seed=seed + index,
    )


def _submit(service: Service, prompts: Sequence[Sequence[int]], texts: Sequence[Ask]) -> _Asked:
    """Asks for all of them, or for none."""
    inbox, tickets = Inbox(), []
    post = service.post(asyncio.get_running_loop())
    try:
        for index, text in enumerate(texts):
            tickets.append(service.engine.submit(text, post.to(inbox, index)))
    except SlmError as error:
        _cancel(service, tickets)
        raise _not_now(service, error) from None
    return _Asked(prompts, texts, tickets, inbox)


def _not_now(service: Service, error: SlmError) -> Refused:
    if isinstance(error, Full):
        after = {"Retry-After": str(int(service.engine.expected_wait_s()))}
        return Refused(429, said(error), "rate_limit_error", code="rate_limit_exceeded", headers=after)
    if isinstance(error, Closed):
        return Refused(503, said(error), "server_error")
    return Refused(400, said(error))


def _cancel(service: Service, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        service.engine.cancel(ticket)


async def _whole(asked: _Asked, connection: Request) -> tuple[list[list[Piece]], list[Done]]:
    """Returns all pieces of each text, and how it ended. Somebody who has gone is not answered."""
    pieces: list[list[Piece]] = [[] for _ in asked.texts]
    done = asked.ended
    clock = asyncio.get_running_loop().time
    look = clock() + _LOOK_S
    while len(done) < len(asked.texts):
        if clock() >= look:
            if await connection.is_disconnected():
                raise Refused(499, "the client is gone")
            look = clock() + _LOOK_S
        try:
            async with asyncio.timeout_at(look):
                events = await asked.inbox.take()
        except TimeoutError:
            continue
        for index, event in events:
            if isinstance(event, Done):
                done[index] = event
            else:
                pieces[index].append(event)
    return pieces, [done[index] for index in range(len(pieces))]


def _check(service: Service, done: Done) -> None:
    if done.reason == "error":
        if service.engine.failed is None and done.error is not None:
            raise Refused(400, done.error)
        raise Refused(500, "something went wrong here", "server_error")
    if done.reason == "stalled":
        raise Refused(503, done.error or "the engine is stuck", "server_error")
    if done.reason == "cancelled":
        raise Refused(503, "the server is shutting down", "server_error")
    if done.reason == "deadline" and done.ttft_s is None:
        raise Refused(503, f"nothing was answered within {service.limits.seconds:g} seconds", "server_error")


async def _stream(
    service: Service, asked: _Asked, shape: Shape, head: Mapping[str, Any], usage_too: bool
) -> AsyncIterator[bytes]:
    """Yields server-sent events: for each text what has come of it since the last ones, several tokens where there are."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        body = {**head, "object": shape.chunk, "choices": choices} | ({"usage": None} if usage_too else {}) | more
        return b"data: %s\n\n" % json.dumps(body).encode()

    def choice(index: int, content: dict[str, Any], reason: str | None = None, scores: Any = None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": scores, "finish_reason": reason}

    lengths = [0] * len(asked.texts)  # of the tokens that were told with how likely they were, in characters

    def written(index: int, pieces: Sequence[Piece]) -> bytes:
        text, scores = "".join(piece.text for piece in pieces), None
        if asked.logprobs:
            scores, lengths[index] = shape.logprobs(service.model, pieces, lengths[index])
        elif not text:
            return b""
        return event([choice(index, shape.part(text), None, scores)])

    ended = asked.ended
    try:
        opening = shape.opening()
        if opening is not None:
            yield event([choice(index, opening) for index in range(len(asked.texts))])
        while len(ended) < len(asked.texts):
            pieces: dict[int, list[Piece]] = {}
            ends: dict[int, Done] = {}
            for index, found in await asked.inbox.take():
                if isinstance(found, Done):
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
                parts.append(event([choice(index, shape.part(None), FINISH[end.reason])]))
            if chunk := b"".join(parts):
                yield chunk
        if usage_too:
            yield event([], usage=usage_of(asked.prompts, [ended[index] for index in range(len(ended))]))
        yield b"data: [DONE]\n\n"
    finally:  # a client that has gone is noticed here
        _cancel(service, asked.tickets)
