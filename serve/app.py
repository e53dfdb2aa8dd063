"""OpenAI's HTTP interface over an engine (platform.openai.com/docs/api-reference).

Nothing of what is asked or answered is logged.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from slm.core.chat import Message, chat_ids
from slm.core.errors import SlmError
from slm.runtime.adapters import Adapter
from slm.runtime.model import Model
from slm.runtime.sampling import Sampling
from slm.runtime.streaming import Piece
from slm.serve.constraint import Grammars
from slm.serve.engine import Ask, Done, Engine, Full, Reason, Ticket
from slm.serve.metrics import Metrics
from slm.serve.schema import ChatRequest, CompletionRequest
from slm.serve.schema import Request as AnyRequest
from slm.version import __version__

log = logging.getLogger("slm.serve")

# OpenAI's words for how a text ended.
_FINISH: Mapping[Reason, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "deadline": "length",
}


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: Of its body.
        prompt_tokens: Of its prompt; None leaves it to the context.
        new_tokens: Of each answer; also what it gets when it does not say.
        seconds: Until its answers are cut off.
        texts: Answers it may ask for at once.
    """

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None
    new_tokens: int = 1024
    seconds: float = 300.0
    texts: int = 16


@dataclass
class Service:
    """What the interface serves.

    Attributes:
        model: The base.
        name: What requests call it.
        engine: Runs it.
        adapters: Others, by what requests call them.
        limits: What one request may take.
        keys: API keys, one of which a request must have; none, and everybody may ask.
        grace_s: How long answers under way may go on when the server is stopped.
    """

    model: Model
    name: str
    engine: Engine
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    limits: Limits = Limits()
    keys: Sequence[str] = ()
    grace_s: float = 30.0
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.grammars = Grammars(self.model.tokenizer, self.model.decoder.vocab_size, self.model.stop_token_ids)


