"""From a request to its answer: asked of the engine, then whole or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.sampling import Sampling
from slm.runtime.streaming import Piece
from slm.serve.engine import Ask, Done, Full, Ticket
from slm.serve.refusals import Refused, said
from slm.serve.schema import Request as AnyRequest
from slm.serve.service import Service
from slm.serve.shapes import FINISH, Shape, usage_of


@dataclass
class _Text:
    """One answer under way: its events come into the queue."""

    ask: Ask
    events: "asyncio.Queue[Piece | Done]"
    ticket: Ticket | None = None
    asked: float = field(default_factory=time.monotonic)


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
    texts = _texts(service, request, prompts, new_tokens, logprobs)
    head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": request.model}
    _submit(service, texts)
    if request.stream:
        events = _stream(service, request, texts, shape, head)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    waiting = asyncio.ensure_future(_all(service, texts))
    try:
        while not waiting.done():  # somebody who has gone is not answered
            await asyncio.wait([waiting], timeout=0.5)
            if not waiting.done() and await connection.is_disconnected():
                raise Refused(499, "the client is gone")
        answers = waiting.result()
    finally:
        waiting.cancel()
        _cancel(service, texts)
    choices = []
    for index, (pieces, done) in enumerate(answers):
        _check(done)
        scores = None if logprobs is None else shape.logprobs(service.model, pieces)
        text = "".join(piece.text for piece in pieces)
        choices.append({"index": index, **shape.whole(text), "logprobs": scores, "finish_reason": FINISH[done.reason]})
    usage = usage_of(prompts, [done for _, done in answers])
    return JSONResponse({**head, "object": shape.kind, "choices": choices, "usage": usage})


def adapter_of(service: Service, name: str) -> Adapter | None:
    """Returns the adapter that a request calls its model; None for the base.

    Raises:
        Refused: When there is no such model.
    """
    if name == service.name:
        return None
    if name not in service.adapters:
        known = ", ".join((service.name, *service.adapters))
        raise Refused(404, f"there is no model {name!r}; there is {known}", param="model", code="model_not_found")
    return service.adapters[name]


def prompts_of(service: Service, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """Returns the token ids of a prompt or several, texts or ids."""
    if isinstance(prompt, str):
        return [service.model.tokenizer.encode(prompt)]
    if not prompt:
        raise Refused(400, "the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return [service.model.tokenizer.encode(each) if isinstance(each, str) else each for each in prompt]


def _texts(
    service: Service,
    request: AnyRequest,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | None,
    logprobs: int | None,
) -> list[_Text]:
    limits, adapter = service.limits, adapter_of(service, request.model)
    count = request.n or 1
    if len(prompts) * count > limits.texts:
        raise Refused(400, f"{len(prompts) * count} answers at once; {limits.texts} are possible", param="n")
    if new_tokens is not None and new_tokens > limits.new_tokens:
        raise Refused(400, f"at most {limits.new_tokens:,} new tokens", param="max_tokens")
    for ids in prompts:
        if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
            raise Refused(
                400, f"the prompt has {len(ids):,} tokens; {limits.prompt_tokens:,} are possible", param="prompt"
            )
    form = request.response_format
    texts = []
    for ids in prompts:
        for index in range(count):
            try:
                constraint = None
                if form is not None and form.type != "text":
                    constraint = service.grammars.json(None if form.json_schema is None else form.json_schema.schema_)
                ask = Ask(
                    prompt=tuple(ids),
                    sampling=_sampling(request, index),
                    max_new_tokens=new_tokens or limits.new_tokens,
                    stop=tuple(request.stops),
                    logprobs=logprobs,
                    adapter=adapter,
                    constraint=constraint,
                    deadline=time.monotonic() + limits.seconds,
                )
            except SlmError as error:
                raise Refused(400, said(error)) from None
            texts.append(_Text(ask, asyncio.Queue()))
    return texts


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


def _submit(service: Service, texts: Sequence[_Text]) -> None:
    """Asks for all of them, or for none."""
    loop = asyncio.get_running_loop()
    try:
        for text in texts:
            text.ticket = service.engine.submit(text.ask, _into(loop, text.events))
    except Full as error:
        _cancel(service, texts)
        after = str(int(service.engine.expected_wait_s()))
        raise Refused(
            429, said(error), "rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": after}
        ) from None
    except SlmError as error:
        _cancel(service, texts)
        if service.engine.failed:
            raise Refused(503, said(error), "server_error") from None
        raise Refused(400, said(error)) from None


def _into(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Piece | Done]") -> Callable[[Piece | Done], None]:
    def deliver(event: Piece | Done) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    return deliver


def _cancel(service: Service, texts: Sequence[_Text]) -> None:
    for text in texts:
        if text.ticket is not None:
            service.engine.cancel(text.ticket)


async def _all(service: Service, texts: Sequence[_Text]) -> list[tuple[list[Piece], Done]]:
    return [await _whole(service, text) for text in texts]


async def _whole(service: Service, text: _Text) -> tuple[list[Piece], Done]:
    pieces: list[Piece] = []
    while True:
        event = await text.events.get()
        if isinstance(event, Done):
            service.metrics.ended(event, time.monotonic() - text.asked)
            return pieces, event
        pieces.append(event)


async def _stream(
    service: Service, request: AnyRequest, texts: Sequence[_Text], shape: Shape, head: Mapping[str, Any]
) -> AsyncIterator[str]:
    """Yields server-sent events; pieces of several answers come as they come."""
    options = request.stream_options
    usage_too = options is not None and options.include_usage

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**head, "object": shape.chunk, "choices": choices} | ({"usage": None} if usage_too else {}) | more
        return f"data: {json.dumps(body)}\n\n"

    def choice(index: int, content: dict[str, Any], reason: str | None = None, scores: Any = None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": scores, "finish_reason": reason}

    merged: asyncio.Queue[tuple[int, Piece | Done]] = asyncio.Queue()

    async def forward(index: int, text: _Text) -> None:
        while True:
            found = await text.events.get()
            merged.put_nowait((index, found))
            if isinstance(found, Done):
                return

    tasks = [asyncio.ensure_future(forward(index, text)) for index, text in enumerate(texts)]
    ended: dict[int, Done] = {}
    try:
        opening = shape.opening()
        if opening is not None:
            yield event([choice(index, opening) for index in range(len(texts))])
        while len(ended) < len(texts):
            index, found = await merged.get()
            text = texts[index]
            if isinstance(found, Done):
                ended[index] = found
                service.metrics.ended(found, time.monotonic() - text.asked)
                try:
                    _check(found)
                except Refused as error:
                    yield f"data: {json.dumps(error.body)}\n\n"
                    return
                yield event([choice(index, shape.part(None), FINISH[found.reason])])
            elif found.text or text.ask.logprobs is not None:
                scores = None if text.ask.logprobs is None else shape.logprobs(service.model, [found])
                yield event([choice(index, shape.part(found.text), None, scores)])
        if usage_too:
            count = request.n or 1
            prompts = [text.ask.prompt for text in texts[::count]]
            yield event([], usage=usage_of(prompts, [ended[index] for index in range(len(texts))]))
        yield "data: [DONE]\n\n"
    finally:  # a client that has gone is noticed here
        for task in tasks:
            task.cancel()
        _cancel(service, texts)


def _check(done: Done) -> None:
    if done.reason == "error":
        raise Refused(500, "something went wrong here", "server_error")
    if done.reason == "cancelled":
        raise Refused(503, "the server is shutting down", "server_error")
