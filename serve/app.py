"""OpenAI's HTTP API over an engine (platform.openai.com/docs/api-reference)."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from slm.core.chat import chat_ids
from slm.core.errors import SlmError
from slm.core.tools import arguments_text
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.token_bytes import token_bytes
from slm.serve.access import Access
from slm.serve.body import read
from slm.serve.completions import Completions, adapter_of, answer, check_size, prompts_of
from slm.serve.docs_page import HEADERS, docs_page
from slm.serve.errors import Refused, add_envelopes, said
from slm.serve.formatting import ChatShape, CompletionShape, ToolShape, card
from slm.serve.middleware import Guard
from slm.serve.openapi import body_of, describe
from slm.serve.requests import ChatRequest, CompletionRequest
from slm.serve.responses import (
    TURNED_AWAY,
    Card,
    Cards,
    ChatCompletion,
    Status,
    TextCompletion,
    answered_or_refused,
    refused,
)
from slm.serve.service import Service
from slm.serve.tools import ToolUse, declared_tools, messages_of, tool_use
from slm.version import __version__
from slm.web.mount import mount, paths_of
from slm.web.site import Site, server_site

# Chats that are rendered and tokenized at the same time; others wait.
_CHATS = 8
# Paths that need no key, in addition to those of the page.
_PUBLIC = ("/health", "/ready", "/metrics", "/openapi.json", "/docs")


def make_app(service: Service) -> FastAPI:
    """Returns the application; stopping it stops the engine."""
    _warm(service)

    # A model's chat template may take seconds. It runs outside the event loop, and not in the threads of other requests.
    chats = ThreadPoolExecutor(_CHATS, "slm-chat")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop()
        chats.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(service.engine.close, service.grace_s)
        service.grammars.close()

    app = FastAPI(
        title="slm",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect's target would contain the Host header
    )
    add_envelopes(app)
    site = _page(service)
    access = Access(service.keys, service.hosts, service.origins, public={*_PUBLIC, *paths_of(site)})
    app.add_middleware(Guard, service=service, access=access)
    _add_status(app, service)
    _add_models(app, service)

    @app.get("/docs", response_class=HTMLResponse, responses={200: {"content": {"text/html": {}}}})
    async def docs() -> Response:
        return Response(page, headers=dict(HEADERS), media_type="text/html")

    _add_completions(app, service, chats)
    mount(app, site)
    description = describe(app.openapi(), keys=bool(service.keys))
    page = docs_page(description)
    # The description is built before the first request: it would block the event loop for too long.
    app.openapi = lambda: description  # type: ignore[method-assign]  # FastAPI documents this assignment
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    """Adds the probes and the metrics."""
    unwell: dict[int | str, dict[str, Any]] = {
        503: {"model": Status, "description": "the engine has ended or is stuck"}
    }

    @app.get("/health", response_model=Status, responses=unwell)
    async def health() -> Response:
        failed = service.engine.failed or service.engine.stalled
        return JSONResponse({"status": failed or "ok"}, 503 if failed else 200)

    @app.get("/ready", response_model=Status, responses=unwell)
    async def ready() -> Response:
        reason = service.engine.unavailable
        return JSONResponse({"status": f"not ready: {reason}" if reason else "ready"}, 503 if reason else 200)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_models(app: FastAPI, service: Service) -> None:
    """Adds the list of models."""

    @app.get("/v1/models", response_model=Cards, responses=refused(401, *TURNED_AWAY))
    async def models() -> Response:
        names = (service.name, *service.adapters)
        return JSONResponse({"object": "list", "data": [card(service, name) for name in names]})

    @app.get("/v1/models/{name:path}", response_model=Card, responses=refused(401, 404, *TURNED_AWAY))
    async def model(name: str) -> Response:
        adapter_of(service, name)
        return JSONResponse(card(service, name))


def _add_completions(app: FastAPI, service: Service, chats: ThreadPoolExecutor) -> None:
    """Adds chats and completions; `chats` runs chat templates."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=answered_or_refused(),
        openapi_extra=body_of(ChatRequest),
    )
    async def chat(connection: Request) -> Response:
        request = await read(connection, ChatRequest)

        def prepare() -> tuple[list[int], ToolUse | None]:
            tokenizer = service.model.tokenizer
            tools = declared_tools(request)
            messages = messages_of(request.messages, tools)
            in_prompt = tools if service.model.declares_tools else ()
            check_size(service, [tool.description for tool in in_prompt], "tools")
            calls = (call for message in messages for call in message.get("calls", ()))
            check_size(
                service, [*(message["content"] for message in messages), *map(arguments_text, calls)], "messages"
            )
            ids = chat_ids(tokenizer, messages, service.model.stop_token_ids, in_prompt)
            return ids, tool_use(request, tools, tokenizer)

        try:
            ids, used = await asyncio.get_running_loop().run_in_executor(chats, prepare)
        except SlmError as error:
            raise Refused(400, said(error), param="messages") from None
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        shape = ChatShape() if used is None else ToolShape(used)
        return await answer(service, connection, Completions(request, [ids], limit, top, shape, used))

    @app.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses=answered_or_refused(),
        openapi_extra=body_of(CompletionRequest),
    )
    async def completions(connection: Request) -> Response:
        request = await read(connection, CompletionRequest)
        prompts = await prompts_of(service, request.prompt)
        wanted = Completions(request, prompts, request.max_tokens, request.logprobs, CompletionShape())
        return await answer(service, connection, wanted)


def _warm(service: Service) -> None:
    """Prepares tables that take seconds for a large vocabulary, so that the first request does not block the event loop."""
    service.model.tokenizer.encode_literal("")
    _ = token_bytes(service.model.tokenizer).longest


def _page(service: Service) -> Site:
    """Returns the chat page of this server."""
    decoder = service.model.decoder
    assert isinstance(decoder, OnnxDecoder)  # the engine supports no other kind of model
    limit, keys = service.limits.new_tokens, bool(service.keys)
    return server_site(decoder.bundle, service.model.tokenizer, service.name, key=keys, new_tokens=limit)
