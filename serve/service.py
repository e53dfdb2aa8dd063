"""The served models, and the limits of a request."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm.core.chat import turn_ends
from slm.runtime.adapters import Adapter
from slm.runtime.constraint import Grammars
from slm.runtime.model import Model
from slm.serve.engine import Engine
from slm.serve.events import Post
from slm.serve.metrics import Metrics
from slm.web.hosts import Hosts


@dataclass(frozen=True)
class Limits:
    """The limits of one request.

    Attributes:
        body_bytes: Bytes of its body.
        prompt_tokens: Tokens of its prompt; None for the context.
        new_tokens: New tokens of each completion; also the default.
        seconds: Seconds until its completions are cut off.
        texts: Completions.
        bodies_bytes: Bytes of the bodies of all requests in progress.
        patience_s: Seconds for a client to send its whole body, or to read a piece of the response.
    """

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None
    new_tokens: int = 1024
    seconds: float = 300.0
    texts: int = 16
    bodies_bytes: int = 128 << 20
    patience_s: float = 60.0


@dataclass
class Service:
    """The served models, and the state of the server.

    Attributes:
        model: The base model.
        name: Its name in requests.
        engine: Runs it.
        adapters: Adapters by their names in requests.
        limits: The limits of one request.
        keys: API keys, one of which a request must have; empty to allow requests without a key.
        grace_s: How long requests in progress may continue when the server is stopped, in seconds.
        started: The start of the server, in seconds since 1970.
        hosts: Allowed Host names; None for all.
        origins: Allowed origins of other sites' pages; "*" for all.
        requests: Tasks of the requests in progress.
        bodies_bytes: Total bytes of the bodies of the requests in progress.
        stopping: Whether the server is being stopped.
    """

    model: Model
    name: str
    engine: Engine
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    limits: Limits = Limits()
    keys: Sequence[str] = ()
    grace_s: float = 30.0
    started: int = field(default_factory=lambda: int(time.time()))
    hosts: Hosts | None = None
    origins: Collection[str] = ()
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    bodies_bytes: int = 0
    stopping: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        stops = dict.fromkeys((*self.model.stop_token_ids, *sorted(turn_ends(self.model.tokenizer))))
        self.model.stop_token_ids = tuple(stops)
        self.grammars = Grammars(self.model.tokenizer, self.model.decoder.vocab_size, self.model.stop_token_ids)
        self._post: Post | None = None

    def post(self, loop: asyncio.AbstractEventLoop) -> Post:
        """Returns the post from the engine to an event loop, always the same loop."""
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
            self.engine.delivered = self._post.deliver
        return self._post

    def stop(self) -> None:
        """Stops accepting requests for completions; requests in progress have the grace period."""
        self.stopping = True
        self.engine.stop(self.grace_s)

    def end_requests(self) -> None:
        """Ends every request in progress, each with an error that its client can read."""
        for task in list(self.requests):
            task.cancel()
