"""Reads request bodies: in a thread if they are large, and with a bounded cost per body.

The parser and the validator hold Python's lock, which blocks the event loop from any thread. The cost of one call is
therefore
bounded: by the number of values of each kind, and by stopping at the first error.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from slm.serve.errors import Refused, invalid

Asked = TypeVar("Asked", bound=BaseModel)

# Bodies of up to this many bytes are read in the event loop, which takes about a millisecond.
_SMALL = 1 << 14
# A megabyte of empty objects would take 60 ms and 50 MiB. Within these limits a body takes 10 ms and 10 MiB.
MOST_CONTAINERS = 20_000
MOST_STRINGS = 50_000
MOST_VALUES = 150_000  # covers the ids of a context of 131,072 tokens
# How much of a body beyond the limits is parsed to find its first error.
_HEAD = 1 << 15
# One large body at a time, which bounds memory.
_READER = ThreadPoolExecutor(1, "slm-body")


async def read(connection: Request, kind: type[Asked]) -> Asked:
    """Returns the request in a body, whatever its content type.

    Raises:
        Refused: If the body is not JSON, or not a valid request.
    """
    try:
        body = await connection.body()
    except ClientDisconnect:
        raise Refused(499, "the client disconnected") from None
    if connection.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "compressed bodies are not supported")
    if len(body) <= _SMALL:
        return parsed(body, kind)
    return await asyncio.get_running_loop().run_in_executor(_READER, partial(parsed, body, kind))


def parsed(body: bytes, kind: type[Asked]) -> Asked:
    """Parses a body.

    Raises:
        Refused: If the body is not JSON, or not a valid request; the message names the first error.
    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    if len(body) > _SMALL and (excess := _excess(body)):
        _refuse_head(body, kind, excess)
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid(_errors(error)) from None


def _json(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        why = str(error)
    # The fast parser rejects unpaired surrogates and 200 levels without naming the field, so these bodies are parsed again.
    if "hex escape" in why or "recursion" in why:
        try:
            return json.loads(body, parse_constant=_refuse_constant)
        except RecursionError:
            raise Refused(400, "the body is nested too deeply") from None
        except ValueError:
            pass
    raise Refused(400, f"the body is not JSON: {why}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _errors(error: ValidationError) -> Sequence[Mapping[str, Any]]:
    return error.errors(include_url=False, include_input=False)


def _excess(body: bytes) -> str | None:
    """Returns which limit a body exceeds, or None."""
    limits = {
        "objects and arrays": (b"{[", MOST_CONTAINERS, 1),
        "strings": (b'"', MOST_STRINGS, 2),
        "values": (b",", MOST_VALUES, 1),
    }
    if all(sum(body.count(mark) for mark in marks) // each <= most for marks, most, each in limits.values()):
        return None
    # Characters within JSON strings do not count.
    plain = np.frombuffer(body.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
    quotes = plain == ord('"')
    inside = np.bitwise_and(np.cumsum(quotes, dtype=np.int32), 1).astype(bool)
    for what, (marks, most, each) in limits.items():
        found = sum(int(np.count_nonzero((plain == mark) & (~inside | quotes))) for mark in marks) // each
        if found > most:
            return f"at most {most:,} {what} in a body, not {found:,}"
    return None


def _refuse_head(body: bytes, kind: type[BaseModel], excess: str) -> NoReturn:
    """Rejects a body for the first error in its beginning, or else for the limit that it exceeds."""
    try:
        head = from_json(body[:_HEAD], allow_inf_nan=False, allow_partial=True)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    try:
        kind.model_validate(head)
    except ValidationError as error:
        for each in _errors(error):
            if not _cut_off(each, head):
                raise invalid([each]) from None
    # The beginning ends within the field that is too large.
    field = next(reversed(head), None) if isinstance(head, dict) else None
    raise Refused(400, excess, param=field)


def _cut_off(error: Mapping[str, Any], head: Any) -> bool:
    """Returns whether an error may be due to the cut: the missing field may still follow."""
    if not str(error["type"]).startswith("missing"):
        return False
    for part in error["loc"]:
        if isinstance(head, list) and isinstance(part, int):
            if part < len(head) - 1:
                return False
            head = head[part]
        elif isinstance(head, dict) and part in head:
            head = head[part]
    return True