class Refused(Exception):
    """A request that is not answered, in OpenAI's envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class _Text:
    """One answer under way: its events come into the queue."""

    ask: Ask
    events: "asyncio.Queue[Piece | Done]"
    ticket: Ticket | None = None
    asked: float = field(default_factory=time.monotonic)


def make_app(service: Service) -> FastAPI:
    """Returns the application; stopping it stops the engine."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close, service.grace_s)

    app = FastAPI(title="slm", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    _envelopes(app)
    app.add_middleware(_Guard, service=service)

    @app.get("/health")
    async def health() -> Response:
        failed = service.engine.failed
        return JSONResponse({"status": failed or "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        busy = service.engine.failed is not None
        return JSONResponse({"status": "not ready" if busy else "ready"}, 503 if busy else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service, name) for name in (service.name, *service.adapters)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _adapter(service, name)
        return _card(service, name)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, connection: Request) -> Response:
        messages = [
            Message(role="system" if each.role == "developer" else each.role, content=each.text)
            for each in request.messages
        ]
        try:
            ids = chat_ids(service.model.tokenizer, messages)
        except SlmError as error:
            raise Refused(400, _said(error), param="messages") from None
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        return await _answer(service, request, connection, [ids], limit, top, _Chat())

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, connection: Request) -> Response:
        if request.echo:
            raise Refused(400, "echo is not done here", param="echo")
        prompts = _prompts(service, request.prompt)
        return await _answer(service, request, connection, prompts, request.max_tokens, request.logprobs, _Completion())

    return app


class _Guard:
    """Checks keys and sizes before anything is read, and logs what became of each request.

    It stands around the application itself: what FastAPI calls a middleware would hide that a client has gone.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, name, status = time.monotonic(), uuid.uuid4().hex, 0

        async def told(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            refusal = _refusal_of(self._service, Request(scope))
            await (refusal or self._app)(scope, receive, told)
        finally:
            fields = {"request": name, "method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(fields | {"ms": round(1e3 * (time.monotonic() - started), 1)}))


def _refusal_of(service: Service, request: Request) -> Response | None:
    if service.keys and request.url.path.startswith("/v1/"):
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        # Every key is compared, so that how long it takes says nothing.
        if not sum(hmac.compare_digest(given, key.encode()) for key in service.keys):
            return _sent(
                Refused(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")
            )
    length = request.headers.get("content-length")
    if request.method == "POST":
        if length is None:
            return _sent(Refused(411, "the body must say how long it is (Content-Length)"))
        if not length.isdecimal() or int(length) > service.limits.body_bytes:
            return _sent(Refused(413, f"the body may have {service.limits.body_bytes:,} bytes"))
    return None


def _envelopes(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _sent(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = str(first["msg"]).removeprefix("Value error, ")
        return _sent(Refused(400, f"{where}: {message}" if where else message, param=where))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _sent(Refused(error.status_code, str(error.detail), headers=error.headers))

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error(json.dumps({"path": request.url.path, "error": f"{type(error).__name__}: {error}"}))
        return _sent(Refused(500, "something went wrong here", "server_error"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _sent(refused: Refused) -> JSONResponse:
    return JSONResponse(refused.body, refused.status, refused.headers)


def _said(error: SlmError) -> str:
    return error.message if error.hint is None else f"{error.message}; {error.hint}"


def _card(service: Service, name: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": service.started, "owned_by": "slm"}
    return card if name == service.name else card | {"parent": service.name}


def _adapter(service: Service, name: str) -> Adapter | None:
    if name == service.name:
        return None
    if name not in service.adapters:
        known = ", ".join((service.name, *service.adapters))
        raise Refused(404, f"there is no model {name!r}; there is {known}", param="model", code="model_not_found")
    return service.adapters[name]


def _prompts(service: Service, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    if isinstance(prompt, str):
        return [service.model.tokenizer.encode(prompt)]
    if not prompt:
        raise Refused(400, "the prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return [service.model.tokenizer.encode(each) if isinstance(each, str) else each for each in prompt]


class _Chat:
    """How chats are put into JSON."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, model: Model, pieces: Sequence[Piece]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text = model.tokenizer.text_of(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        known = [piece for piece in pieces if piece.token is not None]
        content = [
            entry(piece.token or 0, piece.logprob) | {"top_logprobs": [entry(*likely) for likely in piece.top]}
            for piece in known
        ]
        return {"content": content, "refusal": None}


class _Completion:
    """How completions are put into JSON."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> dict[str, Any] | None:
        return None

    def part(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, model: Model, pieces: Sequence[Piece]) -> dict[str, Any]:
        known = [piece for piece in pieces if piece.token is not None]
        texts = [model.tokenizer.text_of(piece.token or 0) for piece in known]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [piece.logprob for piece in known],
            "top_logprobs": [
                {model.tokenizer.text_of(token): value for token, value in piece.top} if piece.top else None
                for piece in known
            ],
            "text_offset": offsets,
        }


_Shape = _Chat | _Completion


async def _answer(
    service: Service,
    request: AnyRequest,
    connection: Request,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | None,
    logprobs: int | None,
    shape: _Shape,
) -> Response:
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
        choices.append({"index": index, **shape.whole(text), "logprobs": scores, "finish_reason": _FINISH[done.reason]})
    usage = _usage(prompts, [done for _, done in answers])
    return JSONResponse({**head, "object": shape.kind, "choices": choices, "usage": usage})


def _texts(
    service: Service,
    request: AnyRequest,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | None,
    logprobs: int | None,
) -> list[_Text]:
    limits, adapter = service.limits, _adapter(service, request.model)
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
                raise Refused(400, _said(error)) from None
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
            429, _said(error), "rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": after}
        ) from None
    except SlmError as error:
        _cancel(service, texts)
        if service.engine.failed:
            raise Refused(503, _said(error), "server_error") from None
        raise Refused(400, _said(error)) from None


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


def _check(done: Done) -> None:
    if done.reason == "error":
        raise Refused(500, "something went wrong here", "server_error")
    if done.reason == "cancelled":
        raise Refused(503, "the server is shutting down", "server_error")


def _usage(prompts: Sequence[Sequence[int]], done: Sequence[Done]) -> dict[str, Any]:
    read, written = sum(map(len, prompts)), sum(each.new_tokens for each in done)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in done)},
    }


async def _stream(
    service: Service, request: AnyRequest, texts: Sequence[_Text], shape: _Shape, head: Mapping[str, Any]
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
                yield event([choice(index, shape.part(None), _FINISH[found.reason])])
            elif found.text or text.ask.logprobs is not None:
                scores = None if text.ask.logprobs is None else shape.logprobs(service.model, [found])
                yield event([choice(index, shape.part(found.text), None, scores)])
        if usage_too:
            count = request.n or 1
            prompts = [text.ask.prompt for text in texts[::count]]
            yield event([], usage=_usage(prompts, [ended[index] for index in range(len(texts))]))
        yield "data: [DONE]\n\n"
    finally:  # a client that has gone is noticed here
        for task in tasks:
            task.cancel()
        _cancel(service, texts)
