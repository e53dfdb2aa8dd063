"""Error responses in OpenAI's envelope."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from slm.core.errors import SlmError

# The most characters of a client's input that a message quotes.
_QUOTED = 200


class Refused(Exception):
    """An error response in OpenAI's envelope."""

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
        self.body = {"error": {"message": _short(message), "type": kind, "param": param, "code": code}}


def add_envelopes(app: FastAPI) -> None:
    """Makes an application return every HTTP error in the envelope."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return sent(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = _short(request.scope["path"])
        if error.status_code == 404:
            wrong = Refused(404, f"{path} does not exist; see /docs for the API", code="unknown_url")
        elif error.status_code == 405:
            wrong = Refused(405, f"{request.method[:20]} is not allowed for {path}", headers=error.headers)
        else:
            wrong = Refused(error.status_code, str(error.detail), headers=error.headers)
        return sent(wrong)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http)


def sent(refused: Refused) -> Response:
    """Returns the HTTP response of an error."""
    # ASCII only: quoted input may have unpaired surrogates, which UTF-8 cannot encode.
    return Response(json.dumps(refused.body), refused.status, refused.headers, "application/json")


def said(error: SlmError) -> str:
    """Returns the message and the hint of an error in one line."""
    return error.message if error.hint is None else f"{error.message}; {error.hint}"


def invalid(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """Returns the response for pydantic's errors. It names the first invalid field and all types that it accepts."""
    first = errors[0]
    where = _where(first)
    same = [each for each in errors if f"{_where(each)}.".startswith(f"{where}.")]
    wrongs = [_wrong(each) for each in same]
    wrong = "; or: ".join(dict.fromkeys(wrongs))
    return Refused(400, f"{_short(where)}: {wrong}" if where else wrong, param=_short(where) if where else None)


def _wrong(error: Mapping[str, Any]) -> str:
    """Returns an error's message; pydantic's message for an object would name an internal class."""
    if error["type"] in ("model_type", "dict_type"):
        return "Input should be an object"
    return str(error["msg"]).removeprefix("Value error, ")


def _where(error: Mapping[str, Any]) -> str:
    """Returns the path of a field, without pydantic's names of the alternatives of a union."""
    parts = [part for part in error["loc"] if not isinstance(part, str) or (part != "str" and "[" not in part)]
    field = error.get("ctx", {}).get("field")
    return ".".join(map(str, [*parts, *([] if field is None else [field])]))


def _short(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
