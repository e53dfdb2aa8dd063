"""What stands around the application: keys, sizes, patience, and one line of log for each request, with nothing of its text."""

import asyncio
import hmac
import json
import logging
import time
import uuid

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from slm.serve.defects import frames_of
from slm.serve.refusals import Refused, sent
from slm.serve.service import Service

log = logging.getLogger("slm.serve")


class Guard:
    """Checks keys and sizes before anything is read, and logs what became of each request.

    It stands around the application itself: what FastAPI calls a middleware would hide that a client has gone.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._service.limits
        started, name, status, size, stalled = time.monotonic(), uuid.uuid4().hex, 0, 0, False
        complete = False

        async def counted() -> AsgiMessage:
            """Receives the body, whatever it says about its length; then only that the client is gone."""
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(limits.patience_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {limits.patience_s:g} seconds") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > limits.body_bytes:
                raise HTTPException(413, f"the body may have {limits.body_bytes:,} bytes")
            return message

        async def told(message: AsgiMessage) -> None:
            nonlocal status, stalled
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            try:
                async with asyncio.timeout(limits.patience_s):
                    await send(message)
            except TimeoutError:  # nobody reads what is sent
                stalled = True
                raise

        try:
            refusal = _refusal_of(self._service, Request(scope))
            if refusal is None:
                await self._app(scope, counted, told)
            else:
                await sent(refusal)(scope, receive, told)
        except Exception as error:
            if not stalled:
                log.error(json.dumps({"request": name, "error": type(error).__name__, "at": frames_of(error)}))
            if not status:
                await sent(Refused(500, "something went wrong here", "server_error"))(scope, receive, told)
        finally:
            fields = {"request": name, "method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(fields | {"ms": round(1e3 * (time.monotonic() - started), 1)}))


def _refusal_of(service: Service, request: Request) -> Refused | None:
    if service.keys and request.url.path.startswith("/v1/"):
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        # Every key is compared, so that how long it takes says nothing.
        if not sum(hmac.compare_digest(given, key.encode()) for key in service.keys):
            return Refused(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > service.limits.body_bytes:
        return Refused(413, f"the body may have {service.limits.body_bytes:,} bytes")
    return None
