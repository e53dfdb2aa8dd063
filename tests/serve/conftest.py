"""A server in this process, on a free port, with the random model of the tests."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

import slm
from slm.core.manifest import Bundle
from slm.loading import load_adapter
from slm.runtime.decoder import OnnxDecoder
from slm.serve.connections import Connections
from slm.serve.engine import Engine
from slm.serve.server import Server
from slm.serve.service import Limits, Service
from slm.web.hosts import Hosts

NAME = "random"
# One for all: to make a client takes longer than to answer.
CLIENT = httpx.Client(timeout=60)


class Running:
    """A server on a free port."""

    def __init__(self, service: Service, connections: Connections | None = None) -> None:
        self.service = service
        started = threading.Event()
        self._server = Server(service, started.set, connections)
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        assert started.wait(60)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return CLIENT.post(f"{self.url}{path}", json=body, **options)

    def ask_to_stop(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


def servers(shared_bundle: Bundle) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(
        limits: Limits | None = None,
        keys: tuple[str, ...] = (),
        bundle: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
        hosts: Hosts | None = None,
        origins: tuple[str, ...] = (),
        grace_s: float = 1,
        connections: Connections | None = None,
        **options: Any,
    ) -> Running:
        model = slm.load(bundle or shared_bundle.path)
        assert isinstance(model.decoder, OnnxDecoder)
        engine = Engine(model.decoder, model.tokenizer, **options)
        known = {name: load_adapter(path, model.decoder.bundle) for name, path in (adapters or {}).items()}
        limits = limits or Limits(new_tokens=64)
        service = Service(model, NAME, engine, known, limits, keys, grace_s, hosts=hosts, origins=origins)
        running.append(Running(service, connections))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def serve(shared_bundle: Bundle) -> Iterator[Callable[..., Running]]:
    """Returns a function that starts servers, which stop with the test."""
    yield from servers(shared_bundle)


@pytest.fixture(scope="module")
def running(shared_bundle: Bundle) -> Iterator[Running]:
    """A server that the tests of a module share: they must leave it as it is, and expect nothing of its counters."""
    for start in servers(shared_bundle):
        yield start()
