"""A client for `benchmarks/serve.py` and `benchmarks/soak.py` that costs little: HTTP/1.1 by hand, one connection a request."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What came.

    Attributes:
        status: Of HTTP; 0 when the connection was given up before it came.
        headers: In lower case.
        body: Of an answer that is no stream, or of a refusal.
        events: The JSON of a stream's events, `[DONE]` left out.
        times: When each event came, in `time.perf_counter`'s seconds; before them when the request was sent.
        complete: Whether everything came.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    complete: bool = False

    @property
    def texts(self) -> list[str]:
        """The text of every choice, whole or streamed, of a chat or not; empty where none of it has come."""
        found: dict[int, str] = {}
        for event in self.events or [json.loads(self.body)]:
            for choice in event["choices"]:
                part = choice.get("message") or choice.get("delta")
                text = choice.get("text") if part is None else part.get("content")
                found[choice["index"]] = found.get(choice["index"], "") + (text or "")
        return [found.get(index, "") for index in range(max(found, default=-1) + 1)]


async def post(
    port: int,
    path: str,
    body: dict[str, Any],
    *,
    gone_after: int | None = None,
    pause: Callable[[], float] = lambda: 0.0,
) -> Reply:
    """Posts JSON to a server on this machine and reads the answer.

    Args:
        port: Of the server.
        path: Of the request.
        body: Of the request.
        gone_after: Events after which the connection is closed; None reads all.
        pause: How many seconds to sleep after each piece that was read.
    """
    reply = Reply()
    content = json.dumps(body).encode()
    # A small buffer: somebody who reads slowly is to be noticed on the other side.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        reply.times.append(time.perf_counter())
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
        reply.status = int((await reader.readline()).split()[1])
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            reply.headers[name.lower()] = value.strip()
        if reply.headers.get("transfer-encoding") != "chunked":
            reply.body = await reader.readexactly(int(reply.headers["content-length"]))
            reply.complete = True
            return reply
        held = b""
        while size := int(await reader.readline(), 16):
            held += (await reader.readexactly(size + 2))[:-2]
            now = time.perf_counter()
            *whole, held = held.split(b"\n\n")
            for event in whole:
                said = event.removeprefix(b"data: ")
                if said == b"[DONE]":
                    reply.complete = True
                elif said.startswith(b"{"):
                    reply.times.append(now)
                    reply.events.append(json.loads(said))
            if gone_after is not None and len(reply.events) >= gone_after:
                break
            await asyncio.sleep(pause())
        return reply
    finally:
        writer.close()
