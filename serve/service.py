"""What is served, and what one request may take."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slm.runtime.adapters import Adapter
from slm.runtime.model import Model
from slm.serve.constraint import Grammars
from slm.serve.engine import Engine
from slm.serve.inbox import Post
from slm.serve.metrics import Metrics
from slm.web.hosts import Hosts


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body_bytes: Of its body.
        prompt_tokens: Of its prompt; None leaves it to the context.
        new_tokens: Of each answer; also what it gets when it does not say.
        seconds: Until its answers are cut off.
        texts: Answers it may ask for at once.
        bodies_bytes: Of the bodies of all requests under way.
        patience_s: How long a client may take to send its whole body, or to read a piece of what it is sent.
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
    """What the interface serves.

    Attributes:
        model: The base.
        name: What requests call it.
        engine: Runs it.
        adapters: Others, by what requests call them.
        limits: What one request may take.
        keys: API keys, one of which a request must have; none, and everybody may ask.
        grace_s: How long answers under way may go on when the server is stopped.
        started: When the server was started, in seconds since 1970.
        hosts: Host names that are answered; None for all.
        origins: Of pages elsewhere that may ask; "*" for every one.
        requests: Tasks of the requests under way.
        bodies_bytes: What the bodies of the requests under way take together.
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
        self.grammars = Grammars(self.model.tokenizer, self.model.decoder.vocab_size, self.model.stop_token_ids)
        self._post: Post | None = None

    def post(self, loop: asyncio.AbstractEventLoop) -> Post:
        """Returns what brings the engine's events to an event loop: to one, all the time."""
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
            self.engine.delivered = self._post.deliver
        return self._post

    def stop(self) -> None:
        """Accepts no more requests for answers; those under way have the grace period."""
        self.stopping = True
        self.engine.stop(self.grace_s)

    def end_requests(self) -> None:
        """Ends every request under way, each with an error that its client can read."""
        for task in list(self.requests):
            task.cancel()
