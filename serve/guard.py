"""What stands around the application: keys, sizes, and one line of log for each request, of which nothing of the text is."""

import hmac
import json
import logging
import time
import uuid

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

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
            return sent(Refused(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key"))
    length = request.headers.get("content-length")
    if request.method == "POST":
        if length is None:
            return sent(Refused(411, "the body must say how long it is (Content-Length)"))
        if not length.isdecimal() or int(length) > service.limits.body_bytes:
            return sent(Refused(413, f"the body may have {service.limits.body_bytes:,} bytes"))
    return None
