"""OpenAI's HTTP interface over an engine (platform.openai.com/docs/api-reference)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from slm.core.chat import Message, chat_ids
from slm.core.errors import SlmError
from slm.serve.answers import adapter_of, answer, prompts_of
from slm.serve.guard import Guard
from slm.serve.refusals import Refused, add_envelopes, said
from slm.serve.schema import ChatRequest, CompletionRequest
from slm.serve.service import Service
from slm.serve.shapes import Chat, Completion, card
from slm.version import __version__


def make_app(service: Service) -> FastAPI:
    """Returns the application; stopping it stops the engine."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close, service.grace_s)

    app = FastAPI(title="slm", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    add_envelopes(app)
    app.add_middleware(Guard, service=service)

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
        return {"object": "list", "data": [card(service, name) for name in (service.name, *service.adapters)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        adapter_of(service, name)
        return card(service, name)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, connection: Request) -> Response:
        messages = [
            Message(role="system" if each.role == "developer" else each.role, content=each.text)
            for each in request.messages
        ]
        try:
            ids = chat_ids(service.model.tokenizer, messages)
        except SlmError as error:
            raise Refused(400, said(error), param="messages") from None
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        return await answer(service, request, connection, [ids], limit, top, Chat())

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, connection: Request) -> Response:
        if request.echo:
            raise Refused(400, "echo is not done here", param="echo")
        prompts = prompts_of(service, request.prompt)
        return await answer(service, request, connection, prompts, request.max_tokens, request.logprobs, Completion())

    return app
