"""The outer layer of the application: access, size limits, deadlines, and one log line per request."""

import asyncio
import contextlib
import json
import logging
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from slm.serve import log
from slm.serve.access import Access
from slm.serve.errors import Refused, sent
from slm.serve.service import Service
from slm.serve.tracebacks import frames_of

# How long a client may take to read the final error when the server stops, in seconds.
_FAREWELL_S = 1.0
# The limit for a request's headers, path and query together.
_HEAD_BYTES = 1 << 14


class Guard:
    """Checks access and size before a body is read, and logs the outcome of each request.

    It wraps the application directly: a FastAPI middleware would hide that a client has disconnected.
    """

    def __init__(self, app: ASGIApp, service: Service, access: Access) -> None:
        self._app, self._service, self._access = app, service, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Request(self._app, self._service, self._access, scope, receive, send).serve()
        else:  # WebSocket is not supported: rejected before it is accepted, which is a 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})


class _Request:
    """One request, from its headers to its log line."""

    def __init__(
        self, app: ASGIApp, service: Service, access: Access, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._app, self._service, self._access = app, service, access
        self._scope, self._receive, self._send = scope, receive, send
        self._name = uuid.uuid4().hex
        self._status = 0
        self._size, self._complete = 0, False  # bytes of the body
        self._began = time.monotonic()
        self._events = self._ended = self._stalled = False  # state of the response

    async def serve(self) -> None:
        """Serves the request, with a response in every case."""
        record = log.open_record(self._scope)
        task = asyncio.current_task()
        assert task is not None
        self._service.requests.add(task)
        try:
            await self._answer()
        except asyncio.CancelledError:
            if not self._service.stopping:
                raise
            await self._say_farewell()
        except Exception as error:
            if not self._stalled:
                log.write(logging.ERROR, request=self._name, error=type(error).__name__, at=frames_of(error))
            if not self._status:
                await self._respond(sent(Refused(500, "internal server error", "server_error")))
        finally:
            self._service.requests.discard(task)
            self._service.bodies_bytes -= self._size
            log.write(
                request=self._name,
                method=self._scope["method"][:20],
                path=log.path_of(self._scope),
                status=self._status,
                ms=round(1e3 * (time.monotonic() - self._began), 1),
                **record.fields(),
            )

    async def _answer(self) -> None:
        preflight = self._access.preflight(self._scope)
        refusal = self._access.refusal(self._scope)
        if refusal is not None and (preflight is None or refusal.status != 401):
            await self._respond(sent(refusal))
        elif preflight is not None:  # browsers send no key with a preflight
            response = Response(status_code=204)
            response.raw_headers = preflight
            await self._respond(response)
        elif (malformed := _malformed(self._scope, self._service.limits.body_bytes)) is not None:
            await self._respond(sent(malformed))
        else:
            # The server sends no body to HEAD, whatever the application returns.
            asked = {**self._scope, "method": "GET"} if self._scope["method"] == "HEAD" else self._scope
            await self._app(asked, self._receive_body, self._send_part)

    @property
    def _cors(self) -> list[tuple[bytes, bytes]]:
        return self._access.cors(self._scope["headers"])

    async def _respond(self, response: Response) -> None:
        await response(self._scope, self._receive, self._send_part)

    async def _receive_body(self) -> AsgiMessage:
        """Receives the body until its deadline, whatever its stated length; afterwards reports only a disconnected client."""
        if self._complete:
            return await self._receive()
        limits = self._service.limits
        left = self._began + limits.patience_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body was not received within {limits.patience_s:g} seconds") from None
        new = len(message.get("body", b""))
        self._size += new
        self._service.bodies_bytes += new
        self._complete = not message.get("more_body", False)
        if self._size > limits.body_bytes:
            raise HTTPException(413, f"the body exceeds the limit of {limits.body_bytes:,} bytes")
        if self._service.bodies_bytes > limits.bodies_bytes:
            raise HTTPException(503, "too many large requests are in progress", {"Retry-After": "1"})
        return message

    async def _send_part(self, message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._name.encode()), *self._cors]
            self._events = any(
                value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type"
            )
            message["headers"] = headers
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self._service.limits.patience_s):
                await self._send(message)
        except TimeoutError:  # the client no longer reads
            self._stalled = True
            raise

    async def _say_farewell(self) -> None:
        """Ends a response for which the server has no more time, unless its client does not read."""
        refused = Refused(503, "the server is shutting down", "server_error")
        with contextlib.suppress(TimeoutError, OSError, RuntimeError):
            async with asyncio.timeout(_FAREWELL_S):
                if not self._status:
                    await self._respond(sent(refused))
                elif self._events and not self._ended:
                    event = b"data: %s\n\n" % json.dumps(refused.body).encode()
                    await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _malformed(scope: Scope, body_bytes: int) -> Refused | None:
    """Rejects headers or a body beyond the limits, and a body whose length two headers state differently."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path", b""))
    if size + len(scope.get("query_string", b"")) > _HEAD_BYTES:
        return Refused(431, f"the headers exceed the limit of {_HEAD_BYTES:,} bytes")
    lengths = [value for name, value in headers if name == b"content-length"]
    if any(not value.isdigit() or len(value) > 18 or int(value) > body_bytes for value in lengths):
        return Refused(413, f"the body exceeds the limit of {body_bytes:,} bytes")
    if lengths and any(name == b"transfer-encoding" for name, _ in headers):
        # A proxy may see a different end of this request, so the rest of the connection is not parsed as a new request.
        return Refused(400, "Content-Length and Transfer-Encoding are both given", headers={"connection": "close"})
    return None
