"""Requests that are not answered: every one of them ends in OpenAI's envelope."""

import json
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slm.core.errors import SlmError

log = logging.getLogger("slm.serve")


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


def add_envelopes(app: FastAPI) -> None:
    """Has an application put everything that is raised into the envelope."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return sent(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = str(first["msg"]).removeprefix("Value error, ")
        return sent(Refused(400, f"{where}: {message}" if where else message, param=where))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return sent(Refused(error.status_code, str(error.detail), headers=error.headers))

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error(json.dumps({"path": request.url.path, "error": f"{type(error).__name__}: {error}"}))
        return sent(Refused(500, "something went wrong here", "server_error"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def sent(refused: Refused) -> JSONResponse:
    """Returns the response that says so."""
    return JSONResponse(refused.body, refused.status, refused.headers)


def said(error: SlmError) -> str:
    """Returns what is wrong and what to do about it, in one line."""
    return error.message if error.hint is None else f"{error.message}; {error.hint}"
